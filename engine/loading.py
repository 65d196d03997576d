"""Load a model for serving: find its files, refuse what cannot be served right, probe the KV geometry."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import xxhash
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from ..core.errors import ConfigError, ModelLoadFailed, ModelUnsupported
from ..core.kv_geometry import KvDtype, KvGeometry, LayerGeometry
from .architectures import check_architecture, max_positions
from .attention import NAME, GeometryProbe, current
from .cpu_linear import pack_linears
from .model_files import UNREADABLE, reason_of, resolve_model
from .options import EngineOptions
from .parallel.group import RankGroup
from .parallel.split import check_divides, split
from .pool import TORCH_DTYPES
from .self_check import check_against_eager, eager_check_logits


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model that passed the self-check."""

    model: PreTrainedModel  # the transformers module, its code unmodified
    geometry: KvGeometry
    vocab_size: int
    max_model_len: int  # tokens, the model's own limit
    eos_token_ids: frozenset[int]
    model_id: str  # model type and digest of the weights: equal on every host that has the same files
    path: Path  # directory with the tokenizer's files
    group: RankGroup | None = None  # the ranks that hold the model together; `geometry` is this rank's share
    whole: KvGeometry  # of all ranks together


def load_model(options: EngineOptions, group: RankGroup | None = None, *, fused: bool = True) -> LoadedModel:
    """Load `options.model`, or this rank's share of it, and prove that our attention gives its logits.

    `fused` False leaves its layers alone on a GPU, for comparisons.

    Raises: ModelLoadFailed: files are missing or damaged. ModelUnsupported: it would not be served right.
        ConfigError: the device or the number of ranks does not fit.
    """
    device = device_of(options, 0 if group is None else group.rank)
    if not sys.stderr.isatty():
        # A log file is no place for one.
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    path = resolve_model(options.model, weights=not options.random_weights)
    try:
        config = AutoConfig.from_pretrained(path)
    except UNREADABLE as error:
        raise ModelLoadFailed(
            f"cannot read the model's config in {path}: {reason_of(error)}; check that config.json is whole and "
            "that the model needs no code of its own"
        ) from error
    check_architecture(config)
    if group is not None:
        check_divides(config, group.size)
    dtype = options.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    check_dtype(dtype, device)
    if options.random_weights:
        model = _random_weights(path, config, TORCH_DTYPES[dtype], device)
        digest = f"random-{xxhash.xxh3_64_hexdigest(config.to_json_string().encode())}"
    else:
        model = _load_weights(path, config, TORCH_DTYPES[dtype])
        digest = _digest(path) if group is None or group.leads else ""  # the others compute no prefix hashes
    whole = None
    if group is not None:
        if group.leads:  # the others are told
            whole = _probe_layers(model)
        split(model, group)
    with _fitting(device):
        model = model.to(device)  # type: ignore[arg-type]
    if device.type == "cuda":
        torch.cuda.set_device(device)  # kernels are launched there, whatever the tensors say
    if group is not None:
        group.connect(device)
    return prepare_model(model, options, path, f"{config.model_type}@{digest}", group, whole, fused=fused)


@contextmanager
def _fitting(device: torch.device) -> Iterator[None]:
    """Put weights there. Raises: ModelUnsupported: they do not fit."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ModelUnsupported(
            f"the weights do not fit into the memory of {device}: {reason_of(error)}; take a larger GPU, a narrower "
            "--dtype, or more ranks (--tensor-parallel)"
        ) from error


def _random_weights(path: Path, config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The same on every device of one kind: two workers with random weights serve one model."""
    torch.manual_seed(0)
    try:
        with _fitting(device), torch.device(device):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, dtype=dtype, attn_implementation="eager"
            )
    except UNREADABLE as error:
        raise ModelLoadFailed(
            f"cannot make a model of the config in {path}: {reason_of(error)}; check config.json"
        ) from error
    model.train(False)
    return model


def prepare_model(
    model: PreTrainedModel,
    options: EngineOptions,
    path: Path,
    model_id: str,
    group: RankGroup | None = None,
    whole: tuple[LayerGeometry, ...] | None = None,
    *,
    fused: bool = True,
) -> LoadedModel:
    """Make a model ready to serve: probe its KV geometry, check it, speed up its layers.

    Raises: ModelUnsupported: it would not be served right.
    """
    on_gpu = model.device.type == "cuda"
    if not on_gpu:
        pack_linears(model)
    dtype = next(name for name, torch_dtype in TORCH_DTYPES.items() if torch_dtype == model.dtype)
    geometry = KvGeometry(model_id=model_id, layers=_probe_layers(model), dtype=options.kv_dtype or dtype)
    # The noise of random weights is larger than the bound for real ones.
    checked = options.self_check and not options.random_weights
    reference = eager_check_logits(model) if checked else None
    if on_gpu and fused:
        from .gpu.fusions import fuse

        if group is not None:
            torch.manual_seed(0)  # ranks must judge the candidates alike
        fuse(model)
    if reference is not None:
        check_against_eager(model, geometry, reference)
    text = model.config.get_text_config()
    return LoadedModel(
        model=model,
        geometry=geometry,
        vocab_size=int(text.vocab_size),
        max_model_len=max_positions(text),
        eos_token_ids=_eos_token_ids(model),
        model_id=geometry.model_id,
        path=path,
        group=group,
        whole=geometry if whole is None else replace(geometry, layers=whole),
    )


