"""The prefill worker's gRPC edge."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import grpc.aio

from ..core.errors import SplitserveError
from ..kv_transfer.grants import Grant
from ..kv_transfer.ranks import share_id
from ..proto import kv_transfer_pb2, worker_pb2, worker_pb2_grpc
from ..worker.edge import open_session, sequence_from_proto, sequence_id
from ..worker.host import WorkerHost
from ..worker.options import WorkerOptions
from .worker import PrefillWorker, RouterSession


class PrefillServer(worker_pb2_grpc.PrefillWorkerServicer):
    """Turns messages into calls of PrefillWorker."""

    def __init__(self, options: WorkerOptions, host: WorkerHost | None = None) -> None:
        self.worker = PrefillWorker(options, host)
        worker_pb2_grpc.add_PrefillWorkerServicer_to_server(self, self.worker.host.mount)  # type: ignore[arg-type]

    async def PrefillSession(self, request_iterator: object, context: grpc.aio.ServicerContext[Any, Any]) -> None:  # type: ignore[override]
        host = self.worker.host
        session: RouterSession = await open_session(
            context,
            host,
            hello=worker_pb2.PrefillSessionResponse(hello=host.info()),
            status=lambda session: worker_pb2.PrefillSessionResponse(status=host.status(session)),
        )
        try:
            await session.run(context, lambda message: self._handle(session, message))
        finally:
            host.session_ended(session)
            self.worker.session_ended(session)

    def _handle(self, session: RouterSession, message: worker_pb2.PrefillSessionRequest) -> None:
        match message.WhichOneof("message"):
            case "run":
                self._run(session, message.run)
            case "grant":
                self._grant(session, message.grant)
            case "cancel":
                self.worker.cancel(session, message.cancel.request_id, message.cancel.attempt)
            case "restart_prefix_blocks":
                self.worker.host.restart_prefixes(session)
            case _:  # a message of a newer minor version: safe to ignore
                self.worker.host.metrics.stale_messages.inc()

    def _run(self, session: RouterSession, run: worker_pb2.RunPrefill) -> None:
        try:
            request = sequence_from_proto(run.request)
            grants = _grants(request.request_id, run.grant) if run.HasField("grant") else None
        except SplitserveError as error:
            self.worker.refuse(session, run.request.request_id, run.request.attempt, error)
            return
        self.worker.run(session, run.request.request_id, request, grants)

    def _grant(self, session: RouterSession, grant: kv_transfer_pb2.Grant) -> None:
        sequence = sequence_id(grant.request_id, grant.attempt)
        self.worker.grant(session, sequence, _grants(sequence, grant))


def _grants(sequence: str, told: kv_transfer_pb2.Grant) -> list[Grant]:
    """One for each pair of ranks, named by `share_id` of the sequence id."""
    grants = [Grant.from_proto(grant) for grant in (told, *told.shares)]
    return [replace(grant, request_id=share_id(sequence, grant.decode_rank)) for grant in grants]
