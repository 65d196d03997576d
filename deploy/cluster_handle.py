"""How commands speak with the controller of a cluster, wherever in Ray it is; needs an initialised Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import ray
from ray.exceptions import RayActorError

from ..core.config import ClusterConfig, WorkerRole
from ..core.errors import Unavailable, from_code
from .controller_actor import NAME, Outcome, Refusal, start_controller
from .launch import Command
from .members import ClusterView, MemberFailed
from .roles import role_command

_REPLY_S = 60.0  # a controller that was just killed needs a while to find all there is
_FOLLOW_S = 2.0
_PIECE_BYTES = 1 << 20


class ClusterHandle:
    """Every call waits for a controller that is being restarted. Raises: Unavailable: it does not come back."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    @classmethod
    def find(cls) -> ClusterHandle | None:
        """The cluster in our Ray namespace."""
        try:
            return cls(ray.get_actor(NAME))
        except ValueError:
            return None

    @classmethod
    def start(cls, config: ClusterConfig, log_dir: Path, command: Command = role_command) -> ClusterHandle:
        return cls(start_controller(config, log_dir, command))

    async def view(self) -> ClusterView:
        view: ClusterView = await self._call("view")
        return view

    async def config(self) -> ClusterConfig:
        config: ClusterConfig = await self._call("config")
        return config

    async def outcome(self) -> Outcome | None:
        """None while the cluster runs."""
        outcome: Outcome | None = await self._call("outcome")
        return outcome

    async def pid(self) -> int:
        pid: int = await self._call("pid")
        return pid

    async def preview(self, config: ClusterConfig) -> str:
        """What applying the configuration will do. Raises: ConfigError: it cannot be applied."""
        return str(_accepted(await self._call("preview", config)))

    async def apply(self, config: ClusterConfig) -> None:
        """Raises: ConfigError: it cannot be applied."""
        _accepted(await self._call("apply", config))

    async def scale(self, counts: Mapping[WorkerRole, int]) -> None:
        """Raises: ConfigError: a number is out of bounds."""
        _accepted(await self._call("scale", dict(counts)))

    async def drain(self, name: str, *, restart: bool) -> None:
        """Raises: ConfigError: there is none of this name, or the pool would be too small."""
        _accepted(await self._call("drain", name, restart))

    async def stop(self) -> None:
        """Ask the cluster to end; `outcome` tells when it has. A second call does not wait for requests."""
        await self._call("stop")

    async def dismiss(self) -> None:
        """End the controller itself, once its cluster has ended."""
        await asyncio.to_thread(ray.kill, self._actor, no_restart=True)

    async def log(self, name: str, *, last_bytes: int, follow: bool) -> AsyncIterator[bytes]:
        """The end of a process's log, and what comes after it. Raises: Unavailable: the process is not there."""
        try:
            actor = self._actor if name == NAME else await asyncio.to_thread(ray.get_actor, name)
        except ValueError:
            raise Unavailable(f"{name} has no place in the cluster now, so its log is out of reach") from None
        offset = -last_bytes
        while True:
            try:
                offset, piece = await actor.log.remote(offset, _PIECE_BYTES, _FOLLOW_S if follow else 0.0)
            except RayActorError as error:
                raise Unavailable(f"{name} lost its node, so its log is out of reach") from error
            if piece:
                yield piece
            elif not follow:
                return

    async def _call(self, method: str, *arguments: Any) -> Any:
        try:
            async with asyncio.timeout(_REPLY_S):
                return await getattr(self._actor, method).remote(*arguments)
        except TimeoutError as error:
            raise Unavailable(f"the controller does not answer within {_REPLY_S:g} s; is Ray's head there?") from error
        except RayActorError as error:
            raise Unavailable(f"the controller is gone: {error}") from error


def raise_refusal(refusal: Refusal) -> NoReturn:
    """Raises: SplitserveError: what the refusal says, with its type."""
    if refusal.log_path:
        raise MemberFailed(refusal.message, log_path=refusal.log_path, log_tail=refusal.log_tail)
    raise from_code(refusal.code, refusal.message)


def _accepted(answer: Any) -> Any:
    if isinstance(answer, Refusal):
        raise_refusal(answer)
    return answer
