"""The router's queue: priorities that age, and within a priority fair shares between tenants. Time is an argument."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Generic, TypeVar

T = TypeVar("T")

_MAX_REMEMBERED = 4_096  # tenants that have nothing queued; past it they all start level with the others again


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """A request's place in the queue; it keeps it when it comes back for another attempt."""

    order: int  # of arrival; unique
    arrived_at: float
    cost: int  # tokens to prefill: what a tenant's share is counted in
    tenant: str = ""
    weight: float = 1.0  # of the tenant
    priority: int = 0


@dataclass(frozen=True, slots=True)
class _Entry(Generic[T]):
    ticket: Ticket
    item: T


_order = attrgetter("ticket.order")


class _Line(Generic[T]):
    """What one tenant has queued at one priority, in order of arrival."""

    __slots__ = ("cost", "entries")

    def __init__(self) -> None:
        self.entries: list[_Entry[T]] = []
        self.cost = 0


class FairQueue(Generic[T]):
    """Items in the order in which they are to be served.

    Between priorities: one step of priority is worth `ageing_s` of waiting, so that nobody waits for ever behind others
    who are more important. Within a priority: the tenant who has had least for its weight (start-time fair queueing on
    tokens, work-conserving; a tenant that comes back after a pause starts level with the others, with no claim on what
    it did not use). Within a tenant: in order of arrival. It has no bound of its own: `Admission` keeps it.
    """

    def __init__(self, ageing_s: float) -> None:
        self._ageing_s = ageing_s
        self._lines: dict[int, dict[str, _Line[T]]] = {}  # by priority, then tenant; none is empty
        self._used: dict[str, float] = {}  # what each tenant has had, over its weight
        self._clock = 0.0  # `_used` of whoever was served last
        self._head: _Entry[T] | None = None  # None: not known
        self._num_queued = 0

    def __len__(self) -> int:
        return self._num_queued

    def __iter__(self) -> Iterator[T]:
        """In no order in particular."""
        for lines in self._lines.values():
            for line in lines.values():
                for entry in line.entries:
                    yield entry.item

    def push(self, ticket: Ticket, item: T) -> None:
        self._used[ticket.tenant] = self._used_by(ticket.tenant)
        tenants = self._lines.setdefault(ticket.priority, {})
        line = tenants.get(ticket.tenant)
        if line is None:
            line = tenants[ticket.tenant] = _Line()
        entries = line.entries
        if entries and entries[-1].ticket.order > ticket.order:
            entries.insert(bisect_left(entries, ticket.order, key=_order), _Entry(ticket, item))
        else:
            entries.append(_Entry(ticket, item))
        line.cost += ticket.cost
        self._num_queued += 1
        self._head = None

    def peek(self) -> T:
        """Who is served next. Raises: IndexError: the queue is empty."""
        return self._first().item

    def pop(self) -> T:
        """Take out who is served next, at its tenant's expense. Raises: IndexError: the queue is empty."""
        entry = self._first()
        self.serve(entry.ticket)
        return entry.item

    def in_order(self) -> Iterator[T]:
        """As `pop` would give them if nobody joined meanwhile; the queue must not change while this is read."""
        every = [line for tenants in self._lines.values() for line in tenants.values()]
        if len(every) == 1:
            yield from (entry.item for entry in every[0].entries)
            return
        used = dict(self._used)
        left = {priority: dict.fromkeys(tenants, 0) for priority, tenants in self._lines.items()}
        while left:
            heads = []
            for priority, places in left.items():
                lines = self._lines[priority]
                name = min(places, key=lambda name: (used[name], lines[name].entries[places[name]].ticket.order))
                heads.append((lines[name].entries[places[name]], priority, name))
            entry, priority, name = min(heads, key=lambda head: self._urgency(head[0]))
            yield entry.item
            used[name] += entry.ticket.cost / entry.ticket.weight
            left[priority][name] += 1
            if left[priority][name] == len(self._lines[priority][name].entries):
                del left[priority][name]
                if not left[priority]:
                    del left[priority]

    def serve(self, ticket: Ticket) -> None:
        """Take out somebody whose turn it need not be, at its tenant's expense."""
        used = self._used_by(ticket.tenant)
        self._clock = max(self._clock, used)
        self._used[ticket.tenant] = used + ticket.cost / ticket.weight
        self.discard(ticket)

    def discard(self, ticket: Ticket) -> bool:
        """Take out somebody who leaves unserved; False if it is not here."""
        tenants = self._lines.get(ticket.priority, {})
        line = tenants.get(ticket.tenant)
        if line is None:
            return False
        index = bisect_left(line.entries, ticket.order, key=_order)
        if index == len(line.entries) or line.entries[index].ticket.order != ticket.order:
            return False
        del line.entries[index]
        line.cost -= ticket.cost
        self._num_queued -= 1
        self._head = None
        if not line.entries:
            del tenants[ticket.tenant]
            if not tenants:
                del self._lines[ticket.priority]
            self._forget()
        return True

    def charge(self, ticket: Ticket, num_tokens: int) -> None:
        """A tenant has had more than its tickets said: the tokens of an answer, which nobody knows before.

        A negative number gives back what an attempt that was refused did not use.
        """
        if self._num_queued:  # otherwise nobody has less because of it
            self._used[ticket.tenant] = self._used_by(ticket.tenant) + num_tokens / ticket.weight
            self._head = None

    def cost_ahead(self, ticket: Ticket) -> float:
        """Tokens that will be served before a request that joins now, as things stand."""
        ahead = 0.0
        for priority, tenants in self._lines.items():
            if priority == ticket.priority:
                ahead += self._cost_of_fair_shares(tenants, ticket)
            elif priority > ticket.priority:
                ahead += sum(line.cost for line in tenants.values())
            else:  # only those who have waited long enough to be as important
                before = ticket.arrived_at - (ticket.priority - priority) * self._ageing_s
                ahead += sum(
                    entry.ticket.cost
                    for line in tenants.values()
                    for entry in line.entries
                    if entry.ticket.arrived_at <= before
                )
        return ahead

    def _cost_of_fair_shares(self, tenants: dict[str, _Line[T]], ticket: Ticket) -> float:
        """Its own tenant's line, and what the others get until that has been served."""
        own = tenants.get(ticket.tenant)
        own_cost = own.cost if own is not None else 0
        turn = self._used_by(ticket.tenant) + own_cost / ticket.weight
        others = 0.0
        for tenant, line in tenants.items():
            if tenant != ticket.tenant:
                share = (turn - self._used_by(tenant)) * line.entries[0].ticket.weight
                others += min(line.cost, max(0.0, share))
        return own_cost + others

    def _used_by(self, tenant: str) -> float:
        """What a tenant has had; who has nothing queued starts no lower than those who are being served."""
        used = self._used.get(tenant, self._clock)
        if used < self._clock and not any(tenant in tenants for tenants in self._lines.values()):
            return self._clock
        return used

    def _urgency(self, entry: _Entry[T]) -> tuple[float, int]:
        return entry.ticket.arrived_at - entry.ticket.priority * self._ageing_s, entry.ticket.order

    def _first(self) -> _Entry[T]:
        if self._head is None:
            if not self._num_queued:
                raise IndexError("the queue is empty")
            self._head = min(
                (self._first_of(tenants) for tenants in self._lines.values()),
                key=self._urgency,
            )
        return self._head

    def _first_of(self, tenants: dict[str, _Line[T]]) -> _Entry[T]:
        if len(tenants) == 1:
            return next(iter(tenants.values())).entries[0]
        used = self._used
        tenant = min(tenants, key=lambda name: (used[name], tenants[name].entries[0].ticket.order))
        return tenants[tenant].entries[0]

    def _forget(self) -> None:
        """Shares are of what is scarce: once nobody waits, or of too many, there is nothing to remember."""
        if not self._num_queued:
            self._used.clear()
            self._clock = 0.0
        elif len(self._used) > _MAX_REMEMBERED + self._num_queued:
            queued = {tenant for tenants in self._lines.values() for tenant in tenants}
            self._used = {tenant: used for tenant, used in self._used.items() if tenant in queued}
