"""Limits of API keys at both edges of the router."""

from __future__ import annotations

from pathlib import Path

import httpx2
import pytest
from splitserve.client import RateLimited
from splitserve.router.key_file import key_digest

from .conftest import ANSWER, StartScene, ask, end_of, granted, speak

LIMITED = """
keys:
- name: alice
  sha256: {digest}
  scopes: [inference, admin]
  max_concurrent: 1
"""


async def test_a_key_past_its_limit_is_told_at_both_edges_when_to_come_back(
    start_scene: StartScene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPLITSERVE_API_KEY", "secret")
    keys = tmp_path / "keys.yaml"
    keys.write_text(LIMITED.format(digest=key_digest("secret").hex()))
    keys.chmod(0o600)
    scene = await start_scene(api_key_file=keys, http_port=0)
    running = ask(scene)
    prefill, work = await granted(scene)
    with pytest.raises(RateLimited, match="'alice' has 1 requests running, its limit is 1") as caught:
        await end_of(ask(scene))
    assert caught.value.retry_after_s == pytest.approx(1.0)
    headers = {"authorization": "Bearer secret"}
    async with httpx2.AsyncClient(base_url=f"http://{scene.router.http_address}", headers=headers) as http:
        answer = await http.post("/v1/completions", json={"model": scene.decode.info.model, "prompt": [1, 2, 3]})
    assert answer.status_code == 429
    assert answer.headers["retry-after-ms"] == "1000"
    assert answer.json()["error"]["code"] == "rate_limit_exceeded"
    prefill.first_token(work, ANSWER[0])
    speak(scene.decode, work, 1, len(ANSWER))
    await end_of(running)
    following = ask(scene)  # and now there is room again
    prefill, work = await granted(scene)
    prefill.first_token(work, ANSWER[0])
    speak(scene.decode, work, 1, len(ANSWER))
    assert list((await end_of(following)).token_ids) == ANSWER
    scene.check_nothing_left()
