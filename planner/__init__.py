"""The capacity planner: `from splitserve.planner import plan`."""

from .api import plan, workers_needed
from .search import Plan

__all__ = ["Plan", "plan", "workers_needed"]
