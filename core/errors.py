"""One family of errors: each class knows its wire code, gRPC code, HTTP status and whether a retry can help."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar


class SplitserveError(Exception):
    """Base of every typed error.

    Args:
        message: what happened, what was got, what was wanted and what to do.
        retry_after_s: for retryable errors, how long to wait before trying again.
        field: for bad input, the request field at fault.
    """

    code: ClassVar[str] = "internal"
    grpc_code: ClassVar[str] = "INTERNAL"
    http_status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, retry_after_s: float | None = None, field: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_s = retry_after_s
        self.field = field


class InvalidRequest(SplitserveError):
    """The request is wrong as sent; sending it again cannot help."""

    code, grpc_code, http_status = "invalid_request", "INVALID_ARGUMENT", 400


class PromptTooLong(InvalidRequest):
    """Prompt, or prompt plus max_tokens, exceeds the model's or the cluster's limit."""

    code = "prompt_too_long"


class IdempotencyConflict(InvalidRequest):
    """The idempotency key names another request than this one."""

    code, grpc_code, http_status = "idempotency_conflict", "ALREADY_EXISTS", 422


class Unauthenticated(SplitserveError):
    """The caller did not prove who it is: no API key, or a wrong one."""

    code, grpc_code, http_status = "unauthenticated", "UNAUTHENTICATED", 401


class PermissionDenied(SplitserveError):
    """The caller proved who it is, and that is not enough: its key or certificate does not open this."""

    code, grpc_code, http_status = "permission_denied", "PERMISSION_DENIED", 403


class CapabilityRefused(PermissionDenied):
    """The caller was not granted what it asks for, whoever it is."""

    code = "capability_refused"


class ModelNotFound(SplitserveError):
    """No worker serves the model that was asked for."""

    code, grpc_code, http_status = "model_not_found", "NOT_FOUND", 404


class ModelUnsupported(SplitserveError):
    """The model cannot be served right, so it is refused at load."""

    code, grpc_code, http_status = "model_unsupported", "FAILED_PRECONDITION", 400


class ModelLoadFailed(SplitserveError):
    """The model's files are missing or damaged."""

    code, grpc_code, http_status = "model_load_failed", "FAILED_PRECONDITION", 500


class ConfigError(SplitserveError):
    """A flag, a YAML key or a combination of them is wrong."""

    code, grpc_code, http_status = "config_error", "INVALID_ARGUMENT", 400


class AddressInUse(ConfigError):
    """A server could not bind its address."""

    code = "address_in_use"


class DeadlineExceeded(SplitserveError):
    """The request's deadline passed before it finished."""

    code, grpc_code, http_status = "deadline_exceeded", "DEADLINE_EXCEEDED", 504


class Cancelled(SplitserveError):
    """The client cancelled the request or went away."""

    code, grpc_code, http_status = "cancelled", "CANCELLED", 499


class Overloaded(SplitserveError):
    """A bounded queue or pool is full; try again after `retry_after_s`."""

    code, grpc_code, http_status, retryable = "overloaded", "RESOURCE_EXHAUSTED", 429, True


class RateLimited(Overloaded):
    """The caller's API key has had what it may have for now; try again after `retry_after_s`."""

    code = "rate_limited"


class Unavailable(SplitserveError):
    """Nobody can serve the request right now (no ready worker, or a server is draining)."""

    code, grpc_code, http_status, retryable = "unavailable", "UNAVAILABLE", 503, True


class WorkerLost(Unavailable):
    """The worker died or became unreachable while it held the request."""

    code = "worker_lost"


class WorkerDied(WorkerLost):
    """The worker's process ended while it held the request: not a drain, a hang or a cut link."""

    code = "worker_died"


class RetryBudgetSpent(Unavailable):
    """An attempt failed, and so many did of late that this one is not repeated by the router."""

    code = "retry_budget_spent"


class PoisonRequest(SplitserveError):
    """Workers died computing the request, one after the other; it is not tried again."""

    code, grpc_code, http_status = "poison_request", "FAILED_PRECONDITION", 422


class Draining(Unavailable):
    """The worker is going out of service in an orderly way: the attempt goes on elsewhere, and nothing has failed."""

    code = "draining"


class TransferFailed(Unavailable):
    """The KV cache did not arrive; the prompt must be prefilled again."""

    code = "transfer_failed"


class KvCorrupted(TransferFailed):
    """The KV cache arrived with a wrong checksum or digest; it was dropped."""

    code, grpc_code = "kv_corrupted", "DATA_LOSS"


class TransferInterrupted(TransferFailed):
    """The way that the KV cache took is broken; the holder still has it, and what is missing can be fetched again."""

    code = "transfer_interrupted"


class LeaseExpired(TransferFailed):
    """The holder freed the blocks before they were fetched or committed."""

    code = "lease_expired"


class StaleMessage(SplitserveError):
    """The message names a grant, epoch, attempt or boot id that is no longer live."""

    code, grpc_code, http_status, retryable = "stale", "ABORTED", 409, True


class Superseded(SplitserveError):
    """A later call, of this or another router, has the request now.

    Args:
        newest_call: number of the call that has it.
        age_s: seconds since it took it.
    """

    code, grpc_code, http_status = "superseded", "ABORTED", 409

    def __init__(
        self,
        message: str,
        *,
        retry_after_s: float | None = None,
        field: str | None = None,
        newest_call: int = 0,
        age_s: float = 0.0,
    ) -> None:
        super().__init__(message, retry_after_s=retry_after_s, field=field)
        self.newest_call = newest_call
        self.age_s = age_s


class GeometryMismatch(SplitserveError):
    """The two workers' KV caches cannot be converted into each other."""

    code, grpc_code, http_status = "geometry_mismatch", "FAILED_PRECONDITION", 500


class ProtocolMismatch(SplitserveError):
    """The peer speaks a protocol version that this build does not."""

    code, grpc_code, http_status = "protocol_mismatch", "FAILED_PRECONDITION", 400


class EngineFailed(SplitserveError):
    """The engine's step failed; the request's work is lost, the worker goes on."""

    code, http_status, retryable = "engine_failed", 500, True


def _family(root: type[SplitserveError]) -> Mapping[str, type[SplitserveError]]:
    classes = {root.code: root}
    for child in root.__subclasses__():
        classes.update(_family(child))
    return classes


BY_CODE: Mapping[str, type[SplitserveError]] = _family(SplitserveError)


def from_code(
    code: str, message: str, *, retry_after_s: float | None = None, field: str | None = None
) -> SplitserveError:
    """Rebuild the typed error that crossed a wire; an unknown code becomes the base class."""
    return BY_CODE.get(code, SplitserveError)(message, retry_after_s=retry_after_s, field=field)
