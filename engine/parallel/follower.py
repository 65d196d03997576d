"""A rank other than 0: loads its share of the model and computes each step that rank 0 tells it. Started by ranks.py.

It ends with rank 0, however that ends: at the end of the message pipe, or by the kernel's signal.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..options import EngineOptions
    from .group import RankGroup

_PR_SET_PDEATHSIG = 1


def follow(options: EngineOptions, group: RankGroup, read: Callable[[], bytes | None]) -> None:
    """Serve as `group.rank` until `read`, which waits for rank 0's next message, returns None."""
    import numpy as np

    from ..engine import on_device
    from ..loading import load_model
    from .messages import Order, StepReader

    model = load_model(options, group)
    _, runner = on_device(model, options, None)
    steps = StepReader()
    running = 0
    while (message := read()) is not None:
        numbers = np.frombuffer(message, np.int32).tolist()
        if numbers[0] == Order.WARM_UP:
            runner.warm_up()
            continue
        if running == runner.max_steps:
            runner.collect()
            running -= 1
        runner.launch(*steps.step(numbers))
        running += 1
        if runner.max_steps == 1:  # such a runner computes when it is asked for the result
            runner.collect()
            running -= 1
    runner.close()


def main() -> None:
    """`follower PARENT_PID MESSAGES_FD STATUS_FD`; the first message is JSON and says what to be."""
    parent, messages, status = (int(argument) for argument in sys.argv[1:4])
    _end_with(parent)
    os.set_inheritable(messages, False)
    os.set_inheritable(status, False)
    for number in (signal.SIGINT, signal.SIGTERM):  # meant for rank 0, which drains first
        signal.signal(number, signal.SIG_IGN)

    from .messages import read_message

    if (start := read_message(messages)) is None:
        return
    told = json.loads(start)
    _log(told["log_level"], told["rank"])

    from pathlib import Path

    from ...core.errors import SplitserveError
    from ..options import EngineOptions
    from .group import RankGroup

    def say(row: dict[str, object]) -> None:
        os.write(status, (json.dumps(row) + "\n").encode())

    options = EngineOptions(**told["options"])
    if options.num_threads is not None:
        import torch

        torch.set_num_threads(options.num_threads)
    group = RankGroup(
        rank=told["rank"], size=told["size"], store=Path(told["store"]), meet=lambda: say({"loaded": True})
    )
    try:
        follow(options, group, lambda: read_message(messages))
    except SplitserveError as error:
        say({"error": error.code, "message": error.message})
        read_message(messages)  # rank 0 most likely fails in the same way, and ends this process
    os._exit(0)  # a communicator whose peers are gone may never close


def _end_with(parent: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        sys.exit(f"prctl(PR_SET_PDEATHSIG) failed: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != parent:  # it ended before the line above
        sys.exit(1)


def _log(level: int, rank: int) -> None:
    import logging

    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname).1s %(name)s: rank {rank}: %(message)s"))
    logger = logging.getLogger("splitserve")
    logger.handlers = [handler]
    logger.setLevel(level)


if __name__ == "__main__":
    main()
