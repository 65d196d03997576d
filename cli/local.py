"""A local cluster for as long as one command runs: `generate --local` and `chat --local`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from ..core.errors import SplitserveError
from ..core.state import read_state
from ..deploy.claim import local_cluster_pid

_STOP_S = 30.0


@contextmanager
def local_router(wanted: bool, address: str | None, model: str) -> Iterator[str | None]:
    """The router's address: `address` as it is, or that of a cluster that runs until the end of the block.

    A local cluster that is there already is asked instead, and left running. Raises: SplitserveError: it did not start.
    """
    if not wanted or address is not None:
        yield address
        return
    state = read_state()
    if local_cluster_pid() is not None and state is not None and state.router_addresses:
        yield state.router_addresses[0]
        return
    typer.secho("no local cluster is running; starting one for this command", err=True)
    read_fd, write_fd = os.pipe()
    # Not the console script: the package may be on the path without being installed.
    command = [sys.executable, "-c", "from splitserve.cli.main import main; main()", "up", "--port", "0"]
    command += ["--model", model] if model else []
    child = subprocess.Popen(
        [*command, "--ready-file", f"/dev/fd/{write_fd}"],
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr.fileno(),  # its progress; the command's own output is the answer alone
        pass_fds=(write_fd,),
        start_new_session=True,  # Ctrl-C ends the answer first, then the cluster
    )
    os.close(write_fd)
    try:
        with os.fdopen(read_fd, encoding="utf-8") as pipe:
            line = pipe.readline()
        row = json.loads(line) if line else {"message": "it ended before it served"}
        if "address" not in row:
            raise SplitserveError(f"the local cluster did not start: {row['message']}")
        yield row["address"]
    finally:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            child.kill()
