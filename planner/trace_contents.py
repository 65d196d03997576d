"""Stand-ins for a request's tokens: a simulation knows how many there are and which prompts begin alike, no more."""

from __future__ import annotations

from collections.abc import Iterable, MutableSequence, Sequence
from typing import cast, overload

from ..core.kv_geometry import PREFIX_UNIT
from ..core.request import Request
from .types import SimRequest

TOKEN = 0  # every token of a simulation
_BLOCK_BITS = 24  # of a hash: the place of the block in its prompt
_OWN = 1 << 63  # in the hash of a block that matches only itself


class CountedTokens(MutableSequence[int]):
    """A list of tokens that keeps only its length: a prompt of 100,000 costs no more than one of 10."""

    __slots__ = ("_count",)

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> CountedTokens: ...
    def __getitem__(self, index: int | slice) -> int | CountedTokens:
        if isinstance(index, slice):
            return CountedTokens(len(range(*index.indices(self._count))))
        if not -self._count <= index < self._count:
            raise IndexError(f"token {index} of {self._count}")
        return TOKEN

    def __setitem__(self, index: object, value: object) -> None:
        """All tokens are the same."""

    def __delitem__(self, index: int | slice) -> None:
        self._count -= len(range(*index.indices(self._count))) if isinstance(index, slice) else 1

    def insert(self, index: int, value: int) -> None:
        self._count += 1

    def append(self, value: int) -> None:
        self._count += 1

    def extend(self, values: Iterable[int]) -> None:
        self._count += len(values if isinstance(values, list) else list(values))


class TraceContents:
    """Tokens by number, prefixes by the trace's hash ids. Implements `scheduling.prefix.Contents`.

    Hash ids become keys of whole KV blocks, chained, so that a block matches only behind equal blocks. What has no hash
    id matches only itself.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._chains: dict[tuple[int, int], int] = {}  # (chain so far, next hash id) -> longer chain
        self._prompts: dict[str, list[bytes]] = {}  # request id -> a hash for each full block of its prompt
        self._numbers: dict[str, int] = {}  # request id -> what its unhashed blocks are told apart by
        self._num_entered = 0

    def enter(self, request_id: str, request: SimRequest) -> Request:
        """The request as the schedulers take it; `leave` when it has ended."""
        self._num_entered += 1
        self._numbers[request_id] = self._num_entered
        if request.hash_ids:
            self._prompts[request_id] = self._hashes(request)
        # A range is a prompt of the right length; the tuple itself would cost more than simulating the request.
        prompt = cast(tuple[int, ...], range(request.isl))
        return Request(
            request_id=request_id,
            prompt_token_ids=prompt,
            max_tokens=request.osl,
            ignore_eos=True,
            priority=request.priority,
        )

    def leave(self, request_id: str) -> None:
        self._prompts.pop(request_id, None)
        self._numbers.pop(request_id, None)

    def prompt_hashes(self, request_id: str) -> list[bytes]:
        """Of each full block of the prompt that others may share."""
        return self._prompts.get(request_id, [])

    def token_ids(self, request: Request) -> MutableSequence[int]:
        return CountedTokens(request.num_tokens)

    def extend_hashes(
        self, hashes: list[bytes], token_ids: Sequence[int], request: Request, kv_history: str = "none"
    ) -> None:
        units = self._block_size // PREFIX_UNIT
        prompt = self._prompts.get(request.request_id, ())
        own = _OWN | self._numbers[request.request_id] << _BLOCK_BITS
        for block in range(len(hashes) // units, len(token_ids) // self._block_size):
            block_hash = prompt[block] if block < len(prompt) else (own | block).to_bytes(8, "little")
            hashes.extend([block_hash] * units)

    def _hashes(self, request: SimRequest) -> list[bytes]:
        chains: list[int] = []
        chain = 0
        for hash_id in request.hash_ids:
            chain = self._chains.setdefault((chain, hash_id), len(self._chains) + 1)
            chains.append(chain)
        covered = min(request.isl, len(chains) * request.hash_block_tokens)
        ends = range(self._block_size, covered + 1, self._block_size)
        return [
            (chains[(end - 1) // request.hash_block_tokens] << _BLOCK_BITS | end // self._block_size).to_bytes(
                8, "little"
            )
            for end in ends
        ]
