"""Clusters of one process and a small random model, as the end-to-end tests have them."""

from __future__ import annotations

from ..e2e.conftest import start_cluster, tiny

__all__ = ["start_cluster", "tiny"]
