"""How likely tokens were by the model's own logits, computed on whatever device holds them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..core.logprobs import TokenLogprob, TopLogprob
from ..scheduling.step_plan import ScheduledTokens


@dataclass(frozen=True, slots=True, kw_only=True)
class LogprobRows:
    """One row per token, before they become Python objects."""

    token_ids: Tensor  # [rows] int64
    logprobs: Tensor  # [rows] fp32
    ranks: Tensor  # [rows] int64, from 1
    top_ids: Tensor  # [rows, top] int64
    top_logprobs: Tensor  # [rows, top] fp32

    @classmethod
    def of(cls, logits: Tensor, token_ids: Tensor, num_top: int) -> LogprobRows:
        """Of `token_ids` [rows] among `logits` [rows, vocab] as the model gave them, in any dtype."""
        logits = logits.float()
        total = logits.logsumexp(dim=-1, keepdim=True)
        own = logits.gather(1, token_ids[:, None])
        top = logits.topk(min(num_top, logits.shape[1]), dim=-1)
        return cls(
            token_ids=token_ids,
            logprobs=(own - total)[:, 0],
            ranks=(logits > own).sum(dim=-1) + 1,
            top_ids=top.indices,
            top_logprobs=top.values - total,
        )

    def first(self, count: int) -> LogprobRows:
        return LogprobRows(**{f.name: getattr(self, f.name)[:count] for f in fields(self)})

    def behind(self, count: int) -> LogprobRows:
        return LogprobRows(**{f.name: getattr(self, f.name)[count:] for f in fields(self)})

    def to_host(self) -> LogprobRows:
        """A copy in pinned memory, complete when the current stream has come so far."""

        def copy(values: Tensor) -> Tensor:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            return host.copy_(values, non_blocking=True)

        return LogprobRows(**{f.name: copy(getattr(self, f.name)) for f in fields(self)})

    def tokens(self, num_top: Sequence[int]) -> Iterator[TokenLogprob]:
        """Each row with as many alternatives as it asked for; `num_top` [rows]."""
        rows = zip(
            self.token_ids.tolist(),
            self.logprobs.tolist(),
            self.ranks.tolist(),
            self.top_ids.tolist(),
            self.top_logprobs.tolist(),
            num_top,
            strict=True,
        )
        for token_id, logprob, rank, top_ids, top_logprobs, count in rows:
            top = zip(top_ids[:count], top_logprobs[:count], strict=True)
            yield TokenLogprob(
                token_id=token_id,
                logprob=logprob,
                rank=rank,
                top=tuple(TopLogprob(token_id=other, logprob=value) for other, value in top),
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLogprobs:
    """The logprobs that a step's requests asked for, on the device or on the host."""

    sampling: Sequence[ScheduledTokens]  # with logprobs of their new tokens: the first rows
    prompts: Sequence[tuple[ScheduledTokens, range]]  # and positions of prompt tokens: the rows behind
    rows: LogprobRows

    @classmethod
    def of(
        cls, logits: Tensor, parts: Sequence[ScheduledTokens], sampling: Sequence[ScheduledTokens], chosen: Tensor
    ) -> StepLogprobs | None:
        """None if nobody asked.

        Args:
            logits: the model's own [len(sampling) + prompt rows, vocab], in the order of `sampled_rows`, `prompt_rows`.
            chosen: [len(sampling)] int64, on the device of `logits`.
        """
        asked = [i for i, part in enumerate(sampling) if part.sequence.request.logprobs is not None]
        prompts = [(part, part.prompt_targets) for part in parts if part.prompt_targets]
        if not asked and not prompts:
            return None
        targets = [part.sequence.token_ids[target] for part, positions in prompts for target in positions]
        at = torch.tensor([*asked, *range(len(sampling), logits.shape[0])], dtype=torch.int64, device=logits.device)
        token_ids = torch.cat((chosen[at[: len(asked)]], torch.tensor(targets, dtype=torch.int64, device=at.device)))
        counts = [sampling[i].sequence.request.logprobs or 0 for i in asked]
        counts += [part.sequence.request.prompt_logprobs or 0 for part, _ in prompts]
        return cls(
            sampling=[sampling[i] for i in asked],
            prompts=prompts,
            rows=LogprobRows.of(logits[at], token_ids, max(counts)),
        )

    def of_tokens(self) -> dict[str, TokenLogprob]:
        counts = [part.sequence.request.logprobs or 0 for part in self.sampling]
        tokens = self.rows.first(len(counts)).tokens(counts)
        return {part.sequence.request_id: token for part, token in zip(self.sampling, tokens, strict=True)}

    def of_prompts(self) -> dict[str, tuple[int, list[TokenLogprob]]]:
        counts = [part.sequence.request.prompt_logprobs or 0 for part, positions in self.prompts for _ in positions]
        tokens = self.rows.behind(len(self.sampling)).tokens(counts)
        return {
            part.sequence.request_id: (positions.start, [next(tokens) for _ in positions])
            for part, positions in self.prompts
        }


def prompt_rows(parts: Sequence[ScheduledTokens]) -> list[int]:
    """Rows among the packed tokens of all parts whose logits tell how likely prompt tokens were."""
    rows, row = [], 0
    for part in parts:
        rows += [row + target - 1 - part.start for target in part.prompt_targets]
        row += part.num_tokens
    return rows
