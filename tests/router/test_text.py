"""Text as it leaves the router: however the tokens come, whole characters, and nothing of a stop string."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from splitserve.core.errors import InvalidRequest
from splitserve.router.text import AnswerText, ModelText
from splitserve.router.token_text import TokenText
from tokenizers import Tokenizer, decoders, models

TEXTS = st.text(alphabet=st.sampled_from("ab<é€😀 \n"), max_size=40)
STOPS = st.lists(st.text(alphabet=st.sampled_from("ab<é€"), min_size=1, max_size=4), max_size=3)


@pytest.fixture(scope="module")
def model_text(tiny: Path) -> ModelText:
    """One token is one byte: every character of more than one is split over tokens."""
    return ModelText(tiny)


def ids(model_text: ModelText, text: str) -> list[int]:
    return model_text.tokenizer.encode(text, add_special_tokens=False).ids


def stopped_at(text: str, stops: list[str]) -> int | None:
    """Where the answer must end: before the stop string that is complete first."""
    found = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    return min(found)[1] if found else None


@given(data=st.data(), text=TEXTS, stops=STOPS)
def test_any_cut_gives_the_same_text(model_text: ModelText, data: st.DataObject, text: str, stops: list[str]) -> None:
    answer, tokens = AnswerText(model_text, stops), ids(model_text, text)
    end = stopped_at(text, stops)
    wanted = text if end is None else text[:end]
    got, used_tokens = "", 0
    while used_tokens < len(tokens) and not answer.stopped:
        size = data.draw(st.integers(1, len(tokens) - used_tokens))
        new, used = answer.push(tokens[used_tokens : used_tokens + size])
        assert answer.stopped or used == size
        got, used_tokens = got + new, used_tokens + used
        assert "\ufffd" not in got
        assert wanted.startswith(got)
    assert answer.stopped == (end is not None)
    assert got + answer.flush() == wanted
    if end is not None:  # tokens after the one that completed the stop string are not part of the answer
        shortest = min(len(text[:at].encode()) for at in range(len(text) + 1) if stopped_at(text[:at], stops) == end)
        assert used_tokens == shortest


@given(data=st.data(), junk=st.lists(st.integers(0, 255), max_size=30))
def test_bytes_that_are_no_text_are_replaced_not_lost(
    model_text: ModelText, data: st.DataObject, junk: list[int]
) -> None:
    """A model may well emit half a character: the answer is what decoding all of its tokens at once gives."""
    answer, got, at = AnswerText(model_text), "", 0
    while at < len(junk):
        size = data.draw(st.integers(1, len(junk) - at))
        got += answer.push(junk[at : at + size])[0]
        at += size
    assert got + answer.flush() == model_text.tokenizer.decode(junk, skip_special_tokens=True)


def test_special_tokens_are_not_text(model_text: ModelText) -> None:
    end = model_text.tokenizer.token_to_id("</s>")
    answer = AnswerText(model_text)
    assert answer.push([*ids(model_text, "ab"), end])[0] + answer.flush() == "ab"


def test_a_held_beginning_of_a_stop_string_leaves_when_it_turns_out_to_be_none(model_text: ModelText) -> None:
    answer = AnswerText(model_text, ["<end>"])
    assert answer.push(ids(model_text, "a<en"))[0] == "a"
    assert answer.push(ids(model_text, "x"))[0] == "<enx"
    assert answer.push(ids(model_text, "<end"))[0] == ""
    assert answer.flush() == "<end"


def test_stop_strings_do_not_count_before_min_tokens(model_text: ModelText) -> None:
    answer = AnswerText(model_text, ["ab"], min_tokens=3)
    assert answer.push(ids(model_text, "abc")) == ("abc", 3)
    assert answer.push(ids(model_text, "xabz")) == ("x", 3)
    assert answer.stopped


def test_a_stop_string_that_begins_before_min_tokens_does_not_count(model_text: ModelText) -> None:
    answer = AnswerText(model_text, ["ab"], min_tokens=1)
    assert answer.push(ids(model_text, "abc")) == ("abc", 3)
    assert not answer.stopped


@given(text=TEXTS)
def test_the_bytes_of_tokens_are_the_text(model_text: ModelText, text: str) -> None:
    assert b"".join(map(model_text.token_text.of, ids(model_text, text))).decode() == text


def test_bytes_of_special_and_unknown_tokens(model_text: ModelText) -> None:
    assert model_text.token_text.of(model_text.tokenizer.token_to_id("</s>")) == b"</s>"
    assert model_text.token_text.of(10**6) == b""


def test_bytes_of_tokens_that_mark_spaces_and_spell_bytes() -> None:
    """As Llama 2's and Gemma's tokenizers do."""
    vocab = {"▁a": 0, "b": 1, "<0xE2>": 2, "<0x82>": 3, "<0xAC>": 4, "▁": 5}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    text = TokenText(tokenizer)
    assert [text.of(i) for i in range(6)] == [b" a", b"b", b"\xe2", b"\x82", b"\xac", b" "]


PIECES = ["▁", "a", "b", "é", "▁a", "▁▁"]
LLAMA_2 = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)
GEMMA = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])


class BytePieces:
    """As much of ModelText as AnswerText needs: a tokenizer with a token for each byte, and then PIECES."""

    def __init__(self, decoder: decoders.Decoder) -> None:
        names = [f"<0x{byte:02X}>" for byte in range(256)] + PIECES
        self.tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
        self.tokenizer.decoder = decoder


@pytest.mark.parametrize("decoder", [LLAMA_2, GEMMA], ids=["llama2", "gemma"])
@given(data=st.data())
def test_tokenizers_that_fall_back_to_bytes_stream_whole_characters(
    data: st.DataObject, decoder: decoders.Decoder
) -> None:
    tokens = BytePieces(decoder)
    character = st.sampled_from("é€😀a ").map(lambda letter: list(letter.encode()))
    piece = st.integers(256, 255 + len(PIECES)).map(lambda token_id: [token_id])
    sent = [token_id for part in data.draw(st.lists(character | piece, max_size=12)) for token_id in part]
    answer = AnswerText(tokens)  # type: ignore[arg-type]
    got = ""
    for token_id in sent:
        got += answer.push([token_id])[0]
        assert "\ufffd" not in got
    assert got + answer.flush() == tokens.tokenizer.decode(sent)


@pytest.mark.parametrize("decoder", [LLAMA_2, GEMMA], ids=["llama2", "gemma"])
@given(sent=st.lists(st.integers(0, 255 + len(PIECES)), max_size=20))
def test_bytes_in_the_middle_that_are_no_text_lose_nothing_else(decoder: decoders.Decoder, sent: list[int]) -> None:
    """Here decoding all tokens at once reads earlier bytes otherwise; what has gone out cannot be called back."""
    answer = AnswerText(BytePieces(decoder))  # type: ignore[arg-type]
    got = "".join(answer.push([token_id])[0] for token_id in sent) + answer.flush()
    letters = "".join(PIECES[token_id - 256].replace("▁", "") for token_id in sent if token_id >= 256)
    rest = iter(got)
    assert all(letter in rest for letter in letters), (got, letters)


@pytest.mark.parametrize("stop", [["a", ""], ["x"] * 17])
def test_bad_stop_strings(model_text: ModelText, stop: list[str]) -> None:
    with pytest.raises(InvalidRequest, match="at most 16, none empty"):
        AnswerText(model_text, stop)
