"""What is wrong with a worker, told from what it holds, or with a process that is down, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..proto import worker_pb2
from .absent import reason_of

if TYPE_CHECKING:  # Ray must not be imported before its environment is prepared
    from ..deploy.members import Member

OLD_S = 60.0  # for KV that waits to be fetched or to arrive, and for a sequence that waits for blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class Examination:
    """One worker's own word; `failure` says why it gave none."""

    name: str
    address: str
    failure: str = ""
    info: worker_pb2.WorkerInfo | None = None
    status: worker_pb2.WorkerStatus | None = None
    holdings: Sequence[worker_pb2.Holding] = ()
    num_cached_blocks: int = 0
    num_orphaned_blocks: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something wrong."""

    worker: str  # or router: the name of the process
    what: str
    do: str


def diagnose(worker: Examination) -> Iterator[Finding]:
    """Everything that is wrong with one worker; nothing for a sound one."""

    def found(what: str, do: str) -> Finding:
        return Finding(worker=worker.name, what=what, do=do)

    if worker.failure or worker.status is None:
        yield found(f"it does not answer: {worker.failure}", f"see its log; start it again at {worker.address}")
        return
    status = worker.status
    restart = f"`splitserve drain {worker.name}`, then restart it"
    if status.fault:
        yield found(f"it is out of service: {status.fault}", "repair that, then restart it")
    if status.stalled:
        yield found(
            "work is queued and no step ends", "it ends itself soon; its log has the stacks of its threads by then"
        )
    if worker.num_orphaned_blocks:
        yield found(f"{worker.num_orphaned_blocks} KV blocks belong to nobody", f"a bug: {restart}, and report it")
    unclaimed = [holding for holding in worker.holdings if not holding.request_id]
    if unclaimed:
        blocks = sum(holding.num_blocks for holding in unclaimed)
        yield found(
            f"{len(unclaimed)} sequences with {blocks} KV blocks are of no request: {_names(unclaimed)}",
            f"a bug if it is still so in a second: {restart}, and report it",
        )
    for state, what, do in (
        ("held", "prefilled KV waits to be fetched", "see the decode workers' logs; its lease frees it"),
        ("reserved", "granted blocks wait for KV", "see the prefill workers' logs and the link to them"),
        ("waiting", "sequences wait for KV blocks", "add workers, or raise engine.kv_memory"),
    ):
        old = [holding for holding in worker.holdings if holding.state == state and holding.age_s > OLD_S]
        if old:
            longest_s = max(holding.age_s for holding in old)
            yield found(f"{what}, {len(old)} of them for up to {longest_s:.0f} s: {_names(old)}", do)


def diagnose_stuck(member: Member) -> Finding:
    """What keeps a process down, as the controller tells."""
    name, reason = member.name, reason_of(member)
    if member.phase.value != "failed":
        return Finding(worker=name, what=f"it has no place: {reason}", do="it starts as soon as there is one")
    return Finding(
        worker=name,
        what=f"it failed and stays down: {reason}",
        do=f"see `splitserve logs {name}`; `splitserve up` with a corrected file starts it with that, "
        f"`splitserve restart {name}` as it is",
    )


def _names(holdings: Sequence[worker_pb2.Holding]) -> str:
    first = ", ".join(holding.sequence_id for holding in holdings[:3])
    return f"{first}, ..." if len(holdings) > 3 else first
