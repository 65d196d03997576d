"""What every gRPC client and server of ours agrees on: channel options, and typed errors in trailing metadata."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import grpc
import grpc.aio

from ..core.errors import Cancelled, DeadlineExceeded, SplitserveError, Unavailable, from_code

ERROR_KEY = "splitserve-error"
RETRYABLE_KEY = "splitserve-retryable"
RETRY_AFTER_KEY = "splitserve-retry-after-ms"
FIELD_KEY = "splitserve-field"

MAX_MESSAGE_BYTES = 16 << 20  # a prompt of a million tokens is 4 MB; KV frames are 1 to 2 MiB
MAX_CONNECTIONS = 4_096  # of a server
MAX_STREAMS = 16_384  # of a connection; a router refuses requests long before (router.max_live)

CHANNEL_OPTIONS: Sequence[tuple[str, int]] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # A peer that hangs without closing its socket is noticed after 2 s + 2 s.
    ("grpc.keepalive_time_ms", 2_000),
    ("grpc.keepalive_timeout_ms", 2_000),
    ("grpc.http2.ping_timeout_ms", 2_000),  # of gRPC's other pings, which keepalive waits behind: 60 s otherwise
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.use_local_subchannel_pool", 1),
)

_PACE = ("grpc.keepalive_time_ms", "grpc.keepalive_timeout_ms", "grpc.http2.ping_timeout_ms")

SERVER_OPTIONS: Sequence[tuple[str, int]] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 2_000),
    ("grpc.keepalive_timeout_ms", 2_000),
    ("grpc.http2.ping_timeout_ms", 2_000),  # of gRPC's other pings, which keepalive waits behind: 60 s otherwise
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    ("grpc.http2.max_ping_strikes", 0),
    # Past these a connection is closed at once, and a call waits in its client for another to end.
    ("grpc.max_allowed_incoming_connections", MAX_CONNECTIONS),
    ("grpc.max_concurrent_streams", MAX_STREAMS),
    ("grpc.so_reuseport", 0),  # a second server on the same port must fail, not share it
)

# Of a router towards its clients: one that hangs, or is cut off, is noticed within 2 s, and what it asked for is freed.
# Asked often and with patience, so that one on a busy machine, which answers a second late, is not taken for lost.
CLIENT_FACING_OPTIONS: Sequence[tuple[str, int]] = (
    *(row for row in SERVER_OPTIONS if row[0] not in _PACE),
    ("grpc.keepalive_time_ms", 300),
    ("grpc.keepalive_timeout_ms", 1_600),
    ("grpc.http2.ping_timeout_ms", 1_600),
)

_FROM_STATUS: dict[grpc.StatusCode, type[SplitserveError]] = {
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
}


def error_metadata(error: SplitserveError) -> tuple[tuple[str, str], ...]:
    """Trailing metadata that carries a typed error."""
    rows = [(ERROR_KEY, error.code), (RETRYABLE_KEY, "true" if error.retryable else "false")]
    if error.retry_after_s is not None:
        rows.append((RETRY_AFTER_KEY, str(max(1, round(error.retry_after_s * 1000)))))
    if error.field is not None:
        rows.append((FIELD_KEY, error.field))
    return tuple(rows)


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: SplitserveError) -> NoReturn:
    """End the call with the error's status and metadata."""
    await context.abort(grpc.StatusCode[error.grpc_code], error.message, error_metadata(error))
    raise AssertionError("abort returned")


def is_typed(error: grpc.RpcError) -> bool:
    """Whether a peer of ours said so: else it is gRPC that reports on the call."""
    return any(key == ERROR_KEY for key, _ in error.trailing_metadata() or ())


def from_rpc_error(error: grpc.RpcError) -> SplitserveError:
    """The typed error behind a failed call, sync or async; a bare status maps to its nearest class."""
    status: grpc.StatusCode = error.code()
    details: str = error.details() or status.name
    rows = {str(key): str(value) for key, value in (error.trailing_metadata() or ())}
    if ERROR_KEY in rows:
        after = rows.get(RETRY_AFTER_KEY)
        return from_code(
            rows[ERROR_KEY],
            details,
            retry_after_s=float(after) / 1000 if after else None,
            field=rows.get(FIELD_KEY),
        )
    return _FROM_STATUS.get(status, SplitserveError)(details)
