"""A sender's lanes, one for each receiver and epoch of its link; an epoch is never used twice."""

from __future__ import annotations

import logging
from collections import OrderedDict

from ..core.errors import StaleMessage, TransferFailed
from .channel import Channel, Lane, Rendezvous

logger = logging.getLogger(__name__)

MAX_LANES = 64  # each holds a thread and connections; the receiver of the oldest one connects anew if it still lives
MAX_COMMUNICATORS = 16  # the same of NCCL, where each holds memory of the GPU as well


class Lanes:
    """Lives on the event loop."""

    def __init__(self, rendezvous: Rendezvous, max_lanes: int = MAX_LANES) -> None:
        self._rendezvous = rendezvous
        self._max_lanes = max_lanes
        self._lanes: OrderedDict[tuple[str, int], tuple[int, Lane]] = OrderedDict()  # (boot id, rank): (epoch, lane)

    def invite(self, boot_id: str, rank: int, epoch: int) -> bytes:
        """Begin to set a lane up; the answer is what its receiver needs to join.

        Raises: StaleMessage: the epoch is not newer than the last one.
        """
        known, lane = self._lanes.pop((boot_id, rank), (0, None))
        if lane is not None:
            if epoch <= known:
                self._lanes[boot_id, rank] = (known, lane)
                raise StaleMessage(f"epoch {epoch} of rank {rank} of boot {boot_id} is not newer than {known}")
            lane.abort(f"epoch {epoch} replaced epoch {known}")
        meeting = self._rendezvous.invite()
        name = f"the channel to rank {rank} of boot {boot_id}, epoch {epoch},"

        def join() -> Channel:
            try:
                return meeting.join()
            except TransferFailed as error:  # its receiver, if it lives, only sees that nobody came
                logger.warning("%s could not be set up: %s", name, error.message)
                raise

        self._lanes[boot_id, rank] = (epoch, Lane(name, join))
        while len(self._lanes) > self._max_lanes:
            _, (_, oldest) = self._lanes.popitem(last=False)
            oldest.abort("too many receivers are connected")
        return meeting.invitation

    def find(self, boot_id: str, rank: int, epoch: int) -> Lane:
        """Raises: StaleMessage: there is no such lane, or it is broken; the receiver connects under a new epoch."""
        known, lane = self._lanes.get((boot_id, rank), (0, None))
        if lane is None or known != epoch or lane.error is not None:
            raise StaleMessage(f"there is no open channel of epoch {epoch} to rank {rank} of boot {boot_id}")
        return lane

    def close(self) -> None:
        for _, lane in self._lanes.values():
            lane.abort("the worker stops")
        self._lanes.clear()
