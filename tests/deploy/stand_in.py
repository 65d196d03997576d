"""A light process that keeps to the contract of a role: serves, tells so, drains on SIGTERM, or fails as it is told."""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import signal
import sys
from pathlib import Path

import grpc.aio
from splitserve.core.errors import AddressInUse
from splitserve.deploy.process import report_ready
from splitserve.proto import inference_pb2, inference_pb2_grpc


class Router(inference_pb2_grpc.RouterAdminServicer):
    """Believes whatever it is told about workers."""

    def __init__(self) -> None:
        self.workers: list[inference_pb2.WorkerView] = []

    async def SetWorkers(self, request: inference_pb2.SetWorkersRequest, context: object) -> object:
        pools = (("prefill", request.prefill_addresses), ("decode", request.decode_addresses))
        self.workers = [
            inference_pb2.WorkerView(address=address, role=role, state="ready")
            for role, addresses in pools
            for address in addresses
        ]
        return inference_pb2.SetWorkersResponse()

    async def GetRouterStatus(self, request: object, context: object) -> inference_pb2.GetRouterStatusResponse:
        return inference_pb2.GetRouterStatusResponse(workers=self.workers)


async def serve(role: str, host: str, port: int, ready_file: Path) -> None:
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    server = grpc.aio.server()
    if role == "router":
        inference_pb2_grpc.add_RouterAdminServicer_to_server(Router(), server)
    bound = server.add_insecure_port(f"{host}:{port}")
    await server.start()
    boot_id = secrets.token_hex(8)
    report_ready(
        ready_file,
        {"address": f"{host}:{bound}", "metrics_address": f"{host}:1", "pid": os.getpid(), "boot_id": boot_id},
    )
    await stopped.wait()
    sys.stdout.write("drained\n")
    await server.stop(0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("role")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--ready-file", type=Path, required=True)
    parser.add_argument("--fail", choices=["typed", "silent", "hang"])
    arguments = parser.parse_args()
    sys.stdout.write(f"{arguments.role} threads={os.environ.get('OMP_NUM_THREADS')}\n")
    sys.stdout.flush()
    if arguments.fail == "typed":
        error = AddressInUse("cannot listen on 127.0.0.1:1")
        report_ready(arguments.ready_file, {"error": error.code, "message": error.message})
        sys.exit(2)
    if arguments.fail == "silent":
        sys.exit("the model file is damaged")
    if arguments.fail == "hang":
        signal.pause()
    asyncio.run(serve(arguments.role, arguments.host, arguments.port, arguments.ready_file))


if __name__ == "__main__":
    main()
