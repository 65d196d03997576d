"""Speed up an unmodified transformers model in place: merged projections and fused elementwise kernels.

Nothing is matched by the model's name. Each candidate is recognised by its structure, run beside the original on random
input, and replaced only where the two agree, so that an architecture that computes something else keeps its own code.

Ours rather than torch.compile or liger-kernel, because it is the fastest at every length and the only one that pays for
short prompts, where a step is bound by what the host launches. Llama-3.1-8B shape on an H100, ms for a prompt of 512 /
2,048 / 8,192 tokens, no graphs: transformers' own 50.3 / 64.5 / 263.9, torch.compile of each layer 98.6 / 97.9 / 222.8
(its guards, before and behind our attention), liger-kernel 57.4 / 58.6 / 220.1, this 33.7 / 50.6 / 219.2
(`python -m splitserve.benchmarks.engine --device cuda --compare-fusions`).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..attention import AttentionRules, current
from . import deferred
from .batch import GpuBatch
from .last_layer import LastLayer, find, logits_of
from .layer_kernels import add_rms_norm, rms_norm, rotary, silu_multiply

logger = logging.getLogger(__name__)

_TOLERANCE = 2e-2  # relative, half precision; float32 gets a thousandth of it


@dataclass(slots=True)
class Fusions:
    """How many modules were replaced."""

    merged: int = 0
    norms: int = 0
    activations: int = 0
    rotary: str = "its own"
    layers: int = 0  # residual sums joined with the norm that follows
    last_layer_trimmed: bool = False  # it goes on with the tokens whose logits are wanted
    kept: list[str] = field(default_factory=list)  # candidates whose own code computes something else


@torch.inference_mode()
def fuse(model: PreTrainedModel) -> Fusions:
    """Replace what can be replaced; call it before the model serves."""
    done = Fusions()
    for module in model.modules():
        for names in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            done.merged += _merge(module, names)
        done.norms += _fuse_norm(module, done)
        done.activations += _fuse_activation(module, done)
    calls = _Calls(model)
    _fuse_rotary(model, calls, done)
    done.layers = _fuse_layers(model, calls)
    done.last_layer_trimmed = _trim_last_layer(model, calls)
    logger.info(
        "fused %d norms, %d activations, %d residual sums, %d merged projections, rotary embedding: %s%s%s",
        done.norms,
        done.activations,
        2 * done.layers,
        done.merged,
        done.rotary,
        ", last layer trimmed" if done.last_layer_trimmed else "",
        f"; kept their own code: {', '.join(sorted(set(done.kept)))}" if done.kept else "",
    )
    return done


def _agree(ours: Tensor, theirs: Tensor) -> bool:
    bound = _TOLERANCE if ours.dtype != torch.float32 else _TOLERANCE * 1e-3
    return bool((ours.float() - theirs.float()).abs().max() <= bound * theirs.float().abs().max())


class _Merged:
    """Several linear layers of one input as one product; the first call computes it, each takes its part.

    gate and up of an 8B model on an H100, merged and separate, ms: 0.108 and 0.139 at 64 tokens, 0.136 and 0.179 at
    256, 0.629 and 0.666 at 2,048.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, sizes: list[int]) -> None:
        self.weight = weight  # [sum(sizes), in_features]
        self.bias = bias
        self.sizes = sizes
        self._input: Tensor | None = None
        self._parts: list[Tensor | None] = []

    def part(self, index: int, x: Tensor) -> Tensor:
        if self._input is not x:
            self._input = x
            self._parts = list(torch.split(F.linear(x, self.weight, self.bias), self.sizes, dim=-1))
        part, self._parts[index] = self._parts[index], None
        if all(left is None for left in self._parts):
            self._input = None  # the activations are not ours to keep
        assert part is not None, "a projection was asked twice for the same input"
        return part


def _merge(module: nn.Module, names: tuple[str, ...]) -> int:
    """Lay the weights of `names` side by side; each module's own weight becomes a view of them."""
    found = [getattr(module, name, None) for name in names]
    linears = [linear for linear in found if type(linear) is nn.Linear]
    if len(linears) != len(names) or len({(x.in_features, x.bias is None, x.weight.dtype) for x in linears}) != 1:
        return 0
    sizes = [linear.out_features for linear in linears]
    weight = torch.cat([linear.weight for linear in linears])
    bias = None if linears[0].bias is None else torch.cat([linear.bias for linear in linears])
    merged = _Merged(weight, bias, sizes)
    for index, (linear, part) in enumerate(zip(linears, torch.split(weight, sizes), strict=True)):
        linear.weight = nn.Parameter(part, requires_grad=False)
        linear.forward = _projection(merged, index)  # type: ignore[method-assign, assignment]
    return 1


