"""Go on in a session of one's own: as a daemon, or with the terminal's process in front of it."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path

import typer

from ..core.state import state_path

_PR_SET_PDEATHSIG = 1
_SAME_SIGNAL_S = 0.3


def continue_in_background() -> Path:
    """Returns in a new session, whose output goes to a file, with the pipe to report to; the caller's process never
    returns: it prints what is reported, and exits 0, or 2 for an error.

    Call it before any thread exists: only the calling thread goes on.
    """
    read_fd, write_fd = os.pipe()
    log_path = state_path().with_name("up.log")
    log_path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if os.fork() != 0:
        os.close(write_fd)
        _wait(read_fd, log_path)
    os.close(read_fd)
    os.setsid()
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    null = os.open(os.devnull, os.O_RDONLY)
    for target, source in ((0, null), (1, log), (2, log)):
        os.dup2(source, target)
    return Path(f"/dev/fd/{write_fd}")


def _wait(read_fd: int, log_path: Path) -> None:
    """Always raises typer.Exit."""
    print(f"starting in the background; {log_path} tells how it goes", flush=True)
    with os.fdopen(read_fd, encoding="utf-8") as pipe:
        line = pipe.readline()
    row = json.loads(line) if line else {"message": "it ended before it served"}
    if "address" not in row:
        print(log_path.read_text(encoding="utf-8"), end="", file=sys.stderr)
        typer.secho(f"error: {row['message']}", fg="red", err=True)
        raise typer.Exit(2)
    http = f", OpenAI API at http://{row['http_address']}/v1" if row.get("http_address") else ""
    print(f"ready at {row['address']}{http}, process {row['pid']}; `splitserve down` stops it")
    raise typer.Exit(0)


def continue_in_own_session() -> None:
    """Returns in a new session; the caller's process stays in front of it, passes signals on and exits as it does.

    Ray's processes stay in the process group that starts them: a signal sent to the terminal's whole group (by Ctrl-C,
    `timeout` or a closing terminal) would stop Ray before anything could be drained.

    Call it before any thread exists: only the calling thread goes on.
    """
    child = os.fork()
    if child == 0:
        os.setsid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        return
    passed_at = 0.0

    def pass_on(number: int, _: object) -> None:
        nonlocal passed_at
        if time.monotonic() - passed_at < _SAME_SIGNAL_S:  # `timeout` signals its child, and then the child's group
            return
        passed_at = time.monotonic()
        os.kill(child, signal.SIGTERM if number == signal.SIGHUP else number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, pass_on)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    raise typer.Exit(code if code >= 0 else 128 - code)
