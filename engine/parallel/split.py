"""Cut a loaded model down to one rank's share, by the plan that transformers ships with the model.

The plan (`tp_plan`) says which projection is split which way. Cutting is ours: `from_pretrained(tp_plan="auto")` keeps
DTensors and unwraps them in a new forward of each projection on every call, so merged projections, packed CPU weights
and fused layers, which all need plain `nn.Linear`s, would be lost, and it cannot place fewer KV heads than ranks. Here
a rank ends with plain local weights; a sum over the ranks follows where the plan ends a split.

What the plan gathers at once stays whole on every rank: query, key and value projections whose norm spans all heads
(OLMo 2) or that are one matrix (Phi-3). Embeddings stay whole too: a lookup is cheaper than a sum over ranks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ...core.errors import ConfigError, ModelUnsupported
from .group import RankGroup

_WHOLE = frozenset(
    {"embedding_rowwise", "embedding_colwise", "replicated_with_grad_allreduce", "mla_kv_a_proj", "replicate"}
)
_KEYS_AND_VALUES = ("k_proj", "v_proj")


def check_divides(config: PretrainedConfig, size: int) -> None:
    """Raises: ConfigError: the attention heads cannot be shared out evenly among so many ranks."""
    text = config.get_text_config()
    heads = int(text.num_attention_heads)
    kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
    if heads % size or (kv_heads % size and size % kv_heads):
        fitting = [n for n in range(1, heads + 1) if not heads % n and not (kv_heads % n and n % kv_heads)]
        raise ConfigError(
            f"--tensor-parallel is {size}, which does not divide the model's {heads} attention heads and {kv_heads} KV "
            f"heads; use one of {', '.join(map(str, fitting))}"
        )


@torch.no_grad()
def split(model: PreTrainedModel, group: RankGroup) -> None:
    """Keep this rank's part of every weight that the plan splits.

    Raises: ModelUnsupported: there is no plan for this model, or one with unknown parts. ConfigError: a size does not
    divide.
    """
    plan = dict(model.tp_plan)
    if not any(style in ("rowwise", "rowwise_split_input", "moe_tp_experts") for style in plan.values()):
        raise ModelUnsupported(
            f"{model.config.model_type} cannot be split over devices: transformers has no tensor-parallel plan for it; "
            "use --tensor-parallel 1"
        )
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if (style := plan.get(_pattern(name))) is not None:
            _split_module(name, module, style, modules[name.rpartition(".")[0]], group)
    for name, parameter in list(model.named_parameters()):
        if (style := plan.get(_pattern(name))) is not None:
            owner, _, own_name = name.rpartition(".")
            part = nn.Parameter(_split_parameter(name, parameter, style, group), requires_grad=False)
            setattr(modules[owner], own_name, part)


def _pattern(name: str) -> str:
    """model.layers.*.mlp of model.layers.3.mlp."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _split_module(name: str, module: nn.Module, style: str, parent: nn.Module, group: RankGroup) -> None:
    own_name = name.rpartition(".")[2]
    if style in _WHOLE:
        return
    if style == "moe_tp_experts":
        _sum_output(module, group)
        return
    if not isinstance(module, nn.Linear):
        raise _unknown(name, style)
    packed_mlp = hasattr(parent, "gate_up_proj")  # one matrix for gate and up, which the MLP cuts in halves
    if style == "colwise" and own_name in _KEYS_AND_VALUES:
        _keep_kv_heads(name, module, parent, group)
    elif style == "colwise":
        _keep_rows(module, _share(name, module.out_features, group))
    elif style == "colwise_gather_output" and own_name == "gate_up_proj":
        _keep_rows(module, _packed_share(name, module.out_features, group))
    elif style == "colwise_gather_output" and own_name == "lm_head":
        if module.out_features % group.size == 0:  # else every rank computes all logits
            _keep_rows(module, _share(name, module.out_features, group))
            module.register_forward_hook(lambda _, __, logits: group.gather(logits))
    elif style == "rowwise" or (style == "rowwise_split_input" and packed_mlp):
        _keep_columns(module, _share(name, module.in_features, group), group)
    elif style not in ("colwise_gather_output", "rowwise_split_input"):
        raise _unknown(name, style)


def _split_parameter(name: str, parameter: Tensor, style: str, group: RankGroup) -> Tensor:
    if style == "packed_colwise" and parameter.dim() == 3:  # [experts, gate and up, in]
        return parameter[:, _packed_share(name, parameter.shape[1], group)].clone()
    if style == "rowwise" and parameter.dim() == 3:  # [experts, out, in]
        return parameter[..., _share(name, parameter.shape[2], group)].clone()
    raise _unknown(name, style)


def _share(name: str, size: int, group: RankGroup) -> slice | Tensor:
    """This rank's places among `size`."""
    if size % group.size:
        raise ConfigError(
            f"--tensor-parallel is {group.size}, which does not divide the {size} features of {name}; use a divisor"
        )
    part = size // group.size
    return slice(group.rank * part, (group.rank + 1) * part)


def _packed_share(name: str, size: int, group: RankGroup) -> Tensor:
    """This rank's places in each half."""
    half = torch.arange(size // 2)[_share(name, size // 2, group)]
    return torch.cat((half, half + size // 2))


def _keep_kv_heads(name: str, module: nn.Linear, attention: nn.Module, group: RankGroup) -> None:
    """This rank's KV heads; where there are fewer than ranks, several ranks hold the same one."""
    dim = int(attention.head_dim)  # type: ignore[arg-type]
    heads = module.out_features // dim
    if heads >= group.size:
        _keep_rows(module, _share(name, module.out_features, group))
        return
    head = group.rank * heads // group.size
    _keep_rows(module, slice(head * dim, (head + 1) * dim))
    # The model's own attention repeats each KV head so many times.
    groups = int(attention.num_key_value_groups)  # type: ignore[arg-type]
    if module is attention.k_proj:
        attention.num_key_value_groups = groups * heads // group.size  # type: ignore[assignment]


def _keep_rows(module: nn.Linear, rows: slice | Tensor) -> None:
    module.weight = nn.Parameter(module.weight[rows].clone(), requires_grad=False)
    module.out_features = module.weight.shape[0]
    if module.bias is not None:
        module.bias = nn.Parameter(module.bias[rows].clone(), requires_grad=False)


def _keep_columns(module: nn.Linear, columns: slice | Tensor, group: RankGroup) -> None:
    part = module.weight[:, columns].clone(memory_format=torch.contiguous_format)
    module.weight = nn.Parameter(part, requires_grad=False)
    module.in_features = part.shape[1]
    bias = module._parameters["bias"]
    module.register_parameter("bias", None)  # added once, to the sum
    if bias is None:
        _sum_output(module, group)
        return
    module.register_buffer("summed_bias", bias.detach(), persistent=False)  # moves with the module
    module.register_forward_hook(lambda own, _, output: group.sum(output) + own.summed_bias)


def _sum_output(module: nn.Module, group: RankGroup) -> None:
    # A hook, not a new forward: packing and merging replace forwards.
    hook: Callable[[nn.Module, object, Tensor], Tensor] = lambda _, __, output: group.sum(output)  # noqa: E731
    module.register_forward_hook(hook)


def _unknown(name: str, style: str) -> ModelUnsupported:
    return ModelUnsupported(
        f"cannot split {name} over devices: its plan is {style!r}, which is not known; use --tensor-parallel 1"
    )
