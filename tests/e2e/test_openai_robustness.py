"""Whatever is sent over HTTP gets an answer that the OpenAPI document knows, and never a 5xx; memory stays flat."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx2
import psutil
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from splitserve.benchmarks.processes import ProcessCluster
from splitserve.router.openai.document import openapi_document

DOCUMENT = dict(openapi_document())
SCHEMA = schemathesis.openapi.from_dict(DOCUMENT)
OPERATIONS = [operation.ok() for operation in SCHEMA.get_all_operations()]
CHECKS = [content_type_conformance, response_schema_conformance, status_code_conformance]
NUM_MALFORMED = 10_000
FLAT_BYTES = 16 << 20


@pytest.fixture(scope="module")
def url(served: ProcessCluster) -> str:
    return f"http://{served.router.http_address}"


def run_cases(operation: Any, url: str, model: str, num_cases: int) -> Counter[int]:
    """So many generated requests for one operation; returns their statuses."""
    statuses: Counter[int] = Counter()

    @settings(
        max_examples=num_cases, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(case=operation.as_strategy(), in_model=st.booleans())
    def run(case: Any, in_model: bool) -> None:
        if isinstance(case.body, dict):
            # So that many get as far as the engine, and none takes long; a deadline of no time is a 504 by design.
            case.body.pop("timeout_s", None)
            if in_model:
                case.body["model"] = model
            for name, most in (("max_tokens", 2), ("max_completion_tokens", 2), ("n", 2), ("best_of", 2)):
                if isinstance(case.body.get(name), int):
                    case.body[name] = min(case.body[name], most)
        response = case.call(base_url=url)
        statuses[response.status_code] += 1
        assert response.status_code < 500, response.text
        case.validate_response(response, checks=CHECKS)

    run()
    return statuses


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.label)
def test_generated_requests_get_documented_answers(operation: Any, url: str, tiny: object) -> None:
    run_cases(operation, url, str(tiny), 8)


@pytest.mark.verify
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.label)
def test_many_generated_requests_get_documented_answers(operation: Any, url: str, tiny: object) -> None:
    num_cases = 600 if "requestBody" in operation.definition.raw else 30
    statuses = run_cases(operation, url, str(tiny), num_cases)
    if "requestBody" in operation.definition.raw:
        assert statuses[200] > 0
        assert statuses.total() >= 500


def malformed(model: str, count: int) -> Iterator[tuple[str, bytes]]:
    """Paths and bodies that are wrong in one way or another; the same every time."""
    rng = random.Random(7)
    valid: dict[str, dict[str, Any]] = {
        "/v1/completions": {"model": model, "prompt": "abc", "max_tokens": 2},
        "/v1/chat/completions": {"model": model, "messages": [{"role": "user", "content": "abc"}]},
        "/tokenize": {"prompt": "abc"},
        "/detokenize": {"tokens": [65]},
    }
    wrong = [-1, 2**40, 2**70, 1e308, True, {}, [[]], [None], {"a": None}, [[1], "a"], -0.5]  # of any field
    for _ in range(count):
        path = rng.choice(list(valid))
        body = dict(valid[path])
        text = json.dumps(body).encode()
        kind = rng.randrange(8)
        if kind == 0:
            yield path, text[: rng.randrange(len(text))]
        elif kind == 1:
            yield path, rng.randbytes(rng.randrange(200))
        elif kind == 2:
            at = rng.randrange(len(text))
            yield path, text[:at] + bytes([rng.randrange(128, 256)]) + text[at + 1 :]
        elif kind == 3:
            yield path, json.dumps({**body, rng.choice(list(body)): rng.choice(wrong)}).encode()
        elif kind == 4:
            del body[rng.choice([name for name in body if name not in ("max_tokens",)])]
            yield path, json.dumps({**body, "n": 0}).encode()
        elif kind == 5:
            depth = rng.choice([50, 500, 5_000])
            yield path, b'{"model":' + b"[" * depth + b"]" * depth + b"}"
        elif kind == 6:
            yield path, text[:-1] + b',"stop":"\\ud800"}'
        else:
            yield path, text[:-1] + b',"nonsense' + str(rng.randrange(1000)).encode() + b'":NaN}'


def send_malformed(url: str, model: str, count: int) -> Counter[int]:
    statuses: Counter[int] = Counter()
    with httpx2.Client(base_url=url, timeout=30) as client:
        for path, body in malformed(model, count):
            response = client.post(path, content=body)
            statuses[response.status_code] += 1
            assert response.status_code in (400, 404, 413), (path, body[:200], response.text)
            error = response.json()["error"]
            assert error.keys() == {"message", "type", "param", "code"}
            assert error["message"]
    return statuses


def test_malformed_requests_get_typed_errors(url: str, tiny: object) -> None:
    send_malformed(url, str(tiny), 300)


@pytest.mark.verify
@pytest.mark.timeout(600)
def test_ten_thousand_malformed_requests_leave_memory_flat(url: str, served: ProcessCluster, tiny: object) -> None:
    processes = [psutil.Process(end.pid) for end in (served.router, *served.workers.values())]
    send_malformed(url, str(tiny), 2_000)
    before = [process.memory_info().rss for process in processes]
    send_malformed(url, str(tiny), NUM_MALFORMED)
    after = [process.memory_info().rss for process in processes]
    assert all(late - early < FLAT_BYTES for early, late in zip(before, after, strict=True)), (before, after)


def test_a_body_too_large_is_413(url: str, tiny: object) -> None:
    body = json.dumps({"model": str(tiny), "prompt": "a" * (17 << 20)}).encode()
    response = httpx2.post(f"{url}/v1/completions", content=body, timeout=30)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nothing", 404), ("POST", "/v1/models", 405), ("GET", "/v1/completions", 405), ("POST", "/v1/", 404)],
)
def test_wrong_paths_and_methods_get_json_errors(url: str, method: str, path: str, status: int) -> None:
    response = httpx2.request(method, f"{url}{path}")
    assert response.status_code == status
    assert response.json()["error"]["type"] == "invalid_request_error"
