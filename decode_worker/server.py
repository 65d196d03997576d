"""The decode worker's gRPC edge."""

from __future__ import annotations

from typing import Any

import grpc.aio

from ..core.errors import SplitserveError
from ..kv_transfer.ranges import known_dtype
from ..kv_transfer.ranks import Endpoint
from ..proto import worker_pb2, worker_pb2_grpc
from ..worker.edge import open_session, sequence_from_proto
from ..worker.host import WorkerHost
from ..worker.options import WorkerOptions
from .worker import DecodeWorker, RouterSession


class DecodeServer(worker_pb2_grpc.DecodeWorkerServicer):
    """Turns messages into calls of DecodeWorker."""

    def __init__(self, options: WorkerOptions, host: WorkerHost | None = None) -> None:
        self.worker = DecodeWorker(options, host)
        worker_pb2_grpc.add_DecodeWorkerServicer_to_server(self, self.worker.host.mount)  # type: ignore[arg-type]

    async def DecodeSession(self, request_iterator: object, context: grpc.aio.ServicerContext[Any, Any]) -> None:  # type: ignore[override]
        host = self.worker.host
        session: RouterSession = await open_session(
            context,
            host,
            hello=worker_pb2.DecodeSessionResponse(hello=host.info()),
            status=lambda session: worker_pb2.DecodeSessionResponse(status=host.status(session)),
        )
        try:
            await session.run(context, lambda message: self._handle(session, message), self._pause)
        finally:
            host.session_ended(session)
            self.worker.session_ended(session)

    async def _pause(self, message: worker_pb2.DecodeSessionRequest) -> None:
        """Whoever can wait does so until the step's tokens are out."""
        if message.HasField("grant") and message.grant.can_wait:
            await self.worker.host.quiet.wait()

    def _handle(self, session: RouterSession, message: worker_pb2.DecodeSessionRequest) -> None:
        match message.WhichOneof("message"):
            case "grant":
                self._grant(session, message.grant)
            case "run":
                self._run(session, message.run.request)
            case "cancel":
                self.worker.cancel(session, message.cancel.request_id, message.cancel.attempt)
            case "restart_prefix_blocks":
                self.worker.host.restart_prefixes(session)
            case _:  # a message of a newer minor version: safe to ignore
                self.worker.host.metrics.stale_messages.inc()

    def _grant(self, session: RouterSession, message: worker_pb2.RequestGrant) -> None:
        work = message.request
        try:
            request = sequence_from_proto(work)
            addresses = (message.kv_address, *message.kv_rank_addresses)
            source = Endpoint(
                addresses=addresses,
                boot_ids=(message.prefill_boot_id,) * len(addresses),
                dtype=known_dtype(message.prefill_kv_dtype) if message.prefill_kv_dtype else None,
            )
        except SplitserveError as error:
            self.worker.refuse(session, work.request_id, work.attempt, error)
            return
        self.worker.grant(session, work.request_id, request, source)

    def _run(self, session: RouterSession, work: worker_pb2.WorkRequest) -> None:
        try:
            request = sequence_from_proto(work)
        except SplitserveError as error:
            self.worker.refuse(session, work.request_id, work.attempt, error)
            return
        self.worker.run_local(session, work.request_id, request)
