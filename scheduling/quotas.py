"""What each API key may have: requests and tokens a minute, and requests at a time. Time is an argument."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..core.api_key import ApiKey
from ..core.errors import RateLimited

_RETRY_CONCURRENT_S = 1.0  # when one of the key's own requests will end, nobody knows
_PRUNE_ABOVE = 1_024  # keys remembered; those that have all of their allowance back need no memory


@dataclass(slots=True, kw_only=True)
class _Account:
    """What a key has left; without a limit, infinity. Allowances flow back evenly and fill up to a minute's worth."""

    requests: float
    tokens: float  # below 0: an answer was longer than what was left
    at: float
    num_live: int = 0


class Quotas:
    """Of every key that has limits."""

    def __init__(self) -> None:
        self._accounts: dict[str, _Account] = {}

    def begin(self, key: ApiKey, num_prompt_tokens: int, now: float, *, resumes: bool = False) -> None:
        """A request begins; `end` must follow.

        One that `resumes` had its turn at a router that died, whose counts died with it: it may overdraw its key's
        allowance by as much again, so that what a key has under way at two routers ends at one.

        Raises: RateLimited: the key has had its allowance; nothing began.
        """
        if not _has_limits(key):
            return
        account = self._account(key, now)
        overdraft = 1 if resumes else 0  # in allowances
        if key.max_concurrent is not None and account.num_live >= key.max_concurrent * (1 + overdraft):
            raise RateLimited(
                f"API key {key.name!r} has {account.num_live:,} requests running, its limit is "
                f"{key.max_concurrent:,}; wait for one to end or ask the operator for more",
                retry_after_s=_RETRY_CONCURRENT_S,
            )
        if key.max_requests_per_min is not None and account.requests + overdraft * key.max_requests_per_min < 1:
            raise RateLimited(
                f"API key {key.name!r} has made its {key.max_requests_per_min:,} requests a minute; "
                "try again later or ask the operator for more",
                retry_after_s=(1 - account.requests) * 60 / key.max_requests_per_min,
            )
        if key.max_tokens_per_min is not None:
            needed = min(num_prompt_tokens, key.max_tokens_per_min)  # a longer prompt takes the whole minute
            if account.tokens + overdraft * key.max_tokens_per_min < needed:
                raise RateLimited(
                    f"API key {key.name!r} has had its {key.max_tokens_per_min:,} tokens a minute; "
                    "try again later or ask the operator for more",
                    retry_after_s=(needed - account.tokens) * 60 / key.max_tokens_per_min,
                )
        account.requests -= 1
        account.tokens -= num_prompt_tokens
        account.num_live += 1

    def end(self, key: ApiKey, num_output_tokens: int, now: float) -> None:
        """A request that began has ended; its answer is charged."""
        if not _has_limits(key):
            return
        account = self._account(key, now)
        account.num_live -= 1
        account.tokens -= num_output_tokens

    def take_back(self, key: ApiKey, num_prompt_tokens: int, now: float) -> None:
        """A request that began was refused for lack of room: it does not count."""
        if not _has_limits(key):
            return
        self.end(key, -num_prompt_tokens, now)
        self._account(key, now).requests += 1

    def _account(self, key: ApiKey, now: float) -> _Account:
        """As of now."""
        account = self._accounts.get(key.name)
        if account is None:
            self._prune(now)
            account = _Account(requests=math.inf, tokens=math.inf, at=now)
            self._accounts[key.name] = account
        minutes = (now - account.at) / 60
        account.requests = _refilled(account.requests, key.max_requests_per_min, minutes)
        account.tokens = _refilled(account.tokens, key.max_tokens_per_min, minutes)
        account.at = now
        return account

    def _prune(self, now: float) -> None:
        if len(self._accounts) >= _PRUNE_ABOVE:
            self._accounts = {
                name: account
                for name, account in self._accounts.items()
                if account.num_live or account.tokens < 0 or now - account.at < 60
            }


def _refilled(left: float, most: int | None, minutes: float) -> float:
    """What is left of a minute's allowance by now. Without a limit nothing is used up, for one that comes later."""
    return math.inf if most is None else min(most, left + minutes * most)


def _has_limits(key: ApiKey) -> bool:
    return key.max_concurrent is not None or key.max_requests_per_min is not None or key.max_tokens_per_min is not None
