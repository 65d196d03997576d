"""The step scheduler loses no block whatever happens in whatever order."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule
from splitserve.core.errors import Overloaded
from splitserve.core.request import Request
from splitserve.scheduling.sequence import SequenceState

from .step_schedulers import BLOCK, END, assert_conserved, make_request, make_scheduler, run_all


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
