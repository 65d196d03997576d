"""What a model weighs: parameters, weight bytes, KV bytes and arithmetic, from a name, a config.json or numbers."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from ..core.errors import ConfigError, ModelUnsupported

WeightDtype = Literal["float32", "bfloat16", "float16", "fp8", "int8", "int4", "fp4"]
KvCacheDtype = Literal["float32", "bfloat16", "float16", "fp8", "int8"]

# Bytes of one element, the scales that quantised weights carry included: one of 16 bits for each 128 elements, for fp4
# one of 8 bits for each 16.
WEIGHT_BYTES: Mapping[str, float] = {
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "fp8": 1.016,
    "int8": 1.016,
    "int4": 0.516,
    "fp4": 0.563,
}
KV_BYTES: Mapping[str, float] = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1, "int8": 1}

# What a config.json leaves to its model type: feed-forwards of two matrices, embeddings that are the head too, and each
# which layer attends to all tokens where the others have a window.
_UNGATED = frozenset({"apertus", "arcee", "bloom", "gpt2", "gpt_neox", "nemotron", "opt", "phi", "starcoder2"})
_TIED = frozenset(
    {
        "bloom",
        "cohere",
        "cohere2",
        "ernie4_5",
        "gemma",
        "gemma2",
        "gemma3_text",
        "gpt2",
        "opt",
        "smollm3",
        "starcoder2",
    }
)
_FULL_EVERY: Mapping[str, int] = {"cohere2": 4, "gemma2": 2, "gemma3_text": 6, "gpt_oss": 2, "olmo3": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek): keys and values are kept as one compressed vector a token."""

    query_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """Mixture of experts: every token goes through `num_active` of `num_experts`, and through the shared ones."""

    num_experts: int
    num_active: int
    intermediate_size: int
    num_shared: int = 0
    num_dense_layers: int = 0  # first layers, which have one plain feed-forward instead


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A decoder-only transformer, as far as time and memory depend on it."""

    name: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_model_len: int
    tied_embeddings: bool = False
    gated: bool = True  # SwiGLU and its like: three matrices in a feed-forward, else two
    latent: LatentAttention | None = None
    experts: Experts | None = None
    sliding_window: int | None = None  # tokens
    num_sliding_layers: int = 0
    quantization: WeightDtype | None = None  # what the checkpoint itself is stored in
    source: str = ""  # what a worker loads: hub id or directory

    # --- parameters ---

    @property
    def attention_parameters(self) -> int:
        """Of one layer."""
        hidden, heads = self.hidden_size, self.num_heads
        if (latent := self.latent) is None:
            return hidden * self.head_dim * (2 * heads + 2 * self.num_kv_heads)
        query_out = heads * (latent.nope_dim + latent.rope_dim)
        rank = latent.query_rank
        query = hidden * query_out if rank is None else rank * (hidden + query_out)
        keys_and_values = hidden * (latent.kv_rank + latent.rope_dim)
        keys_and_values += latent.kv_rank * heads * (latent.nope_dim + latent.value_dim)
        return query + keys_and_values + heads * latent.value_dim * hidden

    @property
    def _feed_forward(self) -> int:
        """Parameters of a feed-forward for each unit of its intermediate size."""
        return (3 if self.gated else 2) * self.hidden_size

    @property
    def dense_parameters(self) -> int:
        """Of all layers, without routed experts: every token goes through all of them."""
        total = self.num_layers * self.attention_parameters
        if (experts := self.experts) is None:
            return total + self.num_layers * self._feed_forward * self.intermediate_size
        total += experts.num_dense_layers * self._feed_forward * self.intermediate_size
        shared = experts.num_shared * experts.intermediate_size * self._feed_forward
        return total + self.num_expert_layers * (shared + self.hidden_size * experts.num_experts)

    @property
    def num_expert_layers(self) -> int:
        return 0 if self.experts is None else self.num_layers - self.experts.num_dense_layers

    @property
    def expert_parameters(self) -> int:
        """Of all routed experts of all layers."""
        if (experts := self.experts) is None:
            return 0
        return self.num_expert_layers * experts.num_experts * self._feed_forward * experts.intermediate_size

    @property
    def head_parameters(self) -> int:
        """Of the matrix that turns hidden states into logits."""
        return self.vocab_size * self.hidden_size

    @property
    def num_parameters(self) -> int:
        embeddings = self.head_parameters * (1 if self.tied_embeddings else 2)
        return self.dense_parameters + self.expert_parameters + embeddings

    @property
    def active_parameters(self) -> int:
        """That one token is multiplied with in the layers; without embeddings and head."""
        if (experts := self.experts) is None:
            return self.dense_parameters
        return self.dense_parameters + self.expert_parameters * experts.num_active // experts.num_experts

    # --- bytes ---

    def weight_bytes(self, dtype: WeightDtype) -> float:
        """Memory of the weights; embeddings and head stay in 16 bits where the rest is quantised."""
        per_layer = (self.dense_parameters + self.expert_parameters) * WEIGHT_BYTES[dtype]
        return per_layer + (self.num_parameters - self.dense_parameters - self.expert_parameters) * head_bytes(dtype)

    @property
    def kv_elements_per_layer(self) -> int:
        """Elements of one token's KV at one layer; the compressed form where attention is latent."""
        if self.latent is not None:
            return self.latent.kv_rank + self.latent.rope_dim
        return 2 * self.num_kv_heads * self.head_dim

    def kv_bytes_per_token(self, dtype: KvCacheDtype) -> float:
        """Of all layers. Sliding-window layers keep every token here, as a paged pool does."""
        return self.num_layers * self.kv_elements_per_layer * KV_BYTES[dtype]

    def kv_copies(self, tp: int) -> int:
        """How often the ranks of a tensor-parallel group hold the same KV: once each for what cannot be split."""
        if self.latent is not None:
            return tp
        return max(1, tp // self.num_kv_heads)

    # --- arithmetic ---

    @property
    def attention_flops_per_pair(self) -> float:
        """Floating-point operations of one query token with one key token, all heads and layers."""
        if self.latent is not None:
            dims = self.latent.nope_dim + self.latent.rope_dim + self.latent.value_dim
        else:
            dims = 2 * self.head_dim
        return 2.0 * self.num_layers * self.num_heads * dims

    def refuse_tp(self, tp: int) -> str | None:
        """Why the model cannot be split over `tp` ranks; None if it can."""
        if self.num_heads % tp:
            return f"{self.num_heads} attention heads do not divide by {tp}"
        if self.latent is None and self.num_kv_heads % tp and tp % self.num_kv_heads:
            return f"{self.num_kv_heads} KV heads neither divide by {tp} nor {tp} by them"
        return None


def head_bytes(dtype: WeightDtype) -> float:
    """Bytes of an element of embeddings and head."""
    return 4 if dtype == "float32" else 2


def load_model(name: str) -> ModelSpec:
    """The spec of a built-in name, of a config.json or its directory, or of the fields of one: "hidden_size=4096,...".

    Raises: ConfigError: none of them. ModelUnsupported: it describes something else than a decoder-only transformer.
    """
    table = _built_in()
    if (row := table.get(name.lower())) is not None:
        source = next(
            (alias for alias in row["aliases"] if "/" in alias and row["name"] != "smollm2-135m"), row["name"]
        )
        return replace(model_from_config(row["name"], row), source=source)
    if "=" in name:
        return model_from_config("model", _fields(name))
    path = Path(name)
    if path.is_dir():
        path /= "config.json"
    if path.is_file():
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"--model: cannot read {path}: {error.strerror}") from error
        except ValueError as error:
            raise ConfigError(f"--model: {path} is not JSON: {error}") from error
        spec = model_from_config(path.parent.name or str(path), config)
        return replace(spec, source=str(path.parent))
    near = difflib.get_close_matches(name.lower(), table, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(model_names())}"
    raise ConfigError(f"--model: {name!r} is neither a built-in model nor a config.json; {hint}")


