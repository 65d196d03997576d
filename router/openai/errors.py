"""Errors in OpenAI's shape, and the pydantic complaints that become them."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from ...core.errors import InvalidRequest, PromptTooLong, RateLimited, SplitserveError
from .responses import ErrorBody

_SHOWN_CHARS = 100  # of a wrong value
# Where OpenAI has its own.
_CODES: Mapping[type[SplitserveError], str] = {
    PromptTooLong: "context_length_exceeded",
    RateLimited: "rate_limit_exceeded",
}
_TYPES: Mapping[int, str] = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
# Names that fields of the gRPC API have here.
_PARAMS: Mapping[str, str] = {
    "output_format": "response_format",
    "prompt_logprobs": "logprobs",
    "text": "prompt",
    "input": "prompt",
    "token_ids": "tokens",
}


def error_body(message: str, status: int, *, param: str | None = None, code: str | None = None) -> ErrorBody:
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def body_of(error: SplitserveError, *, chat: bool = False) -> ErrorBody:
    param = _PARAMS.get(error.field, error.field) if error.field is not None else None
    if chat and param == "prompt":
        param = "messages"
    return error_body(error.message, error.http_status, param=param, code=_CODES.get(type(error), error.code))


def error_response(error: SplitserveError, *, chat: bool = False) -> Response:
    """With the headers that OpenAI's clients obey: whether to try again, and when."""
    headers = {"x-should-retry": "true" if error.retryable else "false"}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, round(error.retry_after_s)))
        headers["retry-after-ms"] = str(max(1, round(error.retry_after_s * 1e3)))
    if error.http_status == 401:
        headers["www-authenticate"] = "Bearer"
    return json_response(body_of(error, chat=chat), error.http_status, headers)


def json_response(body: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    text = json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Response(text, status, headers, media_type="application/json")


async def on_typed_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, SplitserveError)
    return error_response(error, chat=request.url.path.startswith("/v1/chat/"))


async def on_http_error(request: Request, error: Exception) -> Response:
    """What the routing itself refuses: an unknown path, a wrong method."""
    assert isinstance(error, HTTPException)
    messages = {
        404: f"there is no {request.url.path!a} here; /openapi.json lists what there is",
        405: f"{request.method} is not allowed on {request.url.path}; allowed: {(error.headers or {}).get('Allow')}",
    }
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    body = error_body(messages.get(error.status_code, error.detail), error.status_code, code=code)
    return json_response(body, error.status_code, error.headers)


async def on_bug(request: Request, error: Exception) -> Response:
    """The traceback is in the log: Starlette raises the error again once this is sent."""
    return json_response(error_body("an error of the server; its log tells more", 500, code="internal"), 500)


def invalid_body(error: ValidationError, model: type[BaseModel]) -> InvalidRequest:
    """The first complaint, with the field's name as OpenAI writes it: messages[0].content."""
    rows = error.errors(include_url=False)
    # A union complains once for each member; the one that got furthest is the one that was meant.
    row = max((other for other in rows if other["loc"][:1] == rows[0]["loc"][:1]), key=lambda other: len(other["loc"]))
    field, kind = _path(row["loc"]), row["type"]
    if kind == "json_invalid":
        return InvalidRequest(f"the body is not JSON: {row['msg'].removeprefix('Invalid JSON: ')}")
    if not field:
        return InvalidRequest(f"the body is {_shown(row['input'])}; it must be a JSON object")
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(field, list(model.model_fields), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return InvalidRequest(f"unrecognized request argument: {field}{hint}", field=field)
    if kind == "missing":
        return InvalidRequest(f"{field} is missing", field=field)
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        said = row["ctx"]
        field += "." + said["discriminator"].strip("'")
        if kind == "union_tag_not_found":
            return InvalidRequest(f"{field} is missing", field=field)
        return InvalidRequest(f"{field}: got {_shown(said['tag'])}, wanted {said['expected_tags']}", field=field)
    for other in rows:
        if other["type"] in ("too_short", "too_long") and _path(other["loc"]) == field:
            said = other["ctx"]
            most = f"at most {said['max_length']}" if "max_length" in said else f"at least {said['min_length']}"
            return InvalidRequest(f"{field} has {said['actual_length']} entries; send {most}", field=field)
    wanted = [other["msg"].removeprefix("Input should be ") for other in rows if _path(other["loc"]) == field]
    return InvalidRequest(
        f"{field}: got {_shown(row['input'])}, wanted {' or '.join(dict.fromkeys(wanted))}", field=field
    )


def _path(location: tuple[int | str, ...]) -> str:
    """Without the names that pydantic gives to the members of a union; a member may have a field of its own name."""
    text, is_member = "", False
    for part in location:
        members = _FORMATS if text == "response_format" else _UNION_MEMBERS
        is_member = bool(text) and part in members and not is_member
        if isinstance(part, int):
            text += f"[{part}]"
        elif not text:
            text = part[:_SHOWN_CHARS]
        elif part.isidentifier() and not is_member:
            text += f".{part}"
    return text


_UNION_MEMBERS = {"str", "int", "float", "bool", "dict", "list", "system", "developer", "user", "assistant", "tool"}
_FORMATS = {"text", "json_object", "json_schema", "regex", "grammar"}


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deep, or an integer of thousands of digits
        return type(value).__name__
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}..."
