"""Settings of every test process."""

from __future__ import annotations

import os

# Before torch is imported. Tests run several engines in one process; on few cores their threads would fight for them.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import settings

# How long one example takes says how busy the machine is.
settings.register_profile("splitserve", deadline=None)
settings.load_profile("splitserve")
