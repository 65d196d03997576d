"""The application: its routes, and those that need no work of a worker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ...core.errors import InvalidRequest, ModelNotFound, SplitserveError, Unavailable
from ...proto import inference_pb2 as pb
from ...scheduling.admission import check_model
from ..front_door import FrontDoor
from ..keys import ApiKeys
from .body import read_body
from .chat import chat_completions, chat_messages
from .completions import completions
from .errors import json_response, on_bug, on_http_error, on_typed_error
from .keys import RequireKey
from .requests import DetokenizeRequest, TokenizeRequest
from .responses import ModelCard, Tokenization


async def list_models(request: Request) -> Response:
    """What can be asked for right now."""
    return json_response({"object": "list", "data": await _models(request)})


async def show_model(request: Request) -> Response:
    """One model."""
    name = request.path_params["name"]
    for card in await _models(request):
        if card["id"] == name:
            return json_response(card)
    check_model(name, [_door(request).model])
    raise ModelNotFound(f"model {name!r} has no worker that is ready; try again", field="model")


async def tokenize(request: Request) -> Response:
    """Text or messages as token ids, exactly as generation would have them."""
    body = await read_body(request, TokenizeRequest)
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("send either prompt or messages", field="prompt")
    message = pb.TokenizeRequest(model=body.model or "")
    if body.prompt is not None:
        message.text = body.prompt
    else:
        message.messages.CopyFrom(chat_messages(body.messages or (), body.tools or ()))
    door = _door(request)
    made = await door.tokenize(message)
    answer: Tokenization = {
        "count": len(made.token_ids),
        "max_model_len": (await door.limits()).max_model_len,
        "tokens": list(made.token_ids),
        "token_strs": list(made.tokens),
    }
    return json_response(answer)


async def detokenize(request: Request) -> Response:
    """Token ids as text."""
    body = await read_body(request, DetokenizeRequest)
    message = pb.DetokenizeRequest(
        model=body.model or "", token_ids=body.tokens, keep_special_tokens=bool(body.keep_special_tokens)
    )
    return json_response({"prompt": _door(request).detokenize(message).text})


async def embeddings(request: Request) -> Response:
    """Refused: splitserve serves models that generate."""
    raise InvalidRequest("embeddings are not served: the models here generate text; use an embedding server for them")


async def alive(request: Request) -> Response:
    """200: whoever answers here makes progress, for the event loop that carries every token does."""
    return json_response({"status": "ok"})


async def ready(request: Request) -> Response:
    """200 while a pair of workers can serve requests, else 503."""
    if reason := _door(request).out_of_service:
        raise Unavailable(reason, retry_after_s=1.0)
    return json_response({"status": "ok"})


async def metrics(request: Request) -> Response:
    """The router's metrics for Prometheus."""
    registry: CollectorRegistry = request.app.state.registry
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


async def openapi(request: Request) -> Response:
    """This document."""
    document: Mapping[str, Any] = request.app.state.document
    return json_response(document)


ROUTES: Sequence[Route] = (
    Route("/v1/models", list_models),
    Route("/v1/models/{name:path}", show_model),
    Route("/v1/completions", completions, methods=["POST"]),
    Route("/v1/chat/completions", chat_completions, methods=["POST"]),
    Route("/v1/embeddings", embeddings, methods=["POST"]),
    Route("/tokenize", tokenize, methods=["POST"]),
    Route("/detokenize", detokenize, methods=["POST"]),
    Route("/health", ready),
    Route("/healthz", alive),
    Route("/readyz", ready),
    Route("/metrics", metrics),
    Route("/openapi.json", openapi),
)


def make_app(door: FrontDoor, registry: CollectorRegistry, started_at: int, keys: ApiKeys | None = None) -> Starlette:
    """Args: started_at: seconds since 1970, shown as the model's creation; keys: None: everybody may call."""
    from .document import openapi_document

    app = Starlette(
        routes=ROUTES,
        middleware=[Middleware(RequireKey, keys)] if keys is not None else [],
        exception_handlers={SplitserveError: on_typed_error, HTTPException: on_http_error, Exception: on_bug},
    )
    app.router.redirect_slashes = False
    app.state.door = door
    app.state.registry = registry
    app.state.started_at = started_at
    app.state.document = openapi_document()
    return app


def _door(request: Request) -> FrontDoor:
    door: FrontDoor = request.app.state.door
    return door


async def _models(request: Request) -> list[ModelCard]:
    return [
        {
            "id": model.name,
            "object": "model",
            "created": request.app.state.started_at,
            "owned_by": "splitserve",
            "max_model_len": model.max_model_len,
        }
        for model in _door(request).models()
    ]
