"""API keys on both edges."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest
import pytest_asyncio
from splitserve.client import AsyncClient, RetryPolicy, Unauthenticated
from splitserve.core.errors import ConfigError
from splitserve.router.keys import ApiKeys, read_keys
from splitserve.router.server import Router, RouterOptions

NO_RETRY = RetryPolicy(max_attempts=1)


@pytest_asyncio.fixture
async def router(tiny: Path, tmp_path: Path) -> AsyncIterator[Router]:
    """A router without workers that knows two keys."""
    keys = tmp_path / "keys"
    keys.write_text("# of the tests\nfirst-key\n\nsecond-key\n")
    router = Router(RouterOptions(model=str(tiny), port=0, http_port=0, api_key_file=keys, no_worker_wait_s=0.1))
    await router.start()
    yield router
    await router.stop()


@pytest.mark.parametrize("key", ["first-key", "second-key"])
async def test_a_known_key_opens_both_edges(router: Router, key: str) -> None:
    async with AsyncClient(router.address, api_key=key, retry=NO_RETRY) as client:
        assert await client.models() == ()
        assert (await client.status()).workers == ()
    async with httpx2.AsyncClient(base_url=f"http://{router.http_address}") as http:
        answer = await http.get("/v1/models", headers={"authorization": f"Bearer {key}"})
        assert answer.json() == {"object": "list", "data": []}


@pytest.mark.parametrize("key", ["", "first", "first-key-and-more", "FIRST-KEY", "ключ"])
async def test_without_a_known_key_every_call_is_refused(
    router: Router, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SPLITSERVE_API_KEY", raising=False)
    if key.isascii():  # gRPC's client itself refuses other metadata
        async with AsyncClient(router.address, api_key=key, retry=NO_RETRY) as client:
            for call in (client.models(), client.status(), client.cancel("a"), client.generate("a")):
                with pytest.raises(Unauthenticated, match="API key"):
                    await call
            assert await client.health() is False  # open, and no worker is there
    headers = {"authorization": f"Bearer {key}".encode()} if key else {}
    async with httpx2.AsyncClient(base_url=f"http://{router.http_address}", headers=headers) as http:
        for method, path in (("POST", "/v1/completions"), ("GET", "/metrics"), ("GET", "/nothing")):
            answer = await http.request(method, path)
            error = answer.json()["error"]
            assert (answer.status_code, error["type"], error["code"]) == (
                401,
                "authentication_error",
                "unauthenticated",
            )
        assert (await http.get("/health")).status_code == 503


async def test_the_environment_s_key_is_taken(router: Router, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPLITSERVE_API_KEY", "second-key")
    async with AsyncClient(router.address, retry=NO_RETRY) as client:
        assert await client.models() == ()


@pytest.mark.parametrize("header", [None, "", "first-key", "Basic first-key", "Bearer", "Bearer "])
def test_a_header_of_another_form_is_refused(header: str | None) -> None:
    with pytest.raises(Unauthenticated):
        ApiKeys(["first-key"]).check(header)


def test_a_file_without_keys_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# none\n\n")
    with pytest.raises(ConfigError, match="holds no API key"):
        read_keys(path)
    with pytest.raises(ConfigError, match="cannot read"):
        read_keys(tmp_path / "missing")
