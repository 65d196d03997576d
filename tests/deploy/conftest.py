"""One real local Ray for the tests that need one, and a check that none of them leaves a process behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import psutil
import pytest
from splitserve.deploy.ray_environment import prepare_ray_environment

# Here, because the test modules import Ray, and Ray reads the environment only then.
prepare_ray_environment(None)


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    from splitserve.deploy.ray_start import local_ray

    before = set(psutil.Process().children(recursive=True))
    with ExitStack() as stack:
        try:
            stack.enter_context(local_ray(num_cpus=8, namespace="test"))
        except Exception as error:  # Ray has no name for a node that is not up after 30 s, and leaves its processes
            if "timed out during startup" not in str(error):
                raise
            for process in started_since(before):
                process.kill()
            stack.enter_context(local_ray(num_cpus=8, namespace="test"))
        yield
    assert not [process.cmdline() for process in started_since(before)]


def started_since(before: set[psutil.Process]) -> list[psutil.Process]:
    """Processes below this one that live."""
    left = set(psutil.Process().children(recursive=True)) - before
    return [process for process in left if process.status() != psutil.STATUS_ZOMBIE]
