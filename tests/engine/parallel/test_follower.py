"""A rank other than 0 ends at once when it fails, whatever threads it has: its worker waits for nothing else."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import json, os, sys, threading
from dataclasses import asdict
from splitserve.engine.options import EngineOptions
from splitserve.engine.parallel import follower
from splitserve.engine.parallel.messages import write_message

def make_mover(settings, rank, link):
    threading.Thread(target=threading.Event().wait).start()  # as a communicator's, it would outlive `main`
    raise KeyError("no such setting")

messages, write = os.pipe()
start = {"rank": 1, "size": 2, "store": "store", "mover": {}, "log_level": 20}
start["options"] = asdict(EngineOptions(model="m"))
write_message(write, json.dumps(start).encode())
sys.argv = ["follower", str(os.getppid()), str(messages), "1", "0"]
follower.main(make_mover)
"""


def test_a_rank_that_fails_ends_its_process_with_the_reason() -> None:
    ended = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    assert "rank 1: this rank ends" in ended.stderr
    assert "no such setting" in ended.stderr
