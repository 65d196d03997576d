"""Start the engine on a GPU: find out what memory its steps take, size the KV pool with the rest, capture graphs."""

from __future__ import annotations

import gc
import logging

import torch

from ...core.errors import ModelUnsupported
from ...core.kv_geometry import blocks_for
from ...scheduling.steps import MAX_PROMPT_LOGITS
from ..attention import KvWritten
from ..loading import LoadedModel
from ..options import EngineOptions
from ..output_format import OutputFormats
from ..pool import KvPool
from .runner import GpuRunner

logger = logging.getLogger(__name__)

_GIB = 1 << 30
_SLACK_BYTES = 1 << 29  # fragmentation and what libraries allocate late


def start_on_gpu(
    model: LoadedModel, options: EngineOptions, max_model_len: int, kv_written: KvWritten | None
) -> tuple[KvPool, GpuRunner]:
    """The KV pool and the runner on the model's device.

    Raises: ModelUnsupported: the pool would not hold one sequence of `max_model_len` tokens.
    """
    device = model.model.device
    size, row_bytes = options.block_size, model.geometry.bytes_per_token * options.block_size
    wanted = blocks_for(max_model_len, size)
    weights = torch.cuda.memory_allocated(device)
    step, graphs = _measure(model, options, max_model_len)
    budget = int(torch.cuda.get_device_properties(device).total_memory * options.gpu_memory_fraction)
    others = torch.cuda.get_device_properties(device).total_memory - torch.cuda.mem_get_info(device)[0]
    others = max(0, others - torch.cuda.memory_reserved(device))  # CUDA's own, and other processes
    left = budget - others - weights - step - graphs - _SLACK_BYTES
    num_blocks = options.num_kv_blocks or left // row_bytes
    if model.group is not None:
        num_blocks = model.group.least(num_blocks)  # ranks share block numbers
    logger.info(
        "device memory: %.2f GiB of %.2f GiB may be used: weights %.2f, largest step %.2f, graphs %.2f, CUDA and other "
        "processes %.2f, slack %.2f, KV pool %.2f (%d blocks of %d tokens)",
        budget / _GIB,
        torch.cuda.get_device_properties(device).total_memory / _GIB,
        weights / _GIB,
        step / _GIB,
        graphs / _GIB,
        others / _GIB,
        _SLACK_BYTES / _GIB,
        num_blocks * row_bytes / _GIB,
        num_blocks,
        size,
    )
    if num_blocks < wanted:
        raise ModelUnsupported(
            f"the KV pool has room for {max(0, num_blocks) * size:,} tokens, one request may have {max_model_len:,}; "
            f"lower --max-model-len, raise --gpu-memory-fraction ({options.gpu_memory_fraction}) or take a larger GPU"
        )
    pool = KvPool(model.geometry, num_blocks=num_blocks, block_size=size, device=device)
    runner = _runner(model, pool, options, max_model_len, kv_written)
    if options.cuda_graphs and (seconds := _capture(runner, model)) is not None:
        logger.info("captured the decode step for batches of up to %d in %.1f s", runner.max_running, seconds)
    return pool, runner


def _runner(
    model: LoadedModel, pool: KvPool, options: EngineOptions, max_model_len: int, kv_written: KvWritten | None
) -> GpuRunner:
    return GpuRunner(
        model.model,
        pool,
        max_running=options.max_running,
        max_model_len=max_model_len,
        max_step_tokens=options.max_step_tokens,
        num_query_heads=int(model.model.config.get_text_config().num_attention_heads),
        formats=OutputFormats(model.path, model.vocab_size, model.eos_token_ids),
        kv_written=kv_written,
        group=model.group,
    )


def _capture(runner: GpuRunner, model: LoadedModel) -> float | None:
    """Seconds that it took; None when the model's layers do what a graph cannot hold, such as asking the host.

    Mixtures of experts do so in other dtypes than bfloat16, whose grouped product alone runs without the host.
    """
    mixture = any(parameter.dim() == 3 for parameter in model.model.parameters())
    seconds, reason = None, "experts are computed without the host in bfloat16 only"
    if not mixture or model.model.dtype == torch.bfloat16 or model.group is None:
        try:
            seconds = runner.capture()
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
    # Else not even tried: a capture that fails halfway would leave the ranks in the middle of a collective.
    if model.group is not None and not model.group.least(seconds is not None):  # ranks run the same steps
        seconds = None
    if seconds is None:
        runner.drop_graphs()
        logger.warning(
            "steps are not captured as CUDA graphs, so each kernel is launched by itself, which is slow for small "
            "batches: %s",
            reason,
        )
    return seconds


def _logits_bytes(model: LoadedModel, options: EngineOptions) -> int:
    """What logits take at most, in a step where every sequence samples and prompt tokens are told their likelihoods.

    As the model has them and once more those that are asked for, and in fp32 twice: for sampling as for logprobs.
    """
    rows = options.max_running + min(MAX_PROMPT_LOGITS, options.max_step_tokens)
    return rows * model.vocab_size * (2 * model.model.dtype.itemsize + 2 * torch.float32.itemsize)


def _measure(model: LoadedModel, options: EngineOptions, max_model_len: int) -> tuple[int, int]:
    """Bytes that the largest prefill step takes while it runs, and that the captured decode steps keep."""
    from ...core.request import Request
    from ...scheduling.blocks import BlockAllocator
    from ...scheduling.steps import StepScheduler

    device = model.model.device
    num_blocks = blocks_for(max(options.max_step_tokens, options.max_running) + options.block_size, options.block_size)
    pool = KvPool(model.geometry, num_blocks=num_blocks, block_size=options.block_size, device=device)
    runner = _runner(model, pool, options, max_model_len, None)
    scheduler = StepScheduler(
        BlockAllocator(num_blocks, options.block_size, prefix_cache=False),
        model_id="",
        kv_dtype="",
        max_running=options.max_running,
        max_waiting=1,
        max_step_tokens=options.max_step_tokens,
    )
    length = min(options.max_step_tokens, max_model_len - 1)
    scheduler.add(Request(request_id="largest", prompt_token_ids=(1,) * length, max_tokens=1))
    plan = scheduler.schedule()
    assert plan is not None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    runner.launch(plan)
    runner.collect()
    step = max(torch.cuda.max_memory_allocated(device) - before, _logits_bytes(model, options))
    graphs = 0
    if options.cuda_graphs:
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
        _capture(runner, model)
        graphs = max(0, free - torch.cuda.mem_get_info(device)[0])
    del runner, pool, plan, scheduler
    gc.collect()
    torch.cuda.empty_cache()
    return step, graphs
