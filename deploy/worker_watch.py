"""Asks every worker how it fares: one that hangs, stands still or is broken is found, whatever its process says."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping

import grpc
import grpc.aio

from ..core.config import WorkerRole
from ..core.errors import ConfigError
from ..proto import worker_pb2, worker_pb2_grpc
from ..proto.tls import PeerRole, Tls, open_channel
from .members import Member

logger = logging.getLogger(__name__)

_TIMEOUT_S = 2.0
_ROLES: Mapping[int, WorkerRole] = {worker_pb2.ROLE_PREFILL: "prefill", worker_pb2.ROLE_DECODE: "decode"}
_SILENT = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


class WorkerWatch:
    """Call `look` about once a second."""

    def __init__(self, tls: Tls | None = None) -> None:
        self._tls = tls
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._silent_since: dict[str, float] = {}  # address -> when it was first not heard
        self._statuses: dict[str, worker_pb2.GetWorkerStatusResponse] = {}
        self.roles: dict[str, WorkerRole] = {}  # that workers said they have, at the last look, by address

    @property
    def statuses(self) -> Mapping[str, worker_pb2.GetWorkerStatusResponse]:
        """The last word of every worker, by its address."""
        return self._statuses

    async def look(
        self, members: Iterable[Member], unhealthy_s: float, *, hears_routers: bool = True
    ) -> Mapping[str, str]:
        """Ask all of them at once; returns why some of them must be replaced, by name.

        A worker that is not heard for `unhealthy_s` hangs; its death would be seen by its actor. Where no router is
        heard either, it is our own certificate that nobody takes any more.
        """
        workers = [m for m in members if m.role != "router" and m.serving is not None]
        addresses = {m.serving.address for m in workers if m.serving}
        for gone in self._channels.keys() - addresses:
            await self._channels.pop(gone).close()
        for known in (self._silent_since, self._statuses):  # of some there is no channel any more
            for gone in known.keys() - addresses:
                del known[gone]
        self.roles = {}
        found = await asyncio.gather(*(self._ask(address, unhealthy_s) for address in addresses))
        problems = dict(zip(addresses, found, strict=True))
        if self._tls is not None and not hears_routers and addresses == self._silent_since.keys():
            if any(found):
                logger.error("nobody can be heard: check that the operator's certificate is valid; nothing is replaced")
            return {}
        return {m.name: problems[m.serving.address] for m in workers if m.serving and problems[m.serving.address]}

    async def close(self) -> None:
        await asyncio.gather(*(channel.close() for channel in self._channels.values()))

    async def _ask(self, address: str, unhealthy_s: float) -> str:
        """What is wrong with it; "" if nothing is."""
        try:
            if address not in self._channels:
                self._channels[address] = open_channel(address, self._tls, PeerRole.WORKER)
        except ConfigError as error:  # our certificate, which says nothing of the worker
            logger.error("the worker at %s cannot be asked: %s", address, error.message)
            self._silent_since.pop(address, None)
            return ""
        stub = worker_pb2_grpc.WorkerAdminStub(self._channels[address])
        asked_at = time.monotonic()
        try:
            answer = await stub.GetWorkerStatus(worker_pb2.GetWorkerStatusRequest(), timeout=_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            if self._tls is not None:  # the next one reads renewed certificates
                await self._channels.pop(address).close()
            if error.code() not in _SILENT:  # it lives, and says so
                self._silent_since.pop(address, None)
                return ""
            silent_s = time.monotonic() - self._silent_since.setdefault(address, asked_at)
            return f"it did not answer for {silent_s:.0f} s" if silent_s >= unhealthy_s else ""
        self._silent_since.pop(address, None)
        self._statuses[address], status = answer, answer.status
        if answer.info.role in _ROLES:
            self.roles[address] = _ROLES[answer.info.role]
        if status.stalled:
            return "it has work and makes no progress"
        return f"it is out of service: {status.fault}" if status.fault else ""
