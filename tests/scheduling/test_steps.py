"""The step scheduler: order, chunks, preemption, reservations; and no block is ever lost whatever happens."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule
from splitserve.core.errors import InvalidRequest, Overloaded
from splitserve.core.logprobs import TokenLogprob
from splitserve.core.request import FinishReason, Request
from splitserve.scheduling.blocks import BlockAllocator
from splitserve.scheduling.sequence import PENDING, SequenceState
from splitserve.scheduling.step_plan import SampledToken, StepPlan
from splitserve.scheduling.steps import StepScheduler

BLOCK = 16
END = 7  # the stop token


def make_scheduler(num_blocks: int = 64, *, prefix_cache: bool = True, **limits: int) -> StepScheduler:
    return StepScheduler(
        BlockAllocator(num_blocks, BLOCK, prefix_cache=prefix_cache),
        model_id="m",
        kv_dtype="float32",
        **{"max_running": 8, "max_waiting": 16, "max_step_tokens": 64, **limits},
    )


def make_request(request_id: str, num_prompt: int = 20, max_tokens: int = 8, seed: int = 0, **more: object) -> Request:
    prompt = tuple(1000 + seed * 10_000 + i for i in range(num_prompt))
    return Request(request_id=request_id, prompt_token_ids=prompt, max_tokens=max_tokens, **more)  # type: ignore[arg-type]


def run_step(scheduler: StepScheduler, token_id: int = 1) -> tuple[StepPlan | None, list[SampledToken]]:
    plan = scheduler.schedule()
    if plan is None:
        return None, []
    return plan, scheduler.commit({part.sequence.request_id: token_id for part in plan.parts if part.samples})


def run_all(scheduler: StepScheduler, max_steps: int = 2000) -> dict[str, list[int]]:
    """Indices of the tokens of each request, in order."""
    indices: dict[str, list[int]] = {}
    for _ in range(max_steps):
        plan, tokens = run_step(scheduler)
        if plan is None:
            return indices
        for token in tokens:
            indices.setdefault(token.sequence.request_id, []).append(token.index)
    raise AssertionError("the scheduler never ran out of work")


def assert_conserved(scheduler: StepScheduler) -> None:
    counts = scheduler.blocks.counts()
    assert counts.free + counts.cached + counts.granted + counts.live == counts.total
    assert scheduler.num_orphaned_blocks() == 0


def test_a_long_prompt_is_prefilled_in_chunks_of_the_budget() -> None:
    scheduler = make_scheduler(max_step_tokens=24)
    scheduler.add(make_request("a", 60))
    chunks = []
    for _ in range(3):
        plan, _ = run_step(scheduler)
        assert plan is not None
        chunks.append((plan.parts[0].start, plan.parts[0].end))
    assert chunks == [(0, 24), (24, 48), (48, 60)]


def test_the_last_token_of_a_prompt_is_prefill_and_one_of_a_recompute_is_a_decode() -> None:
    scheduler = make_scheduler(max_step_tokens=24, prefix_cache=False)
    scheduler.add(make_request("a", 25))

    def tokens_of_step() -> tuple[int, int]:
        plan, _ = run_step(scheduler)
        assert plan is not None
        return plan.num_prefill_tokens, plan.num_decode_tokens

    assert [tokens_of_step() for _ in range(3)] == [(24, 0), (1, 0), (0, 1)]
    scheduler._preempt(scheduler.get("a"))  # with 27 tokens
    assert [tokens_of_step() for _ in range(3)] == [(24, 0), (3, 0), (0, 1)]
    scheduler.release("a")
    scheduler.add(make_request("b", 24))
    run_step(scheduler)
    scheduler._preempt(scheduler.get("b"))  # with 25 tokens, of which it sampled the newest
    assert [tokens_of_step() for _ in range(2)] == [(24, 0), (0, 1)]


def test_the_last_token_of_a_prompt_counts_against_the_budget() -> None:
    scheduler = make_scheduler(max_step_tokens=24, prefix_cache=False)
    scheduler.add(make_request("a", 49, seed=1))
    scheduler.add(make_request("b", 25, seed=2))
    steps = []
    for _ in range(4):
        plan, _ = run_step(scheduler)
        assert plan is not None
        assert plan.num_prefill_tokens <= 24
        steps.append([(part.sequence.request_id, part.num_tokens) for part in plan.parts])
    assert steps == [[("a", 24)], [("a", 24)], [("a", 1), ("b", 23)], [("a", 1), ("b", 2)]]


def test_no_prompt_joins_a_step_that_is_busy_enough() -> None:
    scheduler = make_scheduler(max_step_tokens=64, max_packed_tokens=20)
    for seed, (name, length) in enumerate([("a", 10), ("b", 15), ("c", 12), ("long", 50), ("d", 4)]):
        scheduler.add(make_request(name, length, max_tokens=1, seed=seed))
    steps = []
    for _ in range(3):
        plan, _ = run_step(scheduler)
        assert plan is not None
        steps.append([part.sequence.request_id for part in plan.parts])
    assert steps == [["a", "b"], ["c", "long"], ["d"]]


def test_a_step_that_is_never_busy_enough_still_ends_at_its_budget() -> None:
    scheduler = make_scheduler(max_step_tokens=24, max_packed_tokens=512)
    for seed, length in enumerate((10, 14, 12)):
        scheduler.add(make_request(str(seed), length, seed=seed))
    plan, _ = run_step(scheduler)
    assert plan is not None
    assert [part.num_tokens for part in plan.parts] == [10, 14]


def test_decodes_go_on_beside_a_prefill_and_do_not_use_its_budget() -> None:
    scheduler = make_scheduler(max_step_tokens=32)
    scheduler.add(make_request("a", 20, seed=1))
    run_step(scheduler)
    scheduler.add(make_request("b", 40, seed=2))
    plan, tokens = run_step(scheduler)
    assert plan is not None
    assert (plan.num_decode_tokens, plan.num_prefill_tokens) == (1, 32)
    assert [token.sequence.request_id for token in tokens] == ["a"]


def plan_ahead(scheduler: StepScheduler) -> tuple[StepPlan, StepPlan | None]:
    """One step that runs and the one planned behind it."""
    first = scheduler.schedule()
    assert first is not None
    return first, scheduler.schedule()


def test_a_step_planned_ahead_decodes_the_token_that_is_not_known_yet() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 20))
    first, second = plan_ahead(scheduler)
    assert second is not None
    assert (second.parts[0].start, second.parts[0].end, second.parts[0].index) == (20, 21, 1)
    assert second.parts[0].sequence.token_ids[20:] == [PENDING, PENDING]
    assert [(t.index, t.token_id) for t in scheduler.commit({"a": 5})] == [(0, 5)]
    assert [(t.index, t.token_id) for t in scheduler.commit({"a": 6})] == [(1, 6)]
    assert first.parts[0].sequence.token_ids[20:] == [5, 6]


def test_what_was_computed_past_a_stop_token_is_dropped_and_its_blocks_wait_for_the_step() -> None:
    scheduler = make_scheduler(prefix_cache=False)
    scheduler.add(make_request("a", 20, stop_token_ids=frozenset({END})))
    plan_ahead(scheduler)
    (last,) = scheduler.commit({"a": END})
    assert last.finish_reason is FinishReason.STOP
    assert scheduler.blocks.counts().live > 0  # the second step still writes there
    assert scheduler.schedule() is None
    assert scheduler.commit({"a": 1}) == []
    assert scheduler.blocks.counts().live == 0
    assert not scheduler.has_work


def test_no_step_is_planned_past_the_last_token() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 20, max_tokens=1))
    scheduler.add(make_request("b", 20, seed=1), prefill_only=True)
    first, second = plan_ahead(scheduler)
    assert len(first.parts) == 2
    assert second is None


def test_nobody_is_preempted_while_a_step_runs() -> None:
    scheduler = make_scheduler(4, prefix_cache=False)
    scheduler.add(make_request("a", 30, seed=1, max_tokens=30))
    scheduler.add(make_request("b", 30, seed=2, max_tokens=30))
    for _ in range(2):
        run_step(scheduler)  # 31 tokens of KV each: the next token but one needs a block
    first, second = plan_ahead(scheduler)
    assert len(first.parts) == 2
    assert second is None
    scheduler.commit({"a": 1, "b": 1})
    after = scheduler.schedule()
    assert after is not None
    assert [sequence.request_id for sequence in after.preempted] == ["b"]


def test_a_step_tells_each_prompt_token_once_and_few_at_a_time() -> None:
    """Rows of logits are as long as the vocabulary, so a step has room for 256 of prompt tokens, over all sequences."""
    scheduler = make_scheduler(num_blocks=256, max_step_tokens=600)
    for number in range(3):
        scheduler.add(make_request(str(number), 300, seed=number, prompt_logprobs=0))
    scheduler.add(make_request("plain", 40, seed=4))
    targets: dict[str, list[int]] = {}
    for _ in range(6):
        plan = scheduler.schedule()
        assert plan is not None
        assert sum(len(part.prompt_targets) for part in plan.parts) <= 256
        sampled = {}
        for part in plan.parts:
            told = targets.setdefault(part.sequence.request_id, [])
            told += part.prompt_targets
            entries = [TokenLogprob(token_id=1, logprob=-1.0, rank=1) for _ in part.prompt_targets]
            part.sequence.prompt_logprobs += entries
            if part.samples:
                sampled[part.sequence.request_id] = 1
        scheduler.commit(sampled)
    assert targets == {**{str(number): list(range(1, 300)) for number in range(3)}, "plain": []}


def test_prompt_logprobs_are_computed_although_the_cache_holds_the_prompt() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 40))
    run_all(scheduler)
    scheduler.add(make_request("b", 40, prompt_logprobs=1))
    plan = scheduler.schedule()
    assert plan is not None
    assert [(part.start, part.end) for part in plan.parts] == [(0, 40)]
    assert plan.parts[0].prompt_targets == range(1, 40)
    assert_conserved(scheduler)


def test_a_sequence_without_its_token_is_forgotten_and_the_others_go_on() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a"))
    scheduler.add(make_request("b", seed=1))
    scheduler.schedule()
    assert [token.sequence.request_id for token in scheduler.commit({"b": 1})] == ["b"]
    assert not scheduler.release("a")
    assert_conserved(scheduler)
    assert run_all(scheduler) == {"b": list(range(1, 8))}
    assert scheduler.blocks.counts().live == 0


def test_higher_priority_is_prefilled_first_and_equals_in_order_of_arrival() -> None:
    scheduler = make_scheduler(max_running=1)
    for name, priority in (("a", 0), ("b", 0), ("c", 5)):
        scheduler.add(make_request(name, max_tokens=1, priority=priority, seed=ord(name)))
    order = [run_step(scheduler)[1][0].sequence.request_id for _ in range(3)]
    assert order == ["c", "a", "b"]


def test_who_came_to_its_router_first_is_prefilled_first_whichever_router_brings_it_sooner() -> None:
    scheduler = make_scheduler(max_running=1)
    for name, arrived_at in (("c", 3.0), ("a", 1.0), ("d", 3.0), ("b", 2.0)):
        scheduler.add(make_request(name, max_tokens=1, seed=ord(name)), arrived_at=arrived_at)
    order = [run_step(scheduler)[1][0].sequence.request_id for _ in range(4)]
    assert order == ["a", "b", "c", "d"]


def test_stop_tokens_and_max_tokens_end_a_request() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", stop_token_ids=frozenset({END})))
    assert run_step(scheduler, END)[1][0].finish_reason is FinishReason.STOP
    scheduler.add(make_request("b", max_tokens=2))
    assert run_step(scheduler)[1][0].finish_reason is None
    assert run_step(scheduler)[1][0].finish_reason is FinishReason.LENGTH
    assert not scheduler.has_work


def test_a_resumed_request_goes_on_after_its_output() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", max_tokens=5, output_token_ids=(1, 1, 1)))
    assert run_all(scheduler) == {"a": [3, 4]}


def test_the_prefix_cache_serves_whole_blocks_and_leaves_one_token_to_compute() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 48))
    run_all(scheduler)
    scheduler.add(make_request("b", 48))
    plan = scheduler.schedule()
    assert plan is not None
    assert (plan.parts[0].start, plan.parts[0].end) == (32, 48)
    assert scheduler.cached_tokens == 32


def test_the_prefix_cache_does_not_cross_tenants() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 48, tenant="x"))
    run_all(scheduler)
    scheduler.add(make_request("b", 48, tenant="y"))
    run_all(scheduler)
    assert scheduler.cached_tokens == 0


def test_the_queue_is_bounded_and_ids_are_unique() -> None:
    scheduler = make_scheduler(max_waiting=2)
    scheduler.add(make_request("a"))
    with pytest.raises(InvalidRequest):
        scheduler.add(make_request("a"))
    scheduler.add(make_request("b"))
    with pytest.raises(Overloaded):
        scheduler.add(make_request("c"))


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_preempted_sequences_finish_and_emit_each_token_once(prefix_cache: bool) -> None:
    scheduler = make_scheduler(6, prefix_cache=prefix_cache)
    for i in range(4):
        scheduler.add(make_request(str(i), 20, max_tokens=40, seed=i))
    assert run_all(scheduler) == {str(i): list(range(40)) for i in range(4)}
    assert scheduler.num_preemptions > 0
    assert_conserved(scheduler)


def test_the_first_in_the_queue_is_never_preempted() -> None:
    scheduler = make_scheduler(6)
    for i in range(4):
        scheduler.add(make_request(str(i), 20, max_tokens=40, seed=i))
    while scheduler.has_work:
        oldest = min((s for s in scheduler._sequences.values()), key=lambda s: s.queue_key)
        plan, _ = run_step(scheduler)
        assert plan is not None
        assert oldest not in plan.preempted


def test_a_prefill_only_sequence_is_held_until_it_is_released() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", max_tokens=1), prefill_only=True)
    assert run_step(scheduler)[1][0].finish_reason is FinishReason.LENGTH
    assert run_step(scheduler)[0] is None
    assert scheduler.num_in(SequenceState.HELD) == 1
    assert scheduler.blocks.counts().live == 2
    assert scheduler.release("a")
    assert not scheduler.release("a")
    assert scheduler.blocks.counts().live == 0


def test_a_reservation_takes_prompt_and_headroom_and_decodes_without_prefill() -> None:
    scheduler = make_scheduler()
    sequence = scheduler.reserve(make_request("a", 20, max_tokens=100), headroom_tokens=30)
    assert len(sequence.block_table) == 4  # 50 tokens
    assert scheduler.blocks.counts().granted == 4
    scheduler.start_reserved("a", 1)
    plan, tokens = run_step(scheduler)
    assert plan is not None
    assert (plan.num_decode_tokens, plan.num_prefill_tokens) == (1, 0)
    assert tokens[0].index == 1
    assert scheduler.blocks.counts().granted == 0


def test_a_reservation_pins_what_the_cache_holds() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 48))
    run_all(scheduler)
    sequence = scheduler.reserve(make_request("b", 48), headroom_tokens=0)
    assert sequence.num_cached == 32
    assert scheduler.blocks.counts().granted == 3


def test_kv_that_lost_precision_on_the_way_never_serves_a_request_that_asked_for_none() -> None:
    scheduler = make_scheduler()
    scheduler.reserve(make_request("a", 48, max_tokens=20), headroom_tokens=8, kv_history="int8")
    scheduler.start_reserved("a", 1)
    run_all(scheduler)  # publishes the prompt's blocks and those that decode filled
    cached = {}
    for history in ("int8", "none", "fp8", "bfloat16"):
        sequence = scheduler.reserve(make_request(history, 48), headroom_tokens=0, kv_history=history)
        cached[history] = sequence.num_cached
        scheduler.release(history)
    assert cached == {"int8": 32, "none": 0, "fp8": 0, "bfloat16": 0}
    scheduler.add(make_request("local", 48))
    run_step(scheduler)
    assert scheduler.get("local").num_cached == 0


def test_a_reservation_that_does_not_fit_takes_nothing() -> None:
    scheduler = make_scheduler(4)
    scheduler.reserve(make_request("a", 40, seed=1), headroom_tokens=0)
    before = scheduler.blocks.counts()
    with pytest.raises(Overloaded, match="needs 2 KV blocks, 1 can be had"):
        scheduler.reserve(make_request("b", 20, seed=2), headroom_tokens=8)
    assert scheduler.blocks.counts() == before
    scheduler.release("a")
    assert scheduler.blocks.counts().free == 4


def test_reservations_wait_behind_a_preempted_sequence() -> None:
    scheduler = make_scheduler(5)
    for name, num_tokens in (("a", 31), ("b", 31)):
        scheduler.reserve(make_request(name, num_tokens, max_tokens=40, seed=ord(name)), headroom_tokens=1)
        scheduler.start_reserved(name, 1)
    while not scheduler.num_preemptions:
        run_step(scheduler)
    with pytest.raises(Overloaded, match="arrived before"):
        scheduler.reserve(make_request("c", 10, seed=3), headroom_tokens=0)
    run_all(scheduler)
    scheduler.reserve(make_request("c", 10, seed=3), headroom_tokens=0)


@pytest.mark.parametrize("by_transfer", [True, False])
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_preempted_sequences_come_back_under_pressure_that_never_ends(by_transfer: bool, prefix_cache: bool) -> None:
    """More important requests are at the door before every step, and take whatever they are given."""
    scheduler = make_scheduler(8, prefix_cache=prefix_cache, max_waiting=4)
    patient = [make_request(f"patient {i}", 20, max_tokens=60, seed=i) for i in range(3)]
    for request in patient:
        scheduler.add(request)
    finished: set[str] = set()
    preempted: set[str] = set()
    for number in range(2_000):
        pushy = make_request(f"pushy {number}", 16, max_tokens=30, seed=100 + number, priority=9)
        try:
            if by_transfer:
                scheduler.reserve(pushy, headroom_tokens=8)
                scheduler.start_reserved(pushy.request_id, 1)
            else:
                scheduler.add(pushy)
        except Overloaded:
            pass
        plan, tokens = run_step(scheduler)
        assert plan is not None
        preempted |= {sequence.request_id for sequence in plan.preempted}
        finished |= {token.sequence.request_id for token in tokens if token.finish_reason is not None}
        assert_conserved(scheduler)
        if finished >= {request.request_id for request in patient}:
            break
    assert finished >= {request.request_id for request in patient}
    assert preempted & {request.request_id for request in patient}
    assert len(finished) > 3  # the important ones were served meanwhile


def test_a_first_token_that_ends_the_request_is_not_started() -> None:
    scheduler = make_scheduler()
    scheduler.reserve(make_request("a", stop_token_ids=frozenset({END})), headroom_tokens=0)
    with pytest.raises(InvalidRequest):
        scheduler.start_reserved("a", END)
    with pytest.raises(InvalidRequest):
        scheduler.start_reserved("unknown", 1)
    assert scheduler.release("a")
    assert_conserved(scheduler)


def test_a_release_during_a_step_frees_when_the_step_ends() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a"))
    scheduler.schedule()
    assert scheduler.release("a")
    assert scheduler.blocks.counts().live == 2
    assert scheduler.commit({"a": 1}) == []
    assert scheduler.blocks.counts().live == 0


def test_an_abandoned_step_drops_its_sequences_only() -> None:
    scheduler = make_scheduler(max_running=1)
    scheduler.add(make_request("a"))
    scheduler.add(make_request("b"))
    scheduler.schedule()
    assert [sequence.request_id for sequence in scheduler.abandon()] == ["a"]
    assert_conserved(scheduler)
    assert list(run_all(scheduler)) == ["b"]


class SchedulerMachine(RuleBasedStateMachine):
    """Random requests, reservations, steps, failures and cancels in any order."""

    ids = Bundle("ids")
    reserved = Bundle("reserved")

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = make_scheduler(12, max_running=5, max_waiting=6, max_step_tokens=40)
        self.count = 0
        self.in_step = False

    def new_request(self, num_prompt: int, max_tokens: int, seed: int, priority: int = 0) -> Request:
        self.count += 1
        return make_request(
            str(self.count), num_prompt, max_tokens, seed, priority=priority, stop_token_ids=frozenset({END})
        )

    @rule(
        target=ids,
        num_prompt=st.integers(1, 90),
        max_tokens=st.integers(1, 60),
        seed=st.integers(0, 2),
        priority=st.integers(0, 1),
        prefill_only=st.booleans(),
    )
    def add(self, num_prompt: int, max_tokens: int, seed: int, priority: int, prefill_only: bool) -> str:
        request = self.new_request(num_prompt, max_tokens, seed, priority)
        if self.scheduler.num_waiting < 6:
            self.scheduler.add(request, prefill_only=prefill_only)
        return request.request_id

    @rule(target=reserved, num_prompt=st.integers(1, 90), max_tokens=st.integers(2, 60), seed=st.integers(0, 2))
    def reserve(self, num_prompt: int, max_tokens: int, seed: int) -> object:
        request = self.new_request(num_prompt, max_tokens, seed)
        before = self.scheduler.blocks.counts()
        try:
            self.scheduler.reserve(request, headroom_tokens=20)
        except Overloaded:
            assert self.scheduler.blocks.counts() == before
            return multiple()
        return request.request_id

    @rule(target=ids, request_id=consumes(reserved), commit=st.booleans())
    def end_transfer(self, request_id: str, commit: bool) -> str:
        if commit:
            self.scheduler.start_reserved(request_id, 1)
        else:
            assert self.scheduler.release(request_id)
        return request_id

    @rule(request_id=ids)
    def release(self, request_id: str) -> None:
        self.scheduler.release(request_id)
        assert not self.scheduler.release(request_id)

    @rule()
    def plan(self) -> None:
        """Perhaps while another step runs."""
        if len(self.scheduler._plans) < 2:
            self.scheduler.schedule()

    @rule(token_id=st.sampled_from([1, 1, 1, 2, END]), ending=st.sampled_from(["commit", "commit", "fail"]))
    def step(self, token_id: int, ending: str) -> None:
        if not self.scheduler._plans and self.scheduler.schedule() is None:
            return
        if ending == "fail":
            self.scheduler.abandon()
        else:
            parts = self.scheduler._plans[0].parts
            self.scheduler.commit({part.sequence.request_id: token_id for part in parts if part.samples})

    @invariant()
    def blocks_are_conserved(self) -> None:
        assert_conserved(self.scheduler)

    @invariant()
    def tables_hold_what_was_computed(self) -> None:
        for sequence in self.scheduler._sequences.values():
            assert len(sequence.block_table) * BLOCK >= sequence.num_computed
            assert len(set(sequence.block_table)) == len(sequence.block_table)

    def teardown(self) -> None:
        """Everything that still runs can end, and then only the cache holds blocks."""
        while self.scheduler._plans:
            parts = self.scheduler._plans[0].parts
            self.scheduler.commit({part.sequence.request_id: 1 for part in parts if part.samples})
        for sequence in list(self.scheduler._sequences.values()):
            if sequence.prefill_only or sequence.state is SequenceState.RESERVED:
                self.scheduler.release(sequence.request_id)
        run_all(self.scheduler)
        assert not self.scheduler.has_work
        counts = self.scheduler.blocks.counts()
        assert (counts.live, counts.granted) == (0, 0)


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)