def _fields(text: str) -> dict[str, Any]:
    """A config from "num_hidden_layers=32,hidden_size=4096,tie_word_embeddings=true"."""
    found: dict[str, Any] = {}
    for part in text.split(","):
        key, _, value = part.partition("=")
        try:
            found[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"--model: {part!r} is no field of a config.json, such as hidden_size=4096") from error
    return found


def model_names() -> list[str]:
    """Built-in names, without their aliases."""
    return sorted({row["name"] for row in _built_in().values()})


@cache
def _built_in() -> dict[str, dict[str, Any]]:
    text = resources.files(__package__).joinpath("data/models.yaml").read_text(encoding="utf-8")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    table: dict[str, dict[str, Any]] = {}
    for name, row in yaml.load(text, Loader=loader).items():
        for alias in (name, *row["aliases"]):
            table[alias.lower()] = {**row, "name": name}
    return table


def model_from_config(name: str, config: Mapping[str, Any]) -> ModelSpec:
    """A spec from the fields of a config.json. Raises: ConfigError, ModelUnsupported."""
    config = _section(name, "its config", config)
    config = {**config, **_section(name, "text_config", config.get("text_config"))}
    if config.get("is_encoder_decoder"):
        raise ModelUnsupported(f"{name} is an encoder-decoder; the planner knows decoder-only models")
    number = partial(_number, name, config)
    hidden, heads = number("hidden_size", "n_embd"), number("num_attention_heads", "n_head")
    latent = None
    if config.get("kv_lora_rank"):
        latent = LatentAttention(
            query_rank=number("q_lora_rank") if config.get("q_lora_rank") is not None else None,
            kv_rank=number("kv_lora_rank"),
            nope_dim=number("qk_nope_head_dim"),
            rope_dim=number("qk_rope_head_dim"),
            value_dim=number("v_head_dim"),
        )
    experts = None
    num_experts = number("num_local_experts", "num_experts", "n_routed_experts", default=0, least=0)
    if num_experts > 1:
        experts = Experts(
            num_experts=num_experts,
            num_active=number("num_experts_per_tok", "num_experts_per_token"),
            intermediate_size=number("moe_intermediate_size", "intermediate_size"),
            num_shared=number("n_shared_experts", default=0, least=0),
            num_dense_layers=number("first_k_dense_replace", default=0, least=0),
        )
    num_layers, kind = number("num_hidden_layers", "n_layer"), str(config.get("model_type"))
    return ModelSpec(
        name=name,
        num_layers=num_layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=number("num_key_value_heads", default=heads),
        head_dim=number("head_dim", default=hidden // heads),
        intermediate_size=number("intermediate_size", "n_inner", default=4 * hidden),
        vocab_size=number("vocab_size"),
        max_model_len=number("max_position_embeddings", "n_positions", default=131_072),
        tied_embeddings=bool(config.get("tie_word_embeddings", kind in _TIED)),
        gated=bool(config.get("gated", kind not in _UNGATED)),
        latent=latent,
        experts=experts,
        sliding_window=number("sliding_window", default=0, least=0) or None,
        num_sliding_layers=_sliding_layers(name, kind, config, num_layers),
        quantization=_quantization(_section(name, "quantization_config", config.get("quantization_config"))),
    )


def _section(name: str, key: str, value: object) -> Mapping[str, Any]:
    """A part of a config that has keys; empty where it is left out."""
    if not isinstance(value, Mapping | None):
        raise ConfigError(f"{name}: {key} is {str(value)[:40]!r}; wanted keys with values, as in a config.json")
    return value or {}


def _number(name: str, config: Mapping[str, Any], *keys: str, default: int | None = None, least: int = 1) -> int:
    """The first of `keys` that the config has."""
    stated = ((key, config[key]) for key in keys if config.get(key) is not None)
    key, value = next(stated, (keys[0], default))
    if value is None:
        raise ConfigError(f"{name}: its config has no {key}; the planner needs it")
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name}: {key} is {value!r}; it must be a whole number of at least {least}")
    return value


