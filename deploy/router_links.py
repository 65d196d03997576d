"""What the controller and the routers tell each other: the list of workers one way, how they fare the other."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping

import grpc.aio

from ..client.results import RouterStatus, status_from_proto
from ..core.errors import ConfigError, SplitserveError
from ..proto import inference_pb2, inference_pb2_grpc
from ..proto.tls import PeerRole, Tls, open_channel
from .admin_access import AdminAccess
from .load_signals import RouterCounts
from .members import Member

logger = logging.getLogger(__name__)

_TIMEOUT_S = 2.0


class RouterLinks:
    """One channel to each router; call `tell` after every change of the workers, and now and then."""

    def __init__(self, access: AdminAccess, tls: Tls | None = None) -> None:
        self._metadata = access.metadata
        self._tls = tls
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._told: dict[str, tuple[str, inference_pb2.SetWorkersRequest]] = {}  # router -> (its boot id, the list)
        self._views: dict[str, RouterStatus] = {}
        self._counts: dict[str, RouterCounts] = {}

    @property
    def views(self) -> tuple[RouterStatus, ...]:
        """The last answer of every router that answers."""
        return tuple(self._views.values())

    @property
    def counts(self) -> Mapping[str, RouterCounts]:
        """What every router that answers has counted, by name."""
        return {name: counts for name, counts in self._counts.items() if name in self._views}

    async def tell(self, members: Iterable[Member]) -> None:
        """Give every router the list of workers unless it has it, and ask it how it fares; all of them at once."""
        members = tuple(members)
        workers = _list_of_workers(members)
        routers = {m.name: m for m in members if m.role == "router" and m.endpoint is not None}
        for gone in self._views.keys() - routers.keys():
            del self._views[gone]
        for gone in self._told.keys() - routers.keys():
            del self._told[gone]
        await asyncio.gather(*(self._tell_one(router, workers) for router in routers.values()))

    def knows(self, members: Iterable[Member]) -> bool:
        """Whether every router serves, and is ready to use exactly the workers that serve; it does not use those that
        somebody drained, and knows them too.

        Raises: SplitserveError: a router refuses one of them.
        """
        members = tuple(members)
        addresses = {m.serving.address for m in members if m.role != "router" and m.serving}
        routers = [m.name for m in members if m.role == "router"]
        for view in self.views:
            for worker in view.workers:
                if worker.state == "refused" and worker.address in addresses:
                    raise SplitserveError(f"the router refuses the worker at {worker.address}: {worker.reason}")
        views = [self._views.get(name) for name in routers]
        return all(view and _ready(view) <= addresses <= _ready(view) | _in_state(view, "draining") for view in views)

    def use(self, worker: Member) -> bool:
        """Whether every router that answers is ready to use the worker."""
        address = worker.serving.address if worker.serving else ""
        return bool(self._views) and all(address in _ready(view) for view in self.views)

    async def close(self) -> None:
        await asyncio.gather(*(channel.close() for channel in self._channels.values()))

    async def _tell_one(self, router: Member, workers: inference_pb2.SetWorkersRequest) -> None:
        assert router.endpoint is not None
        address, boot_id = router.endpoint.address, router.endpoint.boot_id
        try:
            if address not in self._channels:
                self._channels[address] = open_channel(address, self._tls, PeerRole.ROUTER)
            stub = inference_pb2_grpc.RouterAdminStub(self._channels[address])
            if self._told.get(router.name) != (boot_id, workers):
                await stub.SetWorkers(workers, timeout=_TIMEOUT_S, metadata=self._metadata)
                self._told[router.name] = (boot_id, workers)
            request = inference_pb2.GetRouterStatusRequest()
            answer = await stub.GetRouterStatus(request, timeout=_TIMEOUT_S, metadata=self._metadata)
            self._views[router.name] = status_from_proto(answer)
            self._counts[router.name] = RouterCounts(
                boot_id=boot_id, counts=answer.traffic, num_queued=answer.num_queued
            )
        except grpc.aio.AioRpcError as error:
            logger.warning("%s does not answer: %s", router.name, error.details())
            if self._tls is not None:  # the next one reads renewed certificates
                await self._channels.pop(address).close()
            self._views.pop(router.name, None)
        except ConfigError as error:
            logger.error("%s cannot be asked: %s", router.name, error.message)
            self._views.pop(router.name, None)


def _list_of_workers(members: Iterable[Member]) -> inference_pb2.SetWorkersRequest:
    ready = [(m.role, m.serving.address) for m in members if m.serving is not None]
    return inference_pb2.SetWorkersRequest(
        prefill_addresses=[address for role, address in ready if role == "prefill"],
        decode_addresses=[address for role, address in ready if role in ("decode", "colocated")],
    )


def _ready(view: RouterStatus) -> set[str]:
    return _in_state(view, "ready")


def _in_state(view: RouterStatus, state: str) -> set[str]:
    return {worker.address for worker in view.workers if worker.state == state}
