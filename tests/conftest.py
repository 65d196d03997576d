"""Settings of every test process."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

# Before torch is imported. Tests run several engines in one process; on few cores their threads would fight for them.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import settings

# A shell that runs this in the background has interrupts ignored, and what tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# How long one example takes says how busy the machine is.
settings.register_profile("splitserve", deadline=None)
settings.load_profile("splitserve")


_HERE = Path(__file__).parent

# Public data that some tests read, where it lies beside the checkout; without it they are skipped.
_DATA = _HERE.resolve().parents[1] / "shared" / "data"
if not os.environ.get("SPLITSERVE_DATA") and _DATA.is_dir():
    os.environ["SPLITSERVE_DATA"] = str(_DATA)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What one process runs of tests that several share: a file, for its clusters, and everything that starts Ray."""
    for item in items:
        path = item.path.relative_to(_HERE)
        item.add_marker(pytest.mark.xdist_group("deploy" if path.parts[0] == "deploy" else str(path)))


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An authority and a certificate for each role."""
    from .certificates import Certificates  # needs the extra [certs]: not for tests that do without

    return Certificates.make(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="session")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same roles, signed by an authority that nobody here trusts."""
    from .certificates import Certificates

    return Certificates.make(tmp_path_factory.mktemp("strangers"))


@pytest.fixture(autouse=True)
def _no_certificates_of_the_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CA", "CERT", "KEY"):
        monkeypatch.delenv(f"SPLITSERVE_TLS_{name}", raising=False)
