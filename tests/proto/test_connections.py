"""How many connections a server takes."""

from __future__ import annotations

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from splitserve.proto.rpc import CHANNEL_OPTIONS, MAX_CONNECTIONS, SERVER_OPTIONS
from splitserve.proto.server import RpcServer


async def test_a_connection_past_the_bound_is_closed_and_the_others_stay() -> None:
    name = "grpc.max_allowed_incoming_connections"
    assert (name, MAX_CONNECTIONS) in SERVER_OPTIONS
    options = [(key, 2 if key == name else value) for key, value in SERVER_OPTIONS]
    server = RpcServer("127.0.0.1", 0, (), options=options)
    await server.start()
    channels = [grpc.aio.insecure_channel(server.address, options=CHANNEL_OPTIONS) for _ in range(3)]

    async def check(channel: grpc.aio.Channel) -> health_pb2.HealthCheckResponse:
        return await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=30)

    try:
        for channel in channels[:2]:
            await check(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await check(channels[2])
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        await check(channels[0])
    finally:
        for channel in channels:
            await channel.close()
        await server.stop(0)
