"""Requests for `Generate` with at least one thing wrong, from a seeded generator."""

from __future__ import annotations

import random
from collections.abc import Callable

from splitserve.proto import inference_pb2

NUMBERS = (float("nan"), float("inf"), float("-inf"), -1e300, 1e300)
Message = inference_pb2.GenerateRequest


def sound(choose: random.Random) -> Message:
    """A request that a router would take."""
    request = Message(max_tokens=choose.randrange(1, 50), min_tokens=choose.randrange(2), stop=["a"])
    kind = choose.randrange(3)
    if kind == 0:
        request.text = "hello " * choose.randrange(1, 5)
    elif kind == 1:
        request.messages.messages.add(role="user", content="hello")
    else:
        request.token_ids.ids.extend(choose.choices(range(256), k=5))
    request.sampling.temperature = choose.random()
    if choose.random() < 0.5:
        request.sampling.logit_bias[choose.randrange(256)] = choose.uniform(-100, 100)
        request.logprobs = choose.randrange(21)
    return request


def spoil_sampling(request: Message, choose: random.Random) -> None:
    name = choose.choice([
        "temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    ])  # fmt: skip
    setattr(request.sampling, name, choose.choice(NUMBERS))


def spoil_integers(request: Message, choose: random.Random) -> None:
    name, value = choose.choice(
        [("top_k", 2**31 + choose.randrange(9)), ("top_k", 2**32 - 1), ("seed", 2**63), ("seed", 2**64 - 1)]
    )
    setattr(request.sampling, name, value)


def spoil_lengths(request: Message, choose: random.Random) -> None:
    choose.choice(
        [
            lambda: setattr(request, "max_tokens", 0),
            lambda: setattr(request, "max_tokens", 2**32 - 1),
            lambda: setattr(request, "min_tokens", request.max_tokens + 1 + choose.randrange(2**31)),
            lambda: setattr(request, "logprobs", 21 + choose.randrange(2**31)),
            lambda: setattr(request, "prompt_logprobs", 21 + choose.randrange(2**31)),
        ]
    )()


def spoil_input(request: Message, choose: random.Random) -> None:
    bad = 260 + choose.randrange(2**32 - 260)
    choose.choice(
        [
            lambda: request.ClearField(request.WhichOneof("input") or "text"),
            lambda: setattr(request, "text", ""),
            lambda: request.messages.CopyFrom(inference_pb2.ChatMessages()),
            lambda: request.token_ids.CopyFrom(inference_pb2.TokenIds()),
            lambda: request.token_ids.CopyFrom(inference_pb2.TokenIds(ids=[1, bad])),
            lambda: request.token_ids.CopyFrom(inference_pb2.TokenIds(ids=[1] * 4096)),
            lambda: request.messages.messages.add(role="user").tool_calls.add(name="f", arguments="{" * 9),
            lambda: request.messages.tools.add(name=""),
            lambda: request.messages.tools.add(name="f", parameters=choose.choice(["[1]", "{", "nul", "[" * 10_000])),
        ]
    )()
    if request.WhichOneof("input") == "messages" and not request.messages.messages:
        request.messages.SetInParent()


def spoil_tokens(request: Message, choose: random.Random) -> None:
    bad = 260 + choose.randrange(2**32 - 260)
    choose.choice(
        [
            lambda: request.stop_token_ids.append(bad),
            lambda: request.received_token_ids.append(bad),
            lambda: request.received_token_ids.extend([1] * min(request.max_tokens + 1, 100)),
            lambda: request.sampling.logit_bias.update({bad: 1.0}),
            lambda: request.sampling.logit_bias.update({1: choose.choice([-100.5, 101.0, float("nan")])}),
            lambda: request.sampling.logit_bias.update(dict.fromkeys(range(301), 0.0)),
        ]
    )()


def spoil_names(request: Message, choose: random.Random) -> None:
    choose.choice(
        [
            lambda: setattr(request, "model", "of somebody else" + "x" * choose.randrange(100)),
            lambda: setattr(request, "idempotency_key", "k" * (257 + choose.randrange(1000))),
            lambda: setattr(request, "protocol_version", 2 + choose.randrange(2**31)),
            lambda: request.stop.append(""),
            lambda: request.stop.extend(["x"] * 16),
        ]
    )()


BAD_FORMATS = {
    "json_object": [False],
    "regex": ["", "(", "[a", "(?=a)", "\\", "x" * 200_001],
    "grammar": ["", "start", "start: nobody", "{}", "%%", "\x00"],
    "json_schema": ["", "{", "[]", "3", '{"type": 3}', '{"$ref": "#/no"}', '{"a": ' * 3000, "null", "false"],
}


def spoil_format(request: Message, choose: random.Random) -> None:
    kind = choose.choice(list(BAD_FORMATS))
    setattr(request.output_format, kind, choose.choice(BAD_FORMATS[kind]))
    if choose.random() < 0.2:
        request.output_format.ClearField("format")
    request.output_format.SetInParent()


SPOILERS: list[Callable[[Message, random.Random], None]] = [
    spoil_sampling, spoil_integers, spoil_lengths, spoil_input, spoil_tokens, spoil_names, spoil_format,
]  # fmt: skip


def malformed(choose: random.Random) -> bytes:
    """A request with at least one thing wrong, as bytes."""
    request = sound(choose)
    kind = choose.randrange(10)
    if kind == 0:  # not protobuf: a field of length 100 with less behind it
        return bytes([choose.choice((0x12, 0x0A, 0x1A)), 100, *choose.randbytes(choose.randrange(99))])
    if kind == 1:  # text that is not UTF-8
        return request.SerializeToString() + bytes([0x0A, 2, 0xC3, 0x28])
    for spoil in choose.sample(SPOILERS, choose.choice((1, 1, 2))):
        spoil(request, choose)
    return request.SerializeToString()
