"""API keys on both edges: who is let in, to what, and what is counted."""

from __future__ import annotations

import asyncio
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest
import pytest_asyncio
import yaml
from splitserve.client import AsyncClient, Cancelled, PermissionDenied, RetryPolicy, Unauthenticated
from splitserve.core.api_key import ANYBODY, ApiKey, Scope
from splitserve.core.errors import ConfigError
from splitserve.core.metrics import LinkMetrics
from splitserve.router.key_file import KeyFile, add_key, key_digest, read_keys
from splitserve.router.keys import ApiKeys
from splitserve.router.server import Router, RouterOptions

from .conftest import StartScene, end_of, granted

NO_RETRY = RetryPolicy(max_attempts=1)
ADMIN = ApiKey(name="operator", scopes=frozenset(Scope))


class Keys:
    """A key file and the secrets of what is in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.user = add_key(path, ApiKey(name="user", weight=2.0, max_concurrent=3))
        self.operator = add_key(path, ADMIN)


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path / "keys.yaml")


@pytest_asyncio.fixture
async def router(tiny: Path, keys: Keys) -> AsyncIterator[Router]:
    """A router without workers."""
    controller = key_digest("of-the-controller").hex()
    router = Router(
        RouterOptions(
            model=str(tiny),
            port=0,
            http_port=0,
            api_key_file=keys.path,
            controller_key_sha256=controller,
            no_worker_wait_s=0.1,
        )
    )
    await router.start()
    yield router
    await router.stop()


def refused(router: Router, reason: str) -> float:
    return router.metrics.links.refused.labels(reason)._value.get()


async def test_a_known_key_opens_both_edges(router: Router, keys: Keys) -> None:
    for key in (keys.user, keys.operator):
        async with AsyncClient(router.address, api_key=key, retry=NO_RETRY) as client:
            assert await client.models() == ()
        async with httpx2.AsyncClient(base_url=f"http://{router.http_address}") as http:
            answer = await http.get("/v1/models", headers={"authorization": f"Bearer {key}"})
            assert answer.json() == {"object": "list", "data": []}
    assert refused(router, "key") == 0


@pytest.mark.parametrize("key", ["", "ss-", "operator", "ключ"])
async def test_without_a_known_key_every_call_is_refused(
    router: Router, keys: Keys, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SPLITSERVE_API_KEY", raising=False)
    if key.isascii():  # gRPC's client itself refuses other metadata
        async with AsyncClient(router.address, api_key=key, retry=NO_RETRY) as client:
            for call in (client.models(), client.status(), client.cancel("a"), client.generate("a")):
                with pytest.raises(Unauthenticated, match="API key"):
                    await call
            assert await client.health() is False  # open, and no worker is there
        assert refused(router, "key") == 4
    headers = {"authorization": f"Bearer {key}".encode()} if key else {}
    async with httpx2.AsyncClient(base_url=f"http://{router.http_address}", headers=headers) as http:
        before = refused(router, "key")
        for method, path in (("POST", "/v1/completions"), ("GET", "/metrics"), ("GET", "/nothing")):
            answer = await http.request(method, path)
            error = answer.json()["error"]
            assert (answer.status_code, error["type"], error["code"]) == (
                401,
                "authentication_error",
                "unauthenticated",
            )
        assert refused(router, "key") == before + 3
        assert (await http.get("/health")).status_code == 503


async def test_a_key_opens_only_its_scopes(router: Router, keys: Keys) -> None:
    async with AsyncClient(router.address, api_key=keys.user, retry=NO_RETRY) as client:
        with pytest.raises(PermissionDenied, match=r"'user' has the scopes \[inference\], this call needs admin"):
            await client.status()
    async with httpx2.AsyncClient(base_url=f"http://{router.http_address}") as http:
        answer = await http.get("/metrics", headers={"authorization": f"Bearer {keys.user}"})
        assert (answer.status_code, answer.json()["error"]["type"]) == (403, "permission_error")
        assert refused(router, "scope") == 2
        answer = await http.get("/metrics", headers={"authorization": f"Bearer {keys.operator}"})
        assert 'splitserve_refused_total{reason="scope"} 2.0' in answer.text
    for key in (keys.operator, "of-the-controller"):
        async with AsyncClient(router.address, api_key=key, retry=NO_RETRY) as client:
            assert (await client.status()).workers == ()


async def test_keys_that_come_and_go_are_noticed_at_the_next_call(router: Router, keys: Keys) -> None:
    new = add_key(keys.path, ApiKey(name="new"))
    async with AsyncClient(router.address, api_key=new, retry=NO_RETRY) as client:
        assert await client.models() == ()
        tree = yaml.safe_load(keys.path.read_text())
        keys.path.write_text(yaml.safe_dump({"keys": tree["keys"][:-1]}))
        with pytest.raises(Unauthenticated, match="not valid"):
            await client.models()


async def test_a_file_that_became_wrong_leaves_the_keys_before_in_force(
    router: Router, keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    keys.path.write_text("keys: [")
    async with AsyncClient(router.address, api_key=keys.user, retry=NO_RETRY) as client:
        assert await client.models() == ()
        keys.path.unlink()
        assert await client.models() == ()
    assert "stay in force" in caplog.text


async def test_the_environment_s_key_is_taken(router: Router, keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPLITSERVE_API_KEY", keys.user)
    async with AsyncClient(router.address, retry=NO_RETRY) as client:
        assert await client.models() == ()


@pytest.mark.parametrize("header", [None, "", "first-key", "Basic first-key", "Bearer", "Bearer "])
def test_a_header_of_another_form_is_refused(header: str | None) -> None:
    known = {key_digest("first-key"): ANYBODY}
    keys = ApiKeys(lambda: known, LinkMetrics())
    assert keys.check("bearer first-key", Scope.ADMIN) is ANYBODY
    with pytest.raises(Unauthenticated):
        keys.check(header, Scope.INFERENCE)


def test_a_key_is_in_the_file_as_its_digest_alone(keys: Keys) -> None:
    text = keys.path.read_text()
    assert keys.user not in text
    assert key_digest(keys.user).hex() in text
    assert stat.S_IMODE(keys.path.stat().st_mode) == 0o600
    assert read_keys(keys.path)[key_digest(keys.user)] == ApiKey(name="user", weight=2.0, max_concurrent=3)
    assert KeyFile(keys.path).keys()[key_digest(keys.operator)] == ADMIN
    with pytest.raises(ConfigError, match="has a key 'user' already"):
        add_key(keys.path, ApiKey(name="user"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a-secret-of-the-old-format\n", "holds no API keys in YAML"),
        ("keys: []", "at least one key"),
        ("keys: [{name: a}]", r"keys\[0\]\.sha256: Field required"),
        ("keys: [{name: a, sha256: short}]", r"keys\[0\]\.sha256"),
        (f"keys: [{{name: a, sha256: {'c' * 64}, scopes: [root]}}]", r"scopes\[0\]: Input should be 'inference'"),
        (f"keys: [{{name: a, sha256: {'c' * 64}, wieght: 2}}]", "wieght"),
        (f"keys: [{{name: a, sha256: {'a' * 64}}}, {{name: a, sha256: {'b' * 64}}}]", "each name once; a is"),
    ],
)
def test_a_wrong_file_is_refused_without_showing_what_it_holds(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        read_keys(path)
    assert "secret" not in caught.value.message
    with pytest.raises(ConfigError, match="cannot read"):
        read_keys(tmp_path / "missing")


@pytest.mark.parametrize("other", ["owner", "operator"])
async def test_a_request_is_cancelled_by_its_own_key_or_an_admin_s_and_by_no_other(
    other: str, start_scene: StartScene, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    stranger = add_key(keys.path, ApiKey(name="stranger"))
    monkeypatch.setenv("SPLITSERVE_API_KEY", keys.operator)  # of the scene's own client
    scene = await start_scene(api_key_file=keys.path)
    async with (
        AsyncClient(scene.router.address, api_key=keys.user, retry=NO_RETRY) as owner,
        AsyncClient(scene.router.address, api_key=stranger, retry=NO_RETRY) as outsider,
    ):
        running = asyncio.create_task(owner.generate([10, 20, 30], max_tokens=4, idempotency_key="mine"))
        await granted(scene)
        assert await outsider.cancel("mine") is False
        assert not running.done()
        allowed = owner if other == "owner" else scene.client
        assert await allowed.cancel("mine") is True
        with pytest.raises(Cancelled):
            await end_of(running)
    scene.check_nothing_left()
