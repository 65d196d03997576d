"""The gRPC SDK, sync and async; needs neither torch nor ray."""

from ..core.errors import (
    Cancelled,
    ConfigError,
    DeadlineExceeded,
    EngineFailed,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    PermissionDenied,
    PromptTooLong,
    ProtocolMismatch,
    RateLimited,
    SplitserveError,
    TransferFailed,
    Unauthenticated,
    Unavailable,
    WorkerLost,
)
from ..core.logprobs import TokenLogprob, TopLogprob
from ..core.request import FinishReason, derive_seed
from ..proto.tls import Tls
from .async_client import AsyncClient, AsyncStream
from .generation import RetryPolicy
from .messages import Message, Tool, ToolCall
from .request import RequestOptions
from .results import (
    Chunk,
    GenerationResult,
    Model,
    RequestTiming,
    RouterStatus,
    TimelineEvent,
    Tokenization,
    Usage,
    WorkerView,
)
from .sync_client import Client, Stream

__all__ = [
    "AsyncClient",
    "AsyncStream",
    "Cancelled",
    "Chunk",
    "Client",
    "ConfigError",
    "DeadlineExceeded",
    "EngineFailed",
    "FinishReason",
    "GenerationResult",
    "InvalidRequest",
    "Message",
    "Model",
    "ModelNotFound",
    "Overloaded",
    "PromptTooLong",
    "ProtocolMismatch",
    "RateLimited",
    "RequestOptions",
    "RequestTiming",
    "RetryPolicy",
    "RouterStatus",
    "SplitserveError",
    "Stream",
    "TimelineEvent",
    "Tls",
    "TokenLogprob",
    "Tokenization",
    "Tool",
    "ToolCall",
    "TopLogprob",
    "TransferFailed",
    "PermissionDenied",
    "Unauthenticated",
    "Unavailable",
    "Usage",
    "WorkerLost",
    "WorkerView",
    "derive_seed",
]
