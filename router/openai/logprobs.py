"""Log probabilities in the two shapes that OpenAI has for them."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from ...proto import inference_pb2 as pb
from .responses import ChatLogprobs, CompletionLogprobs


def chat_logprobs(rows: Iterable[pb.TokenLogprob]) -> ChatLogprobs:
    return {
        "content": [
            {
                "token": _text(row.text),
                "logprob": row.logprob,
                "bytes": list(row.text),
                "top_logprobs": [
                    {"token": _text(top.text), "logprob": top.logprob, "bytes": list(top.text)} for top in row.top
                ],
            }
            for row in rows
        ],
        "refusal": None,
    }


class CompletionTokens:
    """Tokens of one choice as completions show them; knows how much text came before."""

    def __init__(self, num_top: int, text_offset: int = 0) -> None:
        self._num_top = num_top
        self._offset = text_offset
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character's tokens share its offset

    def take(self, rows: Sequence[pb.TokenLogprob]) -> CompletionLogprobs:
        shown: CompletionLogprobs = {
            "tokens": [_name(row.text) for row in rows],
            "token_logprobs": [row.logprob if row.rank else None for row in rows],
            "top_logprobs": None,
            "text_offset": [],
        }
        if self._num_top:
            shown["top_logprobs"] = [
                {_name(top.text): top.logprob for top in row.top} if row.rank else None for row in rows
            ]
        for row in rows:
            shown["text_offset"].append(self._offset)
            self._offset += len(self._decoder.decode(row.text))
        return shown


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def _name(data: bytes) -> str:
    r"""A token's text; part of a character as OpenAI writes it: bytes:\xe2\x80."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
