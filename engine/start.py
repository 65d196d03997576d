"""What an engine runs on: the KV pool and the runner for its model's device."""

from __future__ import annotations

import torch

from ..core.errors import ConfigError, ModelUnsupported
from .attention import KvWritten
from .loading import LoadedModel
from .model_files import reason_of
from .options import EngineOptions
from .output_format import OutputFormats
from .pool import KvPool
from .runner import CpuRunner, StepRunner


def on_device(model: LoadedModel, options: EngineOptions, kv_written: KvWritten | None) -> tuple[KvPool, StepRunner]:
    """The KV pool and what runs steps on it.

    Raises: ModelUnsupported: the pool would not hold a block. ConfigError: nor a request as long as was asked for, or
        a GPU has no room for all that.
    """
    if model.model.device.type == "cuda":
        from .gpu.start import start_on_gpu

        try:
            return start_on_gpu(model, options, model_limit(model, options), kv_written)
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"the KV pool and the largest step do not fit into the memory of {model.model.device}: "
                f"{reason_of(error)}; lower --num-kv-blocks, --gpu-memory-fraction, --max-step-tokens or --max-running"
            ) from error
    formats = OutputFormats(model.path, model.vocab_size, model.eos_token_ids)
    row_bytes = model.geometry.bytes_per_token * options.block_size
    num_blocks = options.num_kv_blocks or options.kv_memory_bytes // row_bytes
    if num_blocks < 1:
        raise ModelUnsupported(
            f"one KV block of {options.block_size} tokens takes {row_bytes:,} bytes, kv_memory_bytes is "
            f"{options.kv_memory_bytes:,}; raise it"
        )
    if options.max_model_len is not None and num_blocks * options.block_size < model_limit(model, options):
        raise ConfigError(
            f"the KV pool has room for {num_blocks * options.block_size:,} tokens, one request may have "
            f"{model_limit(model, options):,} (--max-model-len); lower that, or raise --kv-memory or --num-kv-blocks"
        )
    pool = KvPool(model.geometry, num_blocks=num_blocks, block_size=options.block_size, shared=options.shared_pool)
    samples = model.group is None or model.group.leads
    return pool, CpuRunner(model.model, pool, formats, kv_written, samples=samples)


def model_limit(model: LoadedModel, options: EngineOptions) -> int:
    """Tokens that one sequence may have, if the pool holds them."""
    return min(model.max_model_len, options.max_model_len or model.max_model_len)
