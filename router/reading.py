"""One call's place in an answer: the newest call of a request reads it, at its own pace."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from ..core.errors import Superseded

if TYPE_CHECKING:
    from .job import Job


class Reading:
    """What one `Generate` call reads. A later call with the same idempotency key takes the answer away from it.

    Args: num_received: tokens that its client already has.
    """

    def __init__(self, job: Job, num_received: int) -> None:
        self.job = job
        self._num_read = num_received
        self._taken = False
        self._woken: asyncio.Future[None] | None = None

    async def read(self) -> list[int]:
        """The next tokens, all that are there; [] once the answer is complete. Raises: SplitserveError: it failed."""
        while True:
            if self._taken:
                raise Superseded("a later call with this idempotency key reads the answer now")
            if new := self.job.answer.token_ids[self._num_read :]:
                self._num_read += len(new)
                return new
            if self.job.error is not None:
                raise self.job.error
            if self.job.answer.ended:
                return []
            self._woken = asyncio.get_running_loop().create_future()
            await self._woken

    def wake(self) -> None:
        """There is something to read."""
        if self._woken is not None and not self._woken.done():
            self._woken.set_result(None)

    def take_away(self) -> None:
        """Another call reads the answer from now on."""
        self._taken = True
        self.wake()
