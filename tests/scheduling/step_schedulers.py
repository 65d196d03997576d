"""Small step schedulers, requests for them, and steps that run at once."""

from splitserve.core.request import Request
from splitserve.scheduling.blocks import BlockAllocator
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


def plan_ahead(scheduler: StepScheduler) -> tuple[StepPlan, StepPlan | None]:
    """One step that runs and the one planned behind it."""
    first = scheduler.schedule()
    assert first is not None
    return first, scheduler.schedule()
