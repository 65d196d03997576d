"""A rank whose KV cannot move any more ends at once: rank 0 notices a process that is gone, not a thread."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import socket, threading
from splitserve.worker.rank_agent import RankAgent
rank_0, link = socket.socketpair()
RankAgent(None, 1, link).serve(None)
rank_0.sendall(b"no JSON\\n")
threading.Event().wait()
"""


def test_an_agent_that_fails_ends_its_process_with_the_reason() -> None:
    ended = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    assert "JSONDecodeError" in ended.stderr
