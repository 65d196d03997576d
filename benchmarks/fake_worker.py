"""A prefill and a decode worker in one process that compute nothing, so that a router before them is all there is.

Started by benchmarks.router. Both sessions are real ones, on one port; KV never moves.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..deploy.process import report_ready
from ..proto import inference_pb2, kv_transfer_pb2, worker_pb2, worker_pb2_grpc
from ..proto.convert import PROTOCOL_VERSION
from ..proto.server import RpcServer, run
from ..worker.session import Session

STATUS = worker_pb2.WorkerStatus(num_blocks=10**6, num_free_blocks=10**6, prefill_tokens_per_s=1e6)
LENGTH = inference_pb2.FINISH_REASON_LENGTH
Key = tuple[str, int]  # request id, attempt


class FakeWorker(worker_pb2_grpc.PrefillWorkerServicer, worker_pb2_grpc.DecodeWorkerServicer):
    """Answers are printable bytes, as many as asked for: the first at once, then one a step.

    Args: step_s: of the decode worker.
    """

    def __init__(self, model: str, step_s: float) -> None:
        self._model = model
        self._step_s = step_s
        self._granted: dict[Key, DecodeBatch] = {}
        self._ungranted: dict[Key, worker_pb2.WorkRequest] = {}  # prefilled, while their grants are on their way here
        self._boot_id = secrets.token_hex(8)
        self.address = ""

    def info(self, role: str) -> worker_pb2.WorkerInfo:
        return worker_pb2.WorkerInfo(
            protocol_version=PROTOCOL_VERSION,
            worker_id=f"fake-{role}-{os.getpid()}",
            boot_id=self._boot_id,
            role=worker_pb2.Role.Value(f"ROLE_{role.upper()}"),
            model=self._model,
            geometry_digest="fake",
            max_model_len=8192,
            vocab_size=260,
            block_size=16,
            kv_address=self.address,
            late_grants=True,
        )

    async def PrefillSession(self, request_iterator: object, context: Any) -> None:  # type: ignore[override]
        hello = await context.read()
        await context.write(worker_pb2.PrefillSessionResponse(hello=self.info("prefill")))
        response = worker_pb2.PrefillSessionResponse
        session: Session[Any, Any] = Session(hello.hello.router_id, lambda _: response(status=STATUS))

        def handle(message: worker_pb2.PrefillSessionRequest) -> None:
            if message.HasField("run"):
                session.send(self._first_token(message.run.request))
                if message.run.HasField("grant"):
                    self._hand_over(message.run.grant)
            elif message.HasField("grant"):
                self._hand_over(message.grant)

        await session.run(context, handle)

    def _first_token(self, work: worker_pb2.WorkRequest) -> worker_pb2.PrefillSessionResponse:
        only = work.max_tokens == 1
        if not only:
            self._ungranted[work.request_id, work.attempt] = work
        first = worker_pb2.FirstToken(
            request_id=work.request_id,
            attempt=work.attempt,
            token_id=65,
            finish_reason=LENGTH if only else inference_pb2.FINISH_REASON_UNSPECIFIED,
        )
        return worker_pb2.PrefillSessionResponse(first_token=first)

    def _hand_over(self, grant: kv_transfer_pb2.Grant) -> None:
        key = grant.request_id, grant.attempt
        decode, work = self._granted.pop(key, None), self._ungranted.pop(key, None)
        if decode is not None and work is not None:
            decode.start(work)

    async def DecodeSession(self, request_iterator: object, context: Any) -> None:  # type: ignore[override]
        hello = await context.read()
        await context.write(worker_pb2.DecodeSessionResponse(hello=self.info("decode")))
        response = worker_pb2.DecodeSessionResponse
        session: Session[Any, Any] = Session(hello.hello.router_id, lambda _: response(status=STATUS))
        batch = DecodeBatch(session.send)

        def handle(message: worker_pb2.DecodeSessionRequest) -> None:
            if message.HasField("grant"):
                work = message.grant.request
                self._granted[work.request_id, work.attempt] = batch
                session.send(
                    response(
                        grant=kv_transfer_pb2.Grant(grant_id="a" * 32, request_id=work.request_id, attempt=work.attempt)
                    )
                )
            elif message.HasField("cancel"):
                batch.forget(message.cancel.request_id)

        steps = asyncio.create_task(batch.step_for_ever(self._step_s))
        try:
            await session.run(context, handle)
        finally:
            steps.cancel()


class DecodeBatch:
    """The sequences of one router: each gets a token a step, all of them in one message."""

    def __init__(self, send: Callable[[worker_pb2.DecodeSessionResponse], None]) -> None:
        self._send = send
        self._entries: dict[str, tuple[worker_pb2.SequenceTokens, int]] = {}  # next message, and tokens in all
        self._joined: list[worker_pb2.WorkRequest] = []

    def start(self, work: worker_pb2.WorkRequest) -> None:
        self._joined.append(work)

    def forget(self, request_id: str) -> None:
        self._entries.pop(request_id, None)

    async def step_for_ever(self, step_s: float) -> None:
        loop = asyncio.get_running_loop()
        next_at = loop.time()
        while True:
            next_at = max(next_at + step_s, loop.time())
            await asyncio.sleep(next_at - loop.time())
            joined, self._joined = self._joined, []
            for work in joined:
                done = worker_pb2.TransferDone(request_id=work.request_id, attempt=work.attempt, first_token_id=65)
                self._send(worker_pb2.DecodeSessionResponse(transfer_done=done))
                entry = worker_pb2.SequenceTokens(
                    request_id=work.request_id, attempt=work.attempt, index=1, token_ids=[66]
                )
                self._entries[work.request_id] = (entry, work.max_tokens)
            if self._entries:
                self._send(worker_pb2.DecodeSessionResponse(tokens=self._step()))

    def _step(self) -> worker_pb2.StepTokens:
        step, ended = worker_pb2.StepTokens(), []
        for request_id, (entry, max_tokens) in self._entries.items():
            if entry.index + 1 == max_tokens:
                entry.finish_reason = LENGTH
                ended.append(request_id)
            step.sequences.append(entry)
            entry.index += 1
        for request_id in ended:
            del self._entries[request_id]
        return step


def main(
    model: Annotated[str, typer.Option(help="Name of the model that it says it serves.")],
    step_s: Annotated[float, typer.Option(help="Seconds of a decode step.")],
    ready_file: Annotated[Path, typer.Option(help="Gets one JSON line once it serves.")],
) -> None:
    """Serve until SIGTERM."""
    run(_serve(FakeWorker(model, step_s), ready_file))


async def _serve(worker: FakeWorker, ready_file: Path) -> None:
    rpc = RpcServer("127.0.0.1", 0, [])
    worker_pb2_grpc.add_PrefillWorkerServicer_to_server(worker, rpc.server)
    worker_pb2_grpc.add_DecodeWorkerServicer_to_server(worker, rpc.server)
    worker.address = rpc.address
    await rpc.start()
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    report_ready(ready_file, {"address": rpc.address, "metrics_address": "", "boot_id": "", "pid": os.getpid()})
    await stopped.wait()
    await rpc.stop()


if __name__ == "__main__":
    typer.run(main)