def _projection(merged: _Merged, index: int) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        return merged.part(index, x)

    return forward


def _fuse_norm(module: nn.Module, done: Fusions) -> int:
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = getattr(module, "weight", None)
    if "RMSNorm" not in type(module).__name__ or epsilon is None or not isinstance(weight, Tensor) or weight.dim() != 1:
        return 0
    x = torch.randn(3, weight.shape[0], dtype=weight.dtype, device=weight.device)
    theirs = module(x)
    for one_plus in (False, True):
        if _agree(rms_norm(x, weight, epsilon, one_plus=one_plus), theirs):
            module.forward = _Norm(weight, float(epsilon), one_plus)
            return 1
    done.kept.append(type(module).__name__)
    return 0


class _Norm:
    """A fused norm that may find its work done: the layer before it adds and normalises in one pass."""

    def __init__(self, weight: Tensor, epsilon: float, one_plus: bool) -> None:
        self.weight = weight
        self.epsilon = epsilon
        self.one_plus = one_plus
        self._done: tuple[Tensor, Tensor] | None = None  # (sum, its norm)

    def __call__(self, x: Tensor) -> Tensor:
        done, self._done = self._done, None
        if done is not None and done[0] is x:
            return done[1]
        return rms_norm(x, self.weight, self.epsilon, one_plus=self.one_plus)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(x + residual, its norm)."""
        return add_rms_norm(x, residual, self.weight, self.epsilon, one_plus=self.one_plus)

    def add_ahead(self, x: Tensor, residual: Tensor) -> Tensor:
        """x + residual; the call with it that follows costs nothing."""
        self._done = self.add(x, residual)
        return self._done[0]


def _fuse_activation(module: nn.Module, done: Fusions) -> int:
    gate, up, down = (getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj"))
    if not all(type(linear) is nn.Linear for linear in (gate, up, down)):
        return 0
    assert isinstance(gate, nn.Linear)
    assert isinstance(up, nn.Linear)
    assert isinstance(down, nn.Linear)

    def forward(x: Tensor) -> Tensor:
        return down(silu_multiply(gate(x), up(x)))  # type: ignore[no-any-return]

    x = torch.randn(1, 3, gate.in_features, dtype=gate.weight.dtype, device=gate.weight.device)
    if not _agree(forward(x), module(x)):
        done.kept.append(type(module).__name__)
        return 0
    module.forward = forward
    return 1


class _Echo:
    """Stands for attention while layers are compared: each token gets its own value."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Tensor]] = []  # queries and keys of each layer

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rules: AttentionRules) -> Tensor:
        self.seen.append((query, key))
        return value[0].transpose(0, 1).repeat_interleave(query.shape[1] // key.shape[1], dim=1)


class _Calls:
    """With what arguments the model calls its layers, from a forward pass of three tokens."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.echo = _Echo()
        self.arguments: dict[nn.Module, dict[str, Any]] = {}
        self.model = model
        layers = getattr(model.base_model, "layers", None)
        self.layers: list[nn.Module] = list(layers) if isinstance(layers, nn.ModuleList) else []
        hooks = [layer.register_forward_pre_hook(self._note, with_kwargs=True) for layer in self.layers]
        self.run()
        for hook in hooks:
            hook.remove()

    def run(self, rows: Tensor | None = None) -> Tensor:
        """Logits of a forward pass, all or those of some of its tokens; `echo.seen` are its queries and keys."""
        self.echo.seen.clear()
        ids = torch.arange(1, 4, device=self.model.device)[None]
        with self.attention():
            return logits_of(self.model, rows, input_ids=ids, position_ids=ids - 1, use_cache=False)

    @contextmanager
    def attention(self) -> Iterator[None]:
        token = current.set(self.echo)
        try:
            yield
        finally:
            current.reset(token)

    def _note(self, layer: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        if len(arguments) == 1:  # the hidden states; anything else by position is not the usual layer
            self.arguments[layer] = named


def _fuse_layers(model: PreTrainedModel, calls: _Calls) -> int:
    """Layers of the usual kind: x += attention(norm(x)); x += mlp(norm(x)), with one norm behind the last."""
    last = getattr(getattr(model.base_model, "norm", None), "forward", None)
    following = [getattr(getattr(layer, "input_layernorm", None), "forward", None) for layer in calls.layers[1:]]
    fused = 0
    for layer, after in zip(calls.layers, [*following, last], strict=True):
        between = getattr(getattr(layer, "post_attention_layernorm", None), "forward", None)
        if not (isinstance(between, _Norm) and isinstance(after, _Norm) and layer in calls.arguments):
            continue
        forward = LastLayer(layer, between, after) if after is last else _layer(layer, between, after)
        x = torch.randn(1, 3, between.weight.shape[0], dtype=between.weight.dtype, device=between.weight.device)
        try:
            with calls.attention():
                theirs = layer(x.clone(), **calls.arguments[layer])
                ours = forward(x.clone(), **calls.arguments[layer])
                agree = _agree(ours, theirs) and _agree(after(ours), after(theirs))
        except (AttributeError, TypeError, ValueError, RuntimeError):
            continue
        if agree:
            layer.forward = forward
            fused += 1
    return fused


def _layer(layer: Any, between: _Norm, after: _Norm) -> Callable[..., Tensor]:
    def forward(hidden_states: Tensor, **named: Any) -> Tensor:
        attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **named)
        residual, x = between.add(attended, hidden_states)
        return after.add_ahead(layer.mlp(x), residual)

    return forward


def _trim_last_layer(model: PreTrainedModel, calls: _Calls) -> bool:
    """Whether the last layer may leave out tokens: what is behind it treats each token alone."""
    last = find(model)
    if last is None:
        return False
    every, rows = calls.run(), torch.tensor([2, 0], device=model.device)
    try:
        agree = _agree(calls.run(rows), every[:, rows])
    except (AttributeError, TypeError, ValueError, RuntimeError):
        agree = False
    if not agree:
        calls.layers[-1].forward = _layer(calls.layers[-1], last.between, last.after)
    return agree


def _fuse_rotary(model: PreTrainedModel, calls: _Calls, done: Fusions) -> None:
    """The half-split rotary embedding is a function of the model's own file, which every layer looks up by name.

    Where its results reach the attention function untouched, it is left to that.
    """
    file = sys.modules[type(model).__module__]
    original = getattr(file, "apply_rotary_pos_emb", None)
    if original is None:
        return
    original = getattr(original, "_splitserve_original", original)
    device, dtype = model.device, model.dtype
    q, k = (torch.randn(1, heads, 5, 64, dtype=dtype, device=device) for heads in (4, 2))
    angle = torch.rand(1, 5, 32, device=device).repeat(1, 1, 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    state = _RotaryState()

    def fused(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: object, **named: object) -> tuple[Tensor, Tensor]:
        if not q.is_cuda or rest or named or q.dim() != 4 or q.shape[0] != 1 or q.stride(3) != 1:
            result: tuple[Tensor, Tensor] = original(q, k, cos, sin, *rest, **named)
            return result
        if state.deferred and isinstance(current.get(None), GpuBatch):
            deferred.defer(q, k, cos, sin)
            return q, k
        rotated = rotary(q, cos, sin), rotary(k, cos, sin)
        if isinstance(current.get(None), _Echo):
            state.results.append(rotated)
        return rotated

    try:
        theirs = original(q, k, cos, sin)
        agree = all(_agree(a, b) for a, b in zip(fused(q, k, cos, sin), theirs, strict=True))
    except (TypeError, RuntimeError, ValueError):
        agree = False
    if not agree:
        done.kept.append("apply_rotary_pos_emb")
        return
    fused._splitserve_original = original  # type: ignore[attr-defined]
    file.apply_rotary_pos_emb = fused  # type: ignore[attr-defined]
    calls.run()
    reached = [q is a and k is b for (q, k), (a, b) in zip(calls.echo.seen, state.results, strict=False)]
    state.deferred = bool(reached) and all(reached) and len(reached) == len(calls.echo.seen)
    state.results.clear()
    calls.echo.seen.clear()
    done.rotary = "with the KV write" if state.deferred else "fused"


@dataclass(slots=True)
class _RotaryState:
    deferred: bool = False
    results: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # of the layers of the probe
