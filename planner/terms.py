"""Ideal seconds of one engine step, term by term: what a data sheet alone would allow a tensor-parallel group."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .gpus import GpuSpec
from .models import KV_BYTES, WEIGHT_BYTES, KvCacheDtype, ModelSpec, WeightDtype, head_bytes

LAUNCH_S = 10e-6  # unit of a layer's fixed cost and of a collective's
_ACTIVATION_BYTES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """One model on one worker: a tensor-parallel group of equal devices."""

    model: ModelSpec
    gpu: GpuSpec
    tp: int
    dtype: WeightDtype
    kv_dtype: KvCacheDtype


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTerms:
    """Ideal seconds: of every step, and of each token, sequence, context token and attended pair in it."""

    launch_s: float  # each step: layers
    weights_s: float  # each step: reading what every token needs
    experts_s: float  # reading all routed experts; a step reads those that its tokens chose
    expert_share: float  # of the experts that one token chooses; 0 where there are none
    token_s: float  # each token: products with the weights
    head_s: float  # each sampled token: product with the head
    context_s: float  # each token of context, in a decode step: reading its KV at layers of full attention
    window_s: float  # the same at layers with a sliding window
    window: float  # tokens of that window
    pair_s: float  # each (query, key) pair of a prefill: attention's arithmetic
    collective_s: float  # each step: starting the collectives
    collective_token_s: float  # each token: moving activations between the ranks

    def expert_fraction(self, num_tokens: float) -> float:
        """Of the experts' weights, what a step of so many tokens reads, if tokens choose independently."""
        return 1 - (1 - self.expert_share) ** num_tokens if self.expert_share else 0.0


def step_terms(deployment: Deployment) -> StepTerms:
    """Terms of a deployment.

    Products scale with 1 / tp; KV of fewer heads than ranks is read by several of them; a collective moves
    2 (tp - 1) / tp of the activations, twice a layer, and takes log2(tp) rounds to start.
    """
    model, gpu, tp = deployment.model, deployment.gpu, deployment.tp
    element, dtype = WEIGHT_BYTES[deployment.dtype], deployment.dtype
    flops, half_flops = gpu.flops_for(dtype), gpu.flops_for("bfloat16" if dtype != "float32" else dtype)
    dense_bytes = model.dense_parameters * element + model.head_parameters * head_bytes(dtype)
    experts = model.experts
    rounds = math.log2(tp) if tp > 1 else 0.0
    moved = 2 * model.num_layers * model.hidden_size * _ACTIVATION_BYTES * 2 * (tp - 1) / tp
    full = (model.num_layers - model.num_sliding_layers) / model.num_layers
    context_s = _context_s(deployment, half_flops)
    return StepTerms(
        launch_s=model.num_layers * LAUNCH_S,
        weights_s=dense_bytes / tp / gpu.bandwidth,
        experts_s=model.expert_parameters * element / tp / gpu.bandwidth,
        expert_share=experts.num_active / experts.num_experts if experts else 0.0,
        token_s=2 * model.active_parameters / tp / flops,
        head_s=2 * model.head_parameters / tp / half_flops,
        context_s=context_s * full,
        window_s=context_s * (1 - full),
        window=float(model.sliding_window or 0),
        pair_s=model.attention_flops_per_pair / tp / half_flops,
        collective_s=2 * model.num_layers * rounds * LAUNCH_S,
        collective_token_s=moved / gpu.link_bandwidth,
    )


def _context_s(deployment: Deployment, flops: float) -> float:
    """Each token of context in a decode step, as if every layer attended to it: its bytes, or latent arithmetic."""
    model, tp = deployment.model, deployment.tp
    elements = model.num_layers * model.kv_elements_per_layer
    read_s = elements * KV_BYTES[deployment.kv_dtype] * model.kv_copies(tp) / tp / deployment.gpu.bandwidth
    if (latent := model.latent) is None:
        return read_s
    dims = 2 * latent.kv_rank + latent.rope_dim  # all heads share the compressed vector, so arithmetic can be the limit
    return max(read_s, 2.0 * model.num_layers * model.num_heads * dims / tp / flops)
