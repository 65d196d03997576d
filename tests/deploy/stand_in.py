"""A light process that keeps to the contract of a role: serves, tells so, drains on SIGTERM, or fails as it is told.

The environment tells some of them more: FAILS is --fail, STARTS_AFTER a pipe that somebody must open to write before
it goes on, KEEPS_ITS_ROLE refuses another role.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import signal
import sys
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from splitserve.core.errors import AddressInUse
from splitserve.deploy.process import report_ready
from splitserve.proto import inference_pb2, inference_pb2_grpc, worker_pb2, worker_pb2_grpc


class Router(inference_pb2_grpc.RouterAdminServicer):
    """Believes whatever it is told about workers."""

    def __init__(self, load_file: Path | None) -> None:
        self.load_file = load_file
        self.workers: list[inference_pb2.WorkerView] = []
        self.prompt_tokens = 0

    async def SetWorkers(self, request: inference_pb2.SetWorkersRequest, context: object) -> object:
        pools = (("prefill", request.prefill_addresses), ("decode", request.decode_addresses))
        self.workers = [
            inference_pb2.WorkerView(address=address, role=role, state="ready")
            for role, addresses in pools
            for address in addresses
        ]
        return inference_pb2.SetWorkersResponse()

    async def GetRouterStatus(self, request: object, context: object) -> inference_pb2.GetRouterStatusResponse:
        return inference_pb2.GetRouterStatusResponse(workers=self.workers, traffic=self._traffic())

    def _traffic(self) -> inference_pb2.TrafficCounts:
        """As if prompts came for as long as the file exists, at twice what one worker computes."""
        if self.load_file is not None and self.load_file.exists():
            self.prompt_tokens += 1000
        return inference_pb2.TrafficCounts(
            num_arrived=self.prompt_tokens // 100,
            prompt_tokens=self.prompt_tokens,
            prompt_tokens_squared=self.prompt_tokens * 100.0,
            num_ended=self.prompt_tokens // 100,
            output_tokens=self.prompt_tokens // 100,
        )


class Worker(worker_pb2_grpc.WorkerAdminServicer):
    """Tells the speed of a worker that computes 1,000 prompt tokens a second, and is ready for any role."""

    def __init__(self, role: str) -> None:
        self.boot_id = secrets.token_hex(8)
        self.role = worker_pb2.ROLE_PREFILL if role == "prefill" else worker_pb2.ROLE_DECODE

    async def GetWorkerStatus(self, request: object, context: object) -> worker_pb2.GetWorkerStatusResponse:
        status = worker_pb2.WorkerStatus(num_blocks=100, num_free_blocks=100, prefill_tokens_per_s=1000.0)
        status.num_running, status.decode_step_s = 1, 0.01
        return worker_pb2.GetWorkerStatusResponse(
            info=worker_pb2.WorkerInfo(block_size=16, role=self.role), status=status
        )

    async def SwitchRole(
        self, request: worker_pb2.SwitchRoleRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.SwitchRoleResponse:
        if "KEEPS_ITS_ROLE" in os.environ:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "it still holds a request")
        if request.role != self.role:
            self.role, self.boot_id = request.role, secrets.token_hex(8)
        return worker_pb2.SwitchRoleResponse(info=worker_pb2.WorkerInfo(boot_id=self.boot_id))

    async def Drain(self, request: object, context: object) -> worker_pb2.DrainResponse:
        return worker_pb2.DrainResponse()


async def serve(role: str, host: str, port: int, ready_file: Path, load_file: Path | None) -> None:
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    server, worker = grpc.aio.server(), Worker(role)
    if role == "router":
        inference_pb2_grpc.add_RouterAdminServicer_to_server(Router(load_file), server)
    else:
        worker_pb2_grpc.add_WorkerAdminServicer_to_server(worker, server)
    bound = server.add_insecure_port(f"{host}:{port}")
    await server.start()
    address = f"{host}:{bound}"
    row = {"address": address, "metrics_address": f"{host}:1", "pid": os.getpid(), "boot_id": worker.boot_id}
    report_ready(ready_file, row)
    await stopped.wait()
    sys.stdout.write("drained\n")
    await server.stop(0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("role")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--ready-file", type=Path, required=True)
    parser.add_argument("--load-file", type=Path)
    parser.add_argument("--fail", choices=["typed", "silent", "hang"], default=os.environ.get("FAILS"))
    arguments = parser.parse_args()
    sys.stdout.write(f"{arguments.role} threads={os.environ.get('OMP_NUM_THREADS')}\n")
    sys.stdout.flush()
    if "STARTS_AFTER" in os.environ:
        Path(os.environ["STARTS_AFTER"]).open("rb").close()
    if arguments.fail == "typed":
        error = AddressInUse("cannot listen on 127.0.0.1:1")
        report_ready(arguments.ready_file, {"error": error.code, "message": error.message})
        sys.exit(2)
    if arguments.fail == "silent":
        sys.exit("the model file is damaged")
    if arguments.fail == "hang":
        signal.pause()
    asyncio.run(serve(arguments.role, arguments.host, arguments.port, arguments.ready_file, arguments.load_file))


if __name__ == "__main__":
    main()
