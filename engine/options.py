"""What an engine is started with."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.errors import ConfigError
from ..core.kv_geometry import PREFIX_UNIT, KvDtype


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """Limits and sizes of one engine. Raises: ConfigError: a value is out of its range."""

    model: str  # "smollm2-135m", a directory, a .gguf file or a hub id
    device: str = "cpu"  # "cpu", "cuda" or "cuda:N"
    dtype: KvDtype | None = None  # of the weights; None: float32 on CPU, bfloat16 on a GPU
    random_weights: bool = False  # of the model's shape, from a fixed seed; its weights are not read
    kv_dtype: KvDtype | None = None  # None: the same as dtype
    block_size: int = 16  # tokens
    num_kv_blocks: int | None = None  # None: as many as kv_memory_bytes holds, or what a GPU has left
    kv_memory_bytes: int = 1 << 30  # on a CPU
    gpu_memory_fraction: float = 0.9  # of the device's memory: weights, graphs, activations and the KV pool
    cuda_graphs: bool = True
    tensor_parallel: int = 1  # processes, one a device, that hold the model together
    max_model_len: int | None = None  # tokens; None: the model's own limit, capped to what the pool holds
    max_running: int = 64  # sequences in the running batch
    max_waiting: int = 1024  # requests in the queue; one more is refused
    max_step_tokens: int = 256  # prefill tokens of one step: the chunk size
    max_packed_tokens: int | None = None  # no prompt joins a step that has so many; None: 512 on a GPU, no limit on CPU
    decode_headroom_tokens: int = 64  # reserved past the prompt when KV arrives by transfer
    prefix_cache: bool = True
    num_threads: int | None = None  # None: as PyTorch finds it
    self_check: bool = True  # compare with the model's own attention at load
    shared_pool: bool = False  # put the pool into a memfd that peers may map read-only

    def __post_init__(self) -> None:
        positive = ("tensor_parallel", "block_size", "kv_memory_bytes", "max_running", "max_waiting", "max_step_tokens")
        optional = ("num_kv_blocks", "max_model_len", "max_packed_tokens", "num_threads")
        for name in (*positive, *optional):
            value = getattr(self, name)
            if (value is None and name not in optional) or (value is not None and value < 1):
                raise ConfigError(f"{name} is {value}; it must be at least 1")
        if not 0 < self.gpu_memory_fraction <= 1:
            raise ConfigError(f"gpu_memory_fraction is {self.gpu_memory_fraction}; it must be over 0 and at most 1")
        if self.block_size % PREFIX_UNIT:
            raise ConfigError(f"block_size is {self.block_size}; it must be a multiple of {PREFIX_UNIT}")
        if self.decode_headroom_tokens < 0:
            raise ConfigError(f"decode_headroom_tokens is {self.decode_headroom_tokens}; it must be at least 0")
