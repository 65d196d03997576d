"""Skipping decode steps ahead ends exactly where taking them one by one does."""

from hypothesis import given
from hypothesis import strategies as st
from splitserve.scheduling.steps import StepScheduler

from .step_schedulers import BLOCK, make_request, make_scheduler

TOKEN = 1


class Replay:
    """One scheduler and when each of its sequences ended, counted in steps."""

    def __init__(self, scheduler: StepScheduler) -> None:
        self.scheduler = scheduler
        self.step = 0
        self.num_planned = 0
        self.ended: dict[str, int] = {}

    def one_step(self) -> bool:
        plan = self.scheduler.schedule()
        if plan is None:
            return False
        self.step += 1
        self.num_planned += 1
        for token in self.scheduler.commit({part.sequence.request_id: TOKEN for part in plan.parts if part.samples}):
            if token.finish_reason is not None:
                self.ended[token.sequence.request_id] = self.step
        return True

    def run(self, num_steps: int, *, skip: bool) -> None:
        last = self.step + num_steps
        while self.step < last:
            run = self.scheduler.steps_until_change() if skip else None
            if run is None:
                if not self.one_step():
                    self.step = last
                continue
            ahead = min(run.num_steps, last - self.step)
            self.step += ahead
            for sequence in self.scheduler.advance(ahead, TOKEN):
                self.ended[sequence.request_id] = self.step


def state(scheduler: StepScheduler) -> tuple[object, ...]:
    counts = scheduler.blocks.counts()
    return (
        (counts.free + counts.cached, counts.granted, counts.live),
        scheduler.num_running,
        scheduler.num_waiting,
        scheduler.num_preemptions,
        scheduler.cached_tokens,
        scheduler.outstanding_prefill_tokens,
        scheduler.num_orphaned_blocks(),
    )


arrivals = st.lists(
    st.tuples(st.integers(0, 30), st.integers(1, 90), st.integers(1, 60)), min_size=1, max_size=12
)  # steps since the one before, prompt, answer


@given(arrivals, st.integers(10, 40), st.booleans(), st.integers(1, 8))
def test_skipping_equals_stepping(
    arrivals: list[tuple[int, int, int]], num_blocks: int, prefix_cache: bool, max_running: int
) -> None:
    if prefix_cache:
        num_blocks += 200  # short of blocks, the order of evictions decides what a preempted sequence finds again
    replays = [Replay(make_scheduler(num_blocks, prefix_cache=prefix_cache, max_running=max_running)) for _ in range(2)]
    for number, (after, num_prompt, max_tokens) in enumerate(arrivals):
        for replay, skip in zip(replays, (False, True), strict=True):
            replay.run(after, skip=skip)
            replay.scheduler.add(make_request(str(number), num_prompt, max_tokens, seed=number))
        assert state(replays[0].scheduler) == state(replays[1].scheduler)
    for replay, skip in zip(replays, (False, True), strict=True):
        replay.run(3000, skip=skip)
    assert replays[0].ended == replays[1].ended
    assert len(replays[0].ended) == len(arrivals)
    assert state(replays[0].scheduler) == state(replays[1].scheduler)


def test_a_run_ends_with_the_first_answer_that_does() -> None:
    scheduler = make_scheduler(64, prefix_cache=False)
    scheduler.add(make_request("1", 20, 101, seed=1))
    scheduler.add(make_request("2", 30, 41, seed=2))
    replay = Replay(scheduler)
    assert scheduler.steps_until_change() is None  # both are waiting
    replay.one_step()
    run = scheduler.steps_until_change()
    assert run is not None
    assert (run.num_steps, run.batch, run.num_context_tokens) == (40, 2, 21 + 31)
    assert [sequence.request_id for sequence in scheduler.advance(40, TOKEN)] == ["2"]
    replay.run(1000, skip=True)
    assert (replay.num_planned, replay.ended) == (1, {"1": 61})


def test_a_run_ends_before_somebody_is_preempted() -> None:
    scheduler = make_scheduler(4, prefix_cache=False)
    for number in (1, 2):
        scheduler.add(make_request(str(number), 20, 100, seed=number))
    Replay(scheduler).one_step()
    run = scheduler.steps_until_change()
    assert run is not None
    assert run.num_steps == 2 * BLOCK - 20  # each has two blocks, and there are no more
    scheduler.advance(run.num_steps, TOKEN)
    assert scheduler.steps_until_change() is None
    plan = scheduler.schedule()
    assert plan is not None
    assert [sequence.request_id for sequence in plan.preempted] == ["2"]


def test_an_answer_that_may_stop_early_is_not_foreseen() -> None:
    scheduler = make_scheduler(64, prefix_cache=False)
    scheduler.add(make_request("1", 20, 10, stop_token_ids=frozenset({7})))
    Replay(scheduler).one_step()
    assert scheduler.steps_until_change() is None


def test_sequences_that_arrived_by_transfer_start_in_a_run() -> None:
    scheduler = make_scheduler(64, prefix_cache=False)
    scheduler.reserve(make_request("1", 20, 10), 16)
    assert scheduler.steps_until_change() is None
    scheduler.start_reserved("1", TOKEN)
    run = scheduler.steps_until_change()
    assert run is not None
    assert run.num_steps == 9
    assert [sequence.request_id for sequence in run.started] == ["1"]
    scheduler.advance(3, TOKEN)
    run = scheduler.steps_until_change()
    assert run is not None
    assert (run.num_steps, run.started, run.num_context_tokens) == (6, (), 24)
