"""Random protobuf messages and random bytes, from a seeded generator."""

from __future__ import annotations

import random
from types import ModuleType
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message
from splitserve.proto import inference_pb2, kv_transfer_pb2, worker_pb2

MAX_DEPTH = 4
TEXTS = ("", "a", "r", "float32", "none", "int8", "überlang " * 40, "\0", "127.0.0.1:1", "{", "json_object", "𝕏", "-1")
FLOATS = (0.0, -1.0, 1.0, 0.5, 1e-30, 1e300, -1e300, float("inf"), float("-inf"), float("nan"))
INT_BITS = {
    FieldDescriptor.CPPTYPE_INT32: (32, True),
    FieldDescriptor.CPPTYPE_UINT32: (32, False),
    FieldDescriptor.CPPTYPE_INT64: (64, True),
    FieldDescriptor.CPPTYPE_UINT64: (64, False),
    FieldDescriptor.CPPTYPE_ENUM: (32, True),
}


def message_classes(*modules: ModuleType) -> list[type[Message]]:
    """Every message of the protocol that is no entry of a map."""
    chosen = modules or (inference_pb2, worker_pb2, kv_transfer_pb2)
    return [getattr(module, name) for module in chosen for name in module.DESCRIPTOR.message_types_by_name]


def random_value(choose: random.Random, field: FieldDescriptor) -> Any:
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return choose.random() < 0.5
    if field.cpp_type in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT):
        return choose.choice((*FLOATS, choose.uniform(-2, 2)))
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return (
            choose.randbytes(choose.randrange(40)) if field.type == FieldDescriptor.TYPE_BYTES else choose.choice(TEXTS)
        )
    bits, signed = INT_BITS[field.cpp_type]
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
    return choose.choice((0, 1, 2, 3, 7, 255, low, high, choose.randint(low, high)))


def fill(choose: random.Random, message: Message, depth: int = 0) -> Message:
    """Set about half of the fields to something, likely or not."""
    for field in message.DESCRIPTOR.fields:
        if choose.random() < 0.5 or (field.message_type is not None and depth >= MAX_DEPTH):
            continue
        target = getattr(message, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            key, value = (field.message_type.fields_by_name[name] for name in ("key", "value"))
            for _ in range(choose.randrange(3)):
                target[random_value(choose, key)] = random_value(choose, value)
        elif field.is_repeated and field.message_type is not None:
            for _ in range(choose.randrange(3)):
                fill(choose, target.add(), depth + 1)
        elif field.is_repeated:
            target.extend(random_value(choose, field) for _ in range(choose.randrange(5)))
        elif field.message_type is not None:
            target.SetInParent()
            fill(choose, target, depth + 1)
        else:
            setattr(message, field.name, random_value(choose, field))
    return message


def damaged(choose: random.Random, data: bytes) -> bytes:
    """Bits flipped, bytes cut out, repeated or added."""
    changed = bytearray(data)
    for _ in range(choose.randrange(1, 4)):
        place = choose.randrange(len(changed) + 1)
        match choose.randrange(4):
            case 0 if changed:
                changed[min(place, len(changed) - 1)] ^= 1 << choose.randrange(8)
            case 1:
                del changed[place : place + choose.randrange(1, 9)]
            case 2:
                changed[place:place] = choose.randbytes(choose.randrange(1, 9))
            case _:
                changed[place:place] = changed[place : place + choose.randrange(1, 9)]
    return bytes(changed)


def random_bytes(choose: random.Random, kind: type[Message]) -> bytes:
    """What somebody might send as a message of this kind: noise, a message, or one that was damaged."""
    match choose.randrange(3):
        case 0:
            return choose.randbytes(choose.randrange(120))
        case 1:
            return fill(choose, kind()).SerializeToString()
        case _:
            return damaged(choose, fill(choose, kind()).SerializeToString())


def readable(choose: random.Random, kind: type[Message]) -> Message:
    """A message of random bytes that a parser lets through."""
    while True:
        try:
            return kind.FromString(random_bytes(choose, kind))
        except DecodeError:
            continue
