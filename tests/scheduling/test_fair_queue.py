"""Who is served next: priorities that age, weighted shares, order of arrival; nobody is lost, nobody starves."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from splitserve.scheduling.fair_queue import FairQueue, Ticket

AGEING_S = 10.0


class Line:
    """A queue of names, with tickets made as they come."""

    def __init__(self) -> None:
        self.queue: FairQueue[str] = FairQueue(AGEING_S)
        self.tickets: dict[str, Ticket] = {}

    def push(
        self, name: str, *, at: float = 0.0, cost: int = 10, tenant: str = "", weight: float = 1.0, priority: int = 0
    ) -> Ticket:
        ticket = self.tickets[name] = Ticket(
            order=len(self.tickets), arrived_at=at, cost=cost, tenant=tenant, weight=weight, priority=priority
        )
        self.queue.push(ticket, name)
        return ticket

    def pop_all(self) -> list[str]:
        return [self.queue.pop() for _ in range(len(self.queue))]


def test_one_tenant_is_served_in_order_of_arrival_and_a_retried_request_keeps_its_place() -> None:
    line = Line()
    for name in "abcd":
        line.push(name)
    assert [line.queue.pop(), line.queue.pop()] == ["a", "b"]
    line.queue.push(line.tickets["a"], "a")
    assert line.pop_all() == ["a", "c", "d"]


def test_a_higher_priority_goes_first_until_the_lower_has_waited_for_it() -> None:
    line = Line()
    line.push("low", at=0.0, priority=0)
    line.push("high", at=9.0, priority=1)
    line.push("late", at=11.0, priority=1)
    assert line.pop_all() == ["high", "low", "late"]


def test_a_flood_of_important_requests_does_not_starve_the_others() -> None:
    line, served = Line(), []
    line.push("patient", at=0.0)
    for second in range(70):  # twice what is served
        line.push(f"important {second}", at=float(second), priority=3)
        line.push(f"important too {second}", at=float(second), priority=3)
        served.append(line.queue.pop())
    assert "patient" in served
    assert served.index("patient") == pytest.approx(2 * 3 * AGEING_S, abs=2)


@pytest.mark.parametrize(("weight", "share"), [(1.0, 0.5), (3.0, 0.75)])
def test_tenants_share_by_tokens_and_weight(weight: float, share: float) -> None:
    """One sends many small requests, the other few large ones, and both have more than there is room for."""
    line = Line()
    for number in range(400):
        line.push(f"small {number}", cost=10, tenant="small", weight=weight)
    for number in range(40):
        line.push(f"large {number}", cost=100, tenant="large")
    had: Counter[str] = Counter()
    while had.total() < 2_000:
        name = line.queue.pop()
        had[name.split()[0]] += line.tickets[name].cost
    assert had["small"] / had.total() == pytest.approx(share, abs=0.06)


def test_who_comes_late_starts_level_and_has_no_claim_on_the_time_before() -> None:
    line = Line()
    for number in range(100):
        line.push(f"early {number}", tenant="early")
    for _ in range(50):
        line.queue.pop()
    for number in range(20):
        line.push(f"late {number}", tenant="late")
    first = [line.queue.pop().split()[0] for _ in range(20)]
    assert first.count("late") == pytest.approx(10, abs=1)


def test_nothing_is_kept_free_for_a_tenant_that_has_nothing_queued() -> None:
    line = Line()
    line.push("a", tenant="one", weight=0.001)
    line.push("b", tenant="one", weight=0.001)
    line.push("c", tenant="other", weight=1000.0)
    assert Counter(line.pop_all()) == Counter("abc")


def test_the_tokens_of_answers_count_too() -> None:
    line = Line()
    for number in range(20):
        line.push(f"talks {number}", tenant="talks")
        line.push(f"listens {number}", tenant="listens")
    had: Counter[str] = Counter()
    for _ in range(16):
        name = line.queue.pop()
        tenant = name.split()[0]
        had[tenant] += 1
        if tenant == "talks":
            line.queue.charge(line.tickets[name], 20)  # answers of twice its prompts
    assert had["listens"] / had["talks"] == pytest.approx(3, abs=0.5)


def test_who_leaves_unserved_costs_nobody_anything() -> None:
    line = Line()
    gone = line.push("gone", tenant="one", cost=1_000)
    line.push("a", tenant="one")
    line.push("b", tenant="two")
    assert line.queue.discard(gone)
    assert not line.queue.discard(gone)
    assert line.pop_all() == ["a", "b"]


def test_the_work_ahead_is_known_to_the_token_where_there_is_one_tenant() -> None:
    line = Line()
    line.push("a", cost=100)
    line.push("b", cost=30, priority=1)
    line.push("c", cost=7, priority=-1)
    probe = Ticket(order=99, arrived_at=5.0, cost=1)
    assert line.queue.cost_ahead(probe) == 130
    assert line.queue.cost_ahead(Ticket(order=99, arrived_at=50.0, cost=1)) == 137


def test_a_light_tenant_waits_for_its_share_and_not_for_the_others_backlog() -> None:
    line = Line()
    for number in range(50):
        line.push(f"heavy {number}", cost=100, tenant="heavy")
    line.queue.pop()
    assert line.queue.cost_ahead(Ticket(order=99, arrived_at=1.0, cost=10, tenant="heavy")) == 4_900
    assert line.queue.cost_ahead(Ticket(order=99, arrived_at=1.0, cost=10, tenant="light")) <= 100


requests = st.lists(
    st.tuples(st.integers(0, 2), st.sampled_from("abc"), st.integers(1, 50), st.floats(0.1, 10.0)), max_size=40
)


@given(requests, st.data())
def test_each_request_leaves_once_whatever_order_it_leaves_in(
    rows: list[tuple[int, str, int, float]], data: st.DataObject
) -> None:
    line, left = Line(), []
    for number, (priority, tenant, cost, weight) in enumerate(rows):
        line.push(str(number), at=float(number), priority=priority, tenant=tenant, cost=cost, weight=weight)
        if len(line.queue) and data.draw(st.booleans()):
            expected = line.queue.peek()
            left.append(line.queue.pop())
            assert left[-1] == expected
    gone = (
        data.draw(st.lists(st.sampled_from(sorted(set(line.tickets) - set(left))), unique=True))
        if (set(line.tickets) - set(left))
        else []
    )
    for name in gone:
        assert line.queue.discard(line.tickets[name])
    assert sorted(line.queue) == sorted(set(line.tickets) - set(left) - set(gone))
    left += line.pop_all()
    assert sorted(left + gone) == sorted(line.tickets)
    with pytest.raises(IndexError):
        line.queue.peek()


@given(requests.filter(bool))
def test_the_work_ahead_of_a_newcomer_is_what_is_served_before_it(rows: list[tuple[int, str, int, float]]) -> None:
    """With one weight and one priority the estimate is off by no more than a request of each tenant."""
    line = Line()
    for number, (_, tenant, cost, _) in enumerate(rows[:-1]):
        line.push(str(number), tenant=tenant, cost=cost)
    _, tenant, cost, _ = rows[-1]
    expected = line.queue.cost_ahead(Ticket(order=10**6, arrived_at=0.0, cost=cost, tenant=tenant))
    line.push("newcomer", tenant=tenant, cost=cost)
    ahead = 0
    while (name := line.queue.pop()) != "newcomer":
        ahead += line.tickets[name].cost
    assert abs(expected - ahead) <= 3 * 50


@given(
    st.lists(
        st.tuples(
            st.integers(0, 30),
            st.integers(1, 50),
            st.sampled_from("xyz"),
            st.sampled_from([0.5, 2.0]),
            st.integers(0, 2),
        ),
        max_size=30,
    ),
    st.integers(0, 10),
)
def test_the_order_that_is_told_is_the_order_of_serving(
    asked: list[tuple[int, int, str, float, int]], num_served: int
) -> None:
    line = Line()
    for number, (at, cost, tenant, weight, priority) in enumerate(sorted(asked)):
        line.push(str(number), at=at, cost=cost, tenant=tenant, weight=weight, priority=priority)
    for _ in range(min(num_served, len(line.queue))):
        line.queue.pop()
    assert list(line.queue.in_order()) == line.pop_all()


def test_whoever_is_served_out_of_turn_pays_for_it() -> None:
    line = Line()
    for name in ("x1", "x2", "y1", "y2"):
        line.push(name, tenant=name[0])
    line.queue.serve(line.tickets["x2"])
    assert line.pop_all() == ["y1", "x1", "y2"]