def device_of(options: EngineOptions, rank: int) -> torch.device:
    """The device of one rank: that of `options`, or on GPUs one of those behind it.

    Raises: ConfigError: there is no such device here, or there are fewer behind it than ranks.
    """
    device = _device(options.device)
    if device.type == "cpu":
        return device
    first, count = device.index or 0, torch.cuda.device_count()
    if first + options.tensor_parallel > count:
        raise ConfigError(
            f"--tensor-parallel {options.tensor_parallel} takes as many GPUs from cuda:{first} on, and PyTorch sees "
            f"{count}; lower it, or give the worker more GPUs"
        )
    return torch.device("cuda", first + rank)


def check_dtype(dtype: KvDtype, device: torch.device) -> None:
    """Raises: ConfigError: the device does not compute in `dtype`."""
    if device.type == "cpu" or dtype != "bfloat16":
        return
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise ConfigError(
            f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor}) has no bfloat16 arithmetic; "
            "use --dtype float16"
        )


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name!r} is not known; use cpu, cuda or cuda:N") from error
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise ConfigError(f"device {name!r} is not supported; use cpu, cuda or cuda:N")
    count = torch.cuda.device_count()
    if not torch.cuda.is_available() or (device.index or 0) >= count:
        raise ConfigError(
            f"device {name!r} is not here: PyTorch {torch.__version__} sees {count} GPUs; use --device cpu"
        )
    return torch.device("cuda", device.index or 0)


def _load_weights(path: Path, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    try:
        loaded: tuple[PreTrainedModel, dict[str, set[str]]] = AutoModelForCausalLM.from_pretrained(  # type: ignore[assignment]
            path, config=config, dtype=dtype, attn_implementation="eager", output_loading_info=True
        )
    except UNREADABLE as error:
        raise ModelLoadFailed(
            f"cannot load the weights in {path}: {reason_of(error)}; download the model again"
        ) from error
    model, info = loaded
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ModelLoadFailed(
            f"the weights in {path} lack {len(missing)} tensors ({missing[0]}, ...), which would be random; "
            "download the model again"
        )
    model.train(False)
    return model


@torch.inference_mode()
def _probe_layers(model: PreTrainedModel) -> tuple[LayerGeometry, ...]:
    """Each layer's KV shape, from a forward pass of two tokens through our attention function."""
    model.set_attn_implementation(NAME)
    probe = GeometryProbe()
    token = current.set(probe)
    try:
        model(
            input_ids=torch.tensor([[1, 2]], device=model.device),
            position_ids=torch.tensor([[0, 1]], device=model.device),
            use_cache=False,
            logits_to_keep=torch.tensor([1], device=model.device),
        )
    except (TypeError, AttributeError, LookupError, RuntimeError, NotImplementedError) as error:
        raise ModelUnsupported(
            f"{model.config.model_type} does not run with packed tokens and our attention: {reason_of(error)}"
        ) from error
    finally:
        current.reset(token)
    expected = model.config.get_text_config().num_hidden_layers
    if sorted(probe.layers) != list(range(expected)):
        raise ModelUnsupported(
            f"{model.config.model_type} has {expected} layers, {len(probe.layers)} of them use the attention "
            "interface; layers without a paged KV cache cannot be served yet"
        )
    return tuple(probe.layers[i] for i in range(expected))


def _eos_token_ids(model: PreTrainedModel) -> frozenset[int]:
    eos = getattr(model.generation_config, "eos_token_id", None)
    if eos is None:
        eos = getattr(model.config.get_text_config(), "eos_token_id", None)
    if eos is None:
        return frozenset()
    ids = eos if isinstance(eos, (list, tuple)) else [eos]
    if not all(isinstance(token_id, int) for token_id in ids):
        raise ModelLoadFailed(
            f"eos_token_id of the model is {eos!r}, not a token id or a list of them; correct its files"
        )
    return frozenset(ids)


def _digest(path: Path) -> str:
    """16 hex digits over the weights: KV of one fine-tune must never serve another."""
    digest = xxhash.xxh3_64()
    for file in sorted(path.glob("*.safetensors")):
        if file.stat().st_size == 0:
            continue  # nothing that could be mapped
        with file.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as content:
            digest.update(content)
    return digest.hexdigest()
