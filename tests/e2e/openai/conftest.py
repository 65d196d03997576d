"""The public `openai` client on a running split cluster."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion
from splitserve.benchmarks.processes import ProcessCluster
from splitserve.client import Client

WAIT_S = 30.0
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def model(tiny: object) -> str:
    return str(tiny)


@pytest.fixture(scope="module")
def client(served: ProcessCluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://{served.router.http_address}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def complete(client: openai.OpenAI, model: str) -> Any:
    """complete("prompt", **parameters), greedy unless they say otherwise."""

    def run(prompt: Any, **parameters: Any) -> Completion:
        return client.completions.create(model=model, prompt=prompt, **{"temperature": 0, **parameters})

    return run


@pytest.fixture
def chat(client: openai.OpenAI, model: str) -> Any:
    def run(messages: Any = HELLO, **parameters: Any) -> ChatCompletion:
        parameters = {"temperature": 0, "max_completion_tokens": 8, **parameters}
        return client.chat.completions.create(model=model, messages=messages, **parameters)

    return run


@pytest.fixture
def idle(served: ProcessCluster) -> Iterator[Any]:
    """idle(): wait until no request is live and every KV block is free or only cached."""
    with Client(served.router.address) as sdk:

        def wait() -> None:
            deadline = time.monotonic() + WAIT_S
            while (status := sdk.status()).num_live or any(
                worker.num_running or worker.num_available_blocks < worker.num_blocks for worker in status.workers
            ):
                assert time.monotonic() < deadline, status

        yield wait
