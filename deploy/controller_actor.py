"""The controller as a detached Ray actor: it survives its driver, and goes on after its own death."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.experimental import internal_kv
from ray.util.placement_group import placement_group_table

from ..core.config import ClusterConfig, Role, WorkerRole
from ..core.errors import SplitserveError
from .admin_access import AdminAccess
from .changes import Changes, changes
from .controller import Controller
from .launch import Command
from .log_reader import read_log
from .members import ClusterView, MemberFailed, role_in
from .placement import find_group
from .roles import role_command
from .scaler import check_scaling

NAME = "controller"
_KV_NAMESPACE = b"splitserve"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A typed error as a value, since it crosses processes; `log_tail` is that of a process that did not start."""

    code: str
    message: str
    log_path: str = ""
    log_tail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How the cluster ended; `refusal` is None if it was asked to."""

    refusal: Refusal | None


class ControllerActor:
    """Made once for each cluster; Ray makes it again when its process or its node dies.

    What is wanted of the cluster is kept with Ray's head, what there is of it is found by the names of the actors.
    """

    async def __init__(  # type: ignore[misc]
        self, config: ClusterConfig, log_dir: str, command: Command = role_command
    ) -> None:
        self._log_path = Path(log_dir) / f"{NAME}.log"
        _log_to(self._log_path)
        self._key = ray.get_runtime_context().namespace.encode()
        stored: bytes | None = await asyncio.to_thread(internal_kv._internal_kv_get, self._key, namespace=_KV_NAMESPACE)
        adopt: Mapping[str, Role] = {}
        access = AdminAccess()
        if stored is not None:
            row = json.loads(stored)
            config, access = ClusterConfig.model_validate(row["config"]), AdminAccess(row["secret"])
            adopt = await asyncio.to_thread(_left_behind, row["roles"])
            logger.warning("the controller was restarted and goes on with %s", ", ".join(adopt) or "nothing")
        self._controller = Controller(config, Path(log_dir), command=command, adopt=adopt, access=access)
        self._secret = access.secret
        await self._store()
        self._outcome: Outcome | None = None
        self._run = asyncio.create_task(self._serve())
        self._keep = asyncio.create_task(self._store_sizes())

    async def view(self) -> ClusterView:
        return self._controller.view()

    async def config(self) -> ClusterConfig:
        """What is wanted of the cluster."""
        return self._controller.config

    async def outcome(self) -> Outcome | None:
        """None while the cluster runs."""
        return self._outcome

    async def pid(self) -> int:
        return os.getpid()

    async def preview(self, config: ClusterConfig) -> str | Refusal:
        """What `apply` would do, in words."""
        try:
            return str(self._changes(config))
        except SplitserveError as error:
            return _refusal(error)

    async def apply(self, config: ClusterConfig) -> Refusal | None:
        try:
            self._changes(config)
        except SplitserveError as error:
            return _refusal(error)
        self._controller.apply(config)
        await self._store()
        return None

    async def scale(self, counts: Mapping[WorkerRole, int]) -> Refusal | None:
        try:
            self._controller.apply(self._controller.config.scaled(counts))
        except SplitserveError as error:
            return _refusal(error)
        await self._store()
        return None

    async def drain(self, name: str, restart: bool) -> Refusal | None:
        try:
            self._controller.drain(name, restart=restart)
        except SplitserveError as error:
            return _refusal(error)
        await self._store()
        return None

    async def stop(self) -> None:
        """A second call does not wait for requests."""
        self._controller.stop()

    async def log(self, offset: int, max_bytes: int, wait_s: float) -> tuple[int, bytes]:
        """Its own; see read_log."""
        return await read_log(self._log_path, offset, max_bytes, wait_s)

    def _changes(self, config: ClusterConfig) -> Changes:
        """Raises: ConfigError: the cluster cannot become this."""
        wanted = self._controller.complete(config)
        found = changes(self._controller.config, wanted)
        check_scaling(wanted)
        return found

    async def _serve(self) -> None:
        refusal = None
        try:
            await self._controller.run()
        except SplitserveError as error:
            refusal = _refusal(error)
        except Exception as error:
            logger.exception("the controller failed")
            refusal = Refusal(code="internal", message=f"the controller failed: {error!r}")
        self._keep.cancel()
        await asyncio.to_thread(internal_kv._internal_kv_del, self._key, namespace=_KV_NAMESPACE)
        self._outcome = Outcome(refusal=refusal)

    async def _store_sizes(self) -> None:
        """What the controller decides by itself is wanted too."""
        while True:
            await self._controller.resized.wait()
            self._controller.resized.clear()
            await self._store()

    async def _store(self) -> None:
        controller = self._controller
        row = {
            "config": controller.config.model_dump(mode="json"),
            "secret": self._secret,
            "roles": {name: role for name, role in controller.roles.items() if role != role_in(name)},
        }
        text = json.dumps(row).encode()
        await asyncio.to_thread(internal_kv._internal_kv_put, self._key, text, overwrite=True, namespace=_KV_NAMESPACE)


def start_controller(config: ClusterConfig, log_dir: Path, command: Command) -> Any:
    """The handle of a new controller in our Ray namespace."""
    internal_kv._internal_kv_del(ray.get_runtime_context().namespace.encode(), namespace=_KV_NAMESPACE)
    options = {"name": NAME, "lifetime": "detached", "num_cpus": 0, "max_restarts": -1, "max_task_retries": -1}
    return ray.remote(ControllerActor).options(**options).remote(config, str(log_dir), command)


def _left_behind(changed: Mapping[str, Role]) -> Mapping[str, Role]:
    """The processes of an earlier incarnation and their roles; placement groups without one are removed.

    `changed`: the roles of those that are not any more what they were started as.
    """
    names = [name for name in ray.util.list_named_actors() if role_in(name) is not None]
    for row in placement_group_table().values():
        if role_in(row["name"]) is not None and row["name"] not in names:
            group = find_group(row["name"])
            if group is not None:
                ray.util.remove_placement_group(group)
    started = {name: role for name in sorted(names) if (role := role_in(name)) is not None}
    return {name: changed.get(name, role) for name, role in started.items()}


def _refusal(error: SplitserveError) -> Refusal:
    if isinstance(error, MemberFailed):
        return Refusal(code=error.code, message=error.message, log_path=error.log_path, log_tail=error.log_tail)
    return Refusal(code=error.code, message=error.message)


def _log_to(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(name)s: %(message)s"))
    root = logging.getLogger("splitserve")
    root.handlers = [handler]
    root.setLevel(logging.INFO)
