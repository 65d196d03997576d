"""The Ray that holds a cluster: one of our own on this machine, or one that others run."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray._private import services
from ray.exceptions import RayError

from ..core.address import check_address
from ..core.errors import ConfigError
from .ray_directory import ray_directory
from .ray_environment import NoRay

_CONNECT_TIMEOUT_S = 5.0
_OBJECT_STORE_BYTES = 80 << 20  # nothing of ours goes through it; Ray's least is 75 MiB


@contextmanager
def local_ray(num_cpus: int, namespace: str) -> Iterator[None]:
    """A Ray of our own on this machine, that leaves nothing behind.

    Call `prepare_ray_environment` before anything imports Ray, and this on the main thread: the kernel ends Ray's
    processes together with the thread that started them.
    """
    with ray_directory() as directory:
        try:
            ray.init(
                address="local",  # not the cluster that RAY_ADDRESS may name
                namespace=namespace,
                num_cpus=max(num_cpus, os.cpu_count() or 1),
                object_store_memory=_OBJECT_STORE_BYTES,
                include_dashboard=False,
                log_to_driver=False,
                configure_logging=False,
                _temp_dir=str(directory),
            )
            yield
        finally:
            ray.shutdown()


def running_ray() -> str | None:
    """host:port of the Ray that runs on this machine, or that RAY_ADDRESS names; None if there is none."""
    named = os.environ.get("RAY_ADDRESS", "")
    if named and named != "auto":
        return named
    address: str | None = services.find_bootstrap_address(None)  # what `ray start` left; it may be gone since
    if address is None:
        return None
    try:
        _reach(address)
    except OSError:
        return None
    return address


@contextmanager
def joined_ray(address: str, namespace: str) -> Iterator[None]:
    """A connection to a Ray that others run. Raises: NoRay: nobody answers there. ConfigError: it does not take us."""
    check_address(address, "Ray's address")
    try:
        _reach(address)
    except OSError as error:
        raise NoRay(f"no Ray answers at {address}: {error.strerror or error}; check `ray status` there") from error
    try:
        ray.init(address=address, namespace=namespace, log_to_driver=False, configure_logging=False)
    except (ConnectionError, ValueError, RuntimeError, RayError) as error:  # such as another version, or token
        raise ConfigError(f"cannot join the Ray cluster at {address}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """Ray itself tries for two minutes, and hears no signal meanwhile. Raises: OSError: nobody listens."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), _CONNECT_TIMEOUT_S).close()
