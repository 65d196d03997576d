"""From the bytes of a request to its checked body."""

from __future__ import annotations

import asyncio
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from ...core.errors import Cancelled, InvalidRequest
from ...proto.rpc import MAX_MESSAGE_BYTES
from .errors import invalid_body

B = TypeVar("B", bound=BaseModel)
BODY_S = 60.0  # in which a body must have come


class BodyTooLarge(InvalidRequest):
    """More bytes than any request needs."""

    code, http_status = "request_too_large", 413


class BodyTooSlow(InvalidRequest):
    """Its bytes stopped coming."""

    code, http_status = "request_timeout", 408


async def read_body(request: Request, model: type[B]) -> B:
    """Raises: InvalidRequest: too large, too slow, not JSON, or a field is wrong. Cancelled: the client went away."""
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_S):
            async for part in request.stream():
                size += len(part)
                if size > MAX_MESSAGE_BYTES:
                    raise BodyTooLarge(f"the body has more than {MAX_MESSAGE_BYTES:,} bytes; send less")
                parts.append(part)
    except TimeoutError:
        raise BodyTooSlow(f"the body was not there after {BODY_S:g} s; send it faster") from None
    except ClientDisconnect as error:
        raise Cancelled("the client went away") from error
    try:
        return model.model_validate_json(b"".join(parts))
    except ValidationError as error:
        raise invalid_body(error, model) from error
