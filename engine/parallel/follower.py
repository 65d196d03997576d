"""A rank other than 0: loads its share of the model and computes each step that rank 0 tells it. Started by ranks.py.

It ends with rank 0, however that ends: at the end of the message pipe, or by the kernel's signal.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from ..options import EngineOptions
    from ..pool import KvPool
    from .group import RankGroup

_PR_SET_PDEATHSIG = 1


class KvMover(Protocol):
    """Moves this rank's KV from or to other workers, in a thread of its own."""

    def serve(self, pool: KvPool) -> None:
        """The pool is there; called once, before the first step."""
        ...

    def started(self, request_id: str, block_table: Sequence[int]) -> None:
        """A sequence whose KV goes elsewhere enters its first step; its table grows in place."""
        ...

    def kv_written(self, request_id: str, layer_start: int, layer_end: int, token_start: int, token_end: int) -> None:
        """These layers of these tokens are in the pool."""
        ...


MakeMover = Callable[[Mapping[str, Any], int, int], KvMover]  # of rank 0's settings, the rank, and a socket to rank 0


def follow(
    options: EngineOptions, group: RankGroup, read: Callable[[], bytes | None], mover: KvMover | None = None
) -> None:
    """Serve as `group.rank` until `read`, which waits for rank 0's next message, returns None."""
    import numpy as np

    from ..loading import load_model
    from ..start import on_device
    from .messages import Order, StepReader

    model = load_model(options, group)
    pool, runner = on_device(model, options, None if mover is None else mover.kv_written)
    if mover is not None:
        mover.serve(pool)
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
        plan, mode = steps.step(numbers)
        if mover is not None:
            for sequence in plan.started:
                if sequence.prefill_only:
                    mover.started(sequence.request_id, sequence.block_table)
                    if sequence.num_cached:
                        mover.kv_written(sequence.request_id, 0, model.geometry.num_layers, 0, sequence.num_cached)
        runner.launch(plan, mode)
        running += 1
        if runner.max_steps == 1:  # such a runner computes when it is asked for the result
            runner.collect()
            running -= 1
    runner.close()


def main(make_mover: MakeMover | None = None) -> None:
    """`PARENT_PID MESSAGES_FD STATUS_FD LINK_FD` are the arguments; the first message is JSON and says what to be."""
    parent, messages, status, link = (int(argument) for argument in sys.argv[1:5])
    _end_with(parent)
    for descriptor in (messages, status, link):
        os.set_inheritable(descriptor, False)
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
        mover = None if make_mover is None else make_mover(told["mover"], told["rank"], link)
        follow(options, group, lambda: read_message(messages), mover)
    except SplitserveError as error:
        say({"error": error.code, "message": error.message})
        read_message(messages)  # rank 0 most likely fails in the same way, and ends this process
    except Exception:
        logging.getLogger(__name__).critical("this rank ends", exc_info=True)
        os._exit(1)
    os._exit(0)  # a communicator whose peers are gone may never close


def _end_with(parent: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        sys.exit(f"prctl(PR_SET_PDEATHSIG) failed: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != parent:  # it ended before the line above
        sys.exit(1)


def _log(level: int, rank: int) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname).1s %(name)s: rank {rank}: %(message)s"))
    logger = logging.getLogger("splitserve")
    logger.handlers = [handler]
    logger.setLevel(level)


if __name__ == "__main__":
    main()
