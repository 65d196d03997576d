"""One real local Ray for the tests that need one, and a check that none of them leaves a process behind."""

from __future__ import annotations

from collections.abc import Iterator

import psutil
import pytest
from splitserve.deploy.ray_environment import prepare_ray_environment

# Here, because the test modules import Ray, and Ray reads the environment only then.
prepare_ray_environment(None)


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    from splitserve.deploy.ray_start import local_ray

    before = set(psutil.Process().children(recursive=True))
    with local_ray(num_cpus=8, namespace="test"):
        yield
    left = set(psutil.Process().children(recursive=True)) - before
    assert not [process.cmdline() for process in left if process.status() != psutil.STATUS_ZOMBIE]
