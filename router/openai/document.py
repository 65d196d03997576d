"""The OpenAPI document, made from the models of requests and the types of responses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import models_json_schema

from ... import __version__
from . import requests, responses

_REFERENCE = "#/components/schemas/{model}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One method of one path."""

    path: str
    method: str
    summary: str
    answer: Any  # type of a 200's body; None: there is no 200; str: text
    body: type[BaseModel] | None = None
    chunk: Any = None  # type of each event, where it can stream
    errors: Sequence[int] = ()


_GENERATION_ERRORS = (400, 401, 403, 404, 413, 429, 499, 500, 503, 504)
OPERATIONS = (
    Operation(
        path="/v1/models", method="get", summary="What can be asked for", answer=responses.ModelList, errors=(401, 403)
    ),
    Operation(
        path="/v1/models/{name}", method="get", summary="One model", answer=responses.ModelCard, errors=(401, 403, 404)
    ),
    Operation(
        path="/v1/completions",
        method="post",
        summary="Complete prompts of text or token ids",
        body=requests.CompletionRequest,
        answer=responses.Completion,
        chunk=responses.Completion,
        errors=_GENERATION_ERRORS,
    ),
    Operation(
        path="/v1/chat/completions",
        method="post",
        summary="Answer a conversation",
        body=requests.ChatRequest,
        answer=responses.ChatCompletion,
        chunk=responses.ChatChunk,
        errors=_GENERATION_ERRORS,
    ),
    Operation(path="/v1/embeddings", method="post", summary="Refused: not served", answer=None, errors=(400, 401, 403)),
    Operation(
        path="/tokenize",
        method="post",
        summary="Text or messages as token ids",
        body=requests.TokenizeRequest,
        answer=responses.Tokenization,
        errors=(400, 401, 403, 404, 413, 503),
    ),
    Operation(
        path="/detokenize",
        method="post",
        summary="Token ids as text",
        body=requests.DetokenizeRequest,
        answer=responses.Detokenization,
        errors=(400, 401, 403, 404, 413),
    ),
    Operation(
        path="/health", method="get", summary="Whether requests can be served", answer=responses.Health, errors=(503,)
    ),
    Operation(path="/metrics", method="get", summary="Metrics for Prometheus", answer=str),
    Operation(path="/openapi.json", method="get", summary="This document", answer=responses.Json),
)


def openapi_document() -> Mapping[str, Any]:
    """OpenAPI 3.1."""
    bodies = [operation.body for operation in OPERATIONS if operation.body is not None]
    _, made = models_json_schema([(body, "validation") for body in bodies], ref_template=_REFERENCE)
    schemas: dict[str, Any] = dict(made["$defs"])
    names = {"ErrorBody": responses.ErrorBody}
    for operation in OPERATIONS:
        for kind in (operation.answer, operation.chunk):
            if kind not in (None, str, responses.Json):
                names[kind.__name__] = kind
    for name, kind in names.items():
        schema = TypeAdapter(kind).json_schema(ref_template=f"#/components/schemas/{name}.{{model}}")
        schemas |= {f"{name}.{part}": value for part, value in schema.pop("$defs", {}).items()}
        schemas[name] = schema
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "splitserve",
            "version": __version__,
            "description": "OpenAI-compatible. Errors have one shape everywhere; docs/api.md has an example of each.",
        },
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _operation(operation: Operation) -> dict[str, Any]:
    error = {"description": "A typed error", "content": _json("ErrorBody")}
    described: dict[str, Any] = {
        "operationId": operation.method + operation.path.replace("/", "_").replace("{", "").replace("}", ""),
        "summary": operation.summary,
        "responses": {str(status): error for status in operation.errors},
    }
    if operation.answer is str:
        content: dict[str, Any] = {"text/plain": {"schema": {"type": "string"}}}
    elif operation.answer is responses.Json:
        content = {"application/json": {"schema": {"type": "object"}}}
    elif operation.answer is not None:
        content = _json(operation.answer.__name__)
    if operation.chunk is not None:
        data = {
            "type": "string",
            "description": f"With stream: a {operation.chunk.__name__} or an ErrorBody as JSON; the last is [DONE]",
        }
        event = {"type": "object", "properties": {"data": data}, "required": ["data"]}
        content["text/event-stream"] = {"schema": event}
    if operation.answer is not None:
        described["responses"]["200"] = {"description": "The answer", "content": content}
    if operation.body is not None:
        described["requestBody"] = {"required": True, "content": _json(operation.body.__name__)}
    if "{name}" in operation.path:
        described["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]
    return described


def _json(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}
