"""The workers that the router knows, and which of them go together."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import TypeVar

from ..core.metrics import RouterMetrics
from ..proto import worker_pb2
from ..proto.tls import Tls
from ..scheduling.admission import ModelLimits
from ..scheduling.decode_pace import DecodePace
from .decode_link import DecodeLink
from .departed import Departed, DepartedWorker
from .prefill_link import PrefillLink
from .session import WorkerEvents, WorkerKind, WorkerLink

logger = logging.getLogger(__name__)

L = TypeVar("L", bound=WorkerLink)


class WorkerPool:
    """Every worker on the list, and whether they go together.

    All serve one model by name. Those of one group (scheduling/pairing.py) make pairs; two groups may serve at once.

    Args: tpot_target_s: no decode worker gets sequences beyond those that it gives a token in this time; None: any.
    """

    def __init__(
        self,
        model: str,
        router_id: str,
        metrics: RouterMetrics,
        *,
        tpot_target_s: float | None = None,
        tls: Tls | None = None,
    ) -> None:
        self._model = model
        self._tpot_target_s = tpot_target_s
        self._router_id = router_id
        self._metrics = metrics
        self._tls = tls
        self._departed = Departed()
        self._listed: dict[WorkerKind, tuple[str, ...]] = {"prefill": (), "decode": ()}
        self._roles: dict[str, WorkerKind] = {}  # of workers, by address, that were found to have another than listed
        self.prefills: dict[str, PrefillLink] = {}
        self.decodes: dict[str, DecodeLink] = {}
        self.limits: ModelLimits | None = None  # what the workers can do; None until the first one said hello
        self.usable = False  # somebody can serve a request, now or when it is less busy
        self.usable_changed = asyncio.Event()  # for the one task that tells health watchers, which clears it
        self.ready_weights: frozenset[str] = frozenset()  # of the groups that can serve a request
        self.known = asyncio.Event()  # `limits` is set

    def __iter__(self) -> Iterator[WorkerLink]:
        yield from self.prefills.values()
        yield from self.decodes.values()

    @property
    def boot_ids(self) -> set[str]:
        """Of all workers that are there."""
        return {link.boot_id for link in self if link.info is not None}

    def departed(self) -> Sequence[DepartedWorker]:
        """Workers that died and were then taken off the list."""
        return self._departed.shown(
            addresses={link.address for link in self},
            worker_ids={link.last_worker_id for link in self},
            now=time.monotonic(),
        )

    @property
    def any_prefill_alive(self) -> bool:
        return any(link.state == "ready" for link in self.prefills.values())

    @property
    def kv_bytes_per_token(self) -> int:
        """Of the whole model; 0 while no worker has told."""
        infos = (link.info for link in self if link.info is not None)
        return max((info.kv_bytes_per_token * max(1, info.tensor_parallel) for info in infos), default=0)

    def set_workers(self, prefill: Collection[str], decode: Collection[str], events: WorkerEvents) -> None:
        """Replace the list. Workers already known keep their sessions; those gone finish what they run.

        The list in which a worker stands is where it is looked for first. Its own word counts: it may have changed its
        role since.
        """
        self._listed = {"prefill": tuple(prefill), "decode": tuple(decode)}
        self._roles = {at: role for at, role in self._roles.items() if at in (*prefill, *decode)}
        self._look_for(events)

    def _look_for(self, events: WorkerEvents) -> None:
        def switched(link: WorkerLink) -> None:
            logger.info("the %s worker at %s has the other role now", link.role, link.address)
            self._roles[link.address] = "decode" if link.role == "prefill" else "prefill"
            self._look_for(events)

        listed = [(at, role) for role, addresses in self._listed.items() for at in addresses]
        wanted: dict[WorkerKind, list[str]] = {"prefill": [], "decode": []}
        for address, role in listed:
            wanted[self._roles.get(address, role)].append(address)
        self._replace(self.prefills, wanted["prefill"], lambda at: self._prefill_link(at, events), switched)
        self._replace(self.decodes, wanted["decode"], lambda at: self._decode_link(at, events), switched)
        events.workers_changed()

    def refresh(self) -> None:
        """Look again at who goes with whom; called whenever a worker came, went or reported."""
        for link in self:
            link.reconsider()
        ready_prefills = sum(link.state == "ready" for link in self.prefills.values())
        ready_decodes = [link for link in self.decodes.values() if link.state == "ready"]
        assumed = _mean_speed(self.prefills.values())
        for prefill in self.prefills.values():
            prefill.assumed_prefill_tokens_per_s = assumed
        assumed = assumed or _mean_speed(self.decodes.values())
        for decode in self.decodes.values():
            decode.assumed_prefill_tokens_per_s = assumed
        self._metrics.workers.labels("prefill").set(ready_prefills)
        self._metrics.workers.labels("decode").set(len(ready_decodes))
        prefill_groups = {link.group for link in self.prefills.values() if link.state == "ready"}
        decode_groups = {link.group for link in ready_decodes}
        for link in self:
            others = decode_groups if link.role == "prefill" else prefill_groups
            if link.state == "ready" and others and link.group not in others and link.shown_role != "colocated":
                link.reason = f"no worker of the other role has its model revision and protocol ({link.group})"
        serving = (prefill_groups & decode_groups) | {link.group for link in ready_decodes if link.colocated}
        self.ready_weights = frozenset(group.weights for group in serving if group is not None)
        usable = bool(serving)
        infos = [link.info for link in self if link.info is not None and link.state != "refused"]
        if infos:
            self.limits = ModelLimits(
                max_model_len=min(info.max_model_len for info in infos),
                vocab_size=min(info.vocab_size for info in infos),
                eos_token_ids=frozenset(infos[0].eos_token_ids),
            )
            self.known.set()
        if usable != self.usable:
            self.usable = usable
            self.usable_changed.set()

    def _prefill_link(self, address: str, events: WorkerEvents) -> PrefillLink:
        return PrefillLink(address, self._router_id, events, self._judge, self._tls)

    def _decode_link(self, address: str, events: WorkerEvents) -> DecodeLink:
        return DecodeLink(
            address, self._router_id, events, self._judge, self._tls, pace=DecodePace(self._tpot_target_s)
        )

    async def close(self) -> None:
        """End every session."""
        links = list(self)
        for link in links:
            link.stop()
        await asyncio.gather(*(link.join() for link in links))

    def _replace(
        self,
        known: dict[str, L],
        wanted: Collection[str],
        make: Callable[[str], L],
        switched: Callable[[WorkerLink], object],
    ) -> None:
        for address in wanted:
            link = known.get(address)
            if link is not None and not link.stopping:
                link.retired = False
            else:
                known[address] = make(address)
                known[address].start(lambda gone: self._gone(known, gone), switched)
        for address, link in known.items():
            if address not in wanted:
                if link.info is None and link.last_worker_id and not (link.retired or link.status.draining):
                    self._departed.add(
                        address=address,
                        role=link.shown_role,
                        worker_id=link.last_worker_id,
                        reason=link.reason,
                        now=time.monotonic(),
                    )
                link.retire()

    @staticmethod
    def _gone(known: dict[str, L], link: WorkerLink) -> None:
        if known.get(link.address) is link:
            del known[link.address]

    def _judge(self, link: WorkerLink) -> str:
        """Why the worker cannot be used; "" if it can."""
        info = link.info
        assert info is not None
        if link.status.fault:
            return f"it is out of service: {link.status.fault}"
        if (info.role == worker_pb2.ROLE_PREFILL) != (link.role == "prefill"):
            known = {number: name[5:].lower() for name, number in worker_pb2.Role.items()}
            role = known.get(info.role, f"role {info.role}")  # a peer may send any number
            return f"it is listed as a {link.role} worker, but is a {role} worker"
        if info.model != self._model:
            return f"it serves model {info.model!r}, this router serves {self._model!r}; start both with the same one"
        return ""


def _mean_speed(links: Iterable[WorkerLink]) -> float:
    """Prompt tokens a second of those that have measured it; 0: nobody has."""
    known = [speed for link in links if (speed := link.status.prefill_tokens_per_s) > 0]
    return sum(known) / len(known) if known else 0.0
