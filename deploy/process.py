"""One role's process as a child: started with a ready handshake, watched, stopped, dead when its parent is."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_SPAWN = Path(__file__).with_name("spawn.py")
_LOG_TAIL_BYTES = 4_096
_SECRETS = ("RAY_AUTH_TOKEN",)  # ours, never a child's


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where a started process can be reached, and which incarnation of it this is."""

    address: str
    metrics_address: str
    boot_id: str
    pid: int
    node: str = ""  # Ray's id of the node
    http_address: str = ""  # of a router that serves HTTP
    launch: str = ""  # digest of what it was started with


@dataclass(frozen=True, slots=True, kw_only=True)
class StartFailure:
    """Why a process did not come up. A value, not an exception: it crosses processes unchanged."""

    code: str
    message: str
    log_path: str = ""
    log_tail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exit:
    """How a process ended."""

    returncode: int
    log_tail: str

    def __str__(self) -> str:
        if self.returncode < 0:
            return f"killed by {signal.Signals(-self.returncode).name}"
        return f"exited with code {self.returncode}"


def report_ready(path: Path | None, row: Mapping[str, str | int]) -> None:
    """Called by a role once it serves, or with its error: one JSON line into its --ready-file."""
    if path is None:
        return
    line = json.dumps(row) + "\n"
    if path.exists() and not path.is_file():  # a pipe
        path.write_text(line, encoding="utf-8")
        return
    part = path.with_name(path.name + ".part")
    part.write_text(line, encoding="utf-8")
    part.replace(path)  # a reader sees all of it or nothing


class RoleProcess:
    """At most one living child. Every method belongs to one event loop, whose thread must live as long as the child:
    the kernel kills the child when the thread that started it ends.
    """

    def __init__(self, log_path: Path) -> None:
        self._log_path = log_path
        self._child: asyncio.subprocess.Process | None = None
        self._endpoint: Endpoint | None = None

    @property
    def endpoint(self) -> Endpoint | None:
        """Set while the child lives and has said that it is ready."""
        return self._endpoint if self._child is not None and self._child.returncode is None else None

    async def start(
        self, command: Sequence[str], environment: Mapping[str, str], timeout_s: float
    ) -> Endpoint | StartFailure:
        """Start the child and wait until it serves; if one already does, return its endpoint."""
        if self.endpoint is not None:
            return self.endpoint
        await self.stop(0.0)
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        read_fd, write_fd = os.pipe()
        try:
            with self._log_path.open("ab") as log:
                self._child = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-I", "-S", str(_SPAWN), str(os.getpid())),
                    *(*command, "--ready-file", f"/dev/fd/{write_fd}"),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env={k: v for k, v in os.environ.items() if k not in _SECRETS} | dict(environment),
                    pass_fds=(write_fd,),
                    start_new_session=True,  # Ctrl-C in the terminal is the controller's business
                )
        finally:
            os.close(write_fd)
        try:
            async with asyncio.timeout(timeout_s):
                line = await _read_line(read_fd)
        except TimeoutError:
            await self.stop(0.0)
            return self._failure("internal", f"it did not serve within {timeout_s:g} s")
        except asyncio.CancelledError:
            await asyncio.shield(self.stop(0.0))
            raise
        if not line:  # the child closed its end by dying
            return self._failure("internal", f"it {await self.wait()} before it served")
        row = json.loads(line)
        if "error" in row:
            await self.stop(2.0)
            return self._failure(row["error"], row["message"])
        self._endpoint = Endpoint(**row)
        return self._endpoint

    async def wait(self) -> Exit:
        """Returns when the child has ended."""
        assert self._child is not None
        returncode = await self._child.wait()
        return Exit(returncode=returncode, log_tail=self._log_tail())

    async def stop(self, grace_s: float) -> None:
        """SIGTERM, which drains; after `grace_s` SIGKILL, to the child and everything that it started."""
        child = self._child
        if child is None or child.returncode is not None:
            return
        if grace_s > 0:
            child.terminate()
            try:
                async with asyncio.timeout(grace_s):
                    await child.wait()
            except TimeoutError:
                pass
        if child.returncode is None:
            os.killpg(child.pid, signal.SIGKILL)
            await child.wait()

    def _failure(self, code: str, message: str) -> StartFailure:
        return StartFailure(code=code, message=message, log_path=str(self._log_path), log_tail=self._log_tail())

    def _log_tail(self) -> str:
        try:
            with self._log_path.open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - _LOG_TAIL_BYTES))
                return log.read().decode(errors="replace")
        except OSError:
            return ""


async def _read_line(fd: int) -> bytes:
    """The first line that arrives at a pipe, b"" if its writer goes without one; closes the pipe."""
    reader = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(fd, "rb")
    )
    try:
        return await reader.readline()
    finally:
        transport.close()