def _sliding_layers(name: str, kind: str, config: Mapping[str, Any], num_layers: int) -> int:
    """Layers that attend to a window only; a window that no layer is said to use counts for none."""
    if not config.get("sliding_window"):
        return 0
    if config.get("sliding_layers") is not None:
        return _number(name, config, "sliding_layers", least=0)
    if kinds := config.get("layer_types"):
        if not isinstance(kinds, list):
            raise ConfigError(f"{name}: layer_types is {kinds!r}; it must be a list")
        return sum(kind == "sliding_attention" for kind in kinds)
    if full_every := _number(name, config, "sliding_window_pattern", default=_FULL_EVERY.get(kind, 0), least=0):
        return num_layers - num_layers // full_every
    return 0 if "use_sliding_window" in config and not config["use_sliding_window"] else num_layers


def _quantization(section: Mapping[str, Any]) -> WeightDtype | None:
    """The number type of a quantised checkpoint's weights; None where the config has no such section."""
    method, bits = str(section.get("quant_method", "")).lower(), section.get("bits")
    if method in ("fp8", "fbgemm_fp8"):
        return "fp8"
    if method == "mxfp4":
        return "fp4"
    if bits == 8:
        return "int8"
    return "int4" if bits == 4 or method in ("awq", "gptq") else None
