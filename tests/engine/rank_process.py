"""Rank 1 of one model after another: `rank_process.py MESSAGES_FD`. JSON starts a model, an empty message ends it."""

import json
import sys
from pathlib import Path

import torch
from splitserve.engine.options import EngineOptions
from splitserve.engine.parallel.follower import follow
from splitserve.engine.parallel.group import RankGroup
from splitserve.engine.parallel.messages import read_message


def main(messages: int) -> None:
    torch.set_num_threads(1)
    while (start := read_message(messages)) is not None:
        told = json.loads(start)
        group = RankGroup(rank=1, size=2, store=Path(told["store"]))
        follow(EngineOptions(**told["options"]), group, lambda: read_message(messages) or None)
        group.close()


if __name__ == "__main__":
    main(int(sys.argv[1]))
