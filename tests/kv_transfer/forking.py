"""Runs scripts of this folder as processes of their own, forked from this one: importing torch takes longest.

python forking.py SOCKET_FD: each message is a JSON command line, and brings the script's stdin and stdout. The answer
is a process id.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import sys
import traceback

import conftest  # noqa: F401  what all scripts import


def main(requests: socket.socket) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    while True:
        message, streams, _, _ = socket.recv_fds(requests, 4096, 2)
        if not message:
            return
        if (pid := os.fork()) == 0:
            requests.close()
            run(json.loads(message), streams)
        for stream in streams:
            os.close(stream)
        requests.send(str(pid).encode())


def run(command: list[str], streams: list[int]) -> None:
    """In the new process, which ends with it."""
    code = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")
        code = 0
    except BaseException:  # noqa: BLE001  it must not go on as a second one of these
        traceback.print_exc()
    finally:
        os._exit(code)


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
