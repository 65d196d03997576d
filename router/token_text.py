"""Each token's own text, as bytes: a token may hold part of a character."""

from __future__ import annotations

import re
from dataclasses import replace

from tokenizers import Tokenizer

from ..core.logprobs import TokenLogprob

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


class TokenText:
    """Bytes of tokens, for tokenizers that spell bytes as letters (GPT-2's way) and those that mark spaces with ▁."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._added = {i: str(token.content) for i, token in tokenizer.get_added_tokens_decoder().items()}
        state = tokenizer.decoder.__getstate__() if tokenizer.decoder is not None else b""
        self._byte_level = b"ByteLevel" in state
        self._known: dict[int, bytes] = {}

    def of(self, token_id: int) -> bytes:
        """Empty for an id that the tokenizer does not know; a special token's is its name."""
        text = self._known.get(token_id)
        if text is None:
            text = self._known[token_id] = self._spell(token_id)
        return text

    def name(self, row: TokenLogprob) -> TokenLogprob:
        """The row with the text of its tokens."""
        top = tuple(replace(other, text=self.of(other.token_id)) for other in row.top)
        return replace(row, text=self.of(row.token_id), top=top)

    def _spell(self, token_id: int) -> bytes:
        if (added := self._added.get(token_id)) is not None:
            return added.encode()
        piece = self._tokenizer.id_to_token(token_id)
        if piece is None:
            return b""
        if self._byte_level:
            return bytes(_LETTER_BYTES[letter] for letter in piece if letter in _LETTER_BYTES)
        if (match := _BYTE_PIECE.fullmatch(piece)) is not None:
            return bytes([int(match[1], 16)])
        return str(piece).replace("▁", " ").encode()


def _letter_bytes() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 letters stand for themselves, the other bytes for letters from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_LETTER_BYTES = _letter_bytes()
