"""Where the router is: as told, or as the environment or the running local cluster says."""

from __future__ import annotations

import os

from ..core.address import check_address
from ..core.errors import ConfigError
from ..core.state import read_state


def find_router(address: str | None = None) -> str:
    """HOST:PORT given, else of SPLITSERVE_ADDRESS, else of the local cluster that `splitserve up` started.

    Raises: ConfigError: there is none, or it is malformed.
    """
    found = address if address is not None else os.environ.get("SPLITSERVE_ADDRESS") or _local_router()
    return check_address(found, "the router's address")


def _local_router() -> str:
    state = read_state()
    if state is None or not state.router_addresses:
        raise ConfigError(
            "no router is named and no local cluster is running; start one with `splitserve up`, "
            "or name a router by its HOST:PORT (--address on the command line, or SPLITSERVE_ADDRESS)"
        )
    return state.router_addresses[0]
