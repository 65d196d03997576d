"""Where the routers are: as told, or as the environment or the running local cluster says."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ..core.address import check_address
from ..core.errors import ConfigError
from ..core.state import read_state


def find_routers(address: str | Sequence[str] | None = None) -> tuple[str, ...]:
    """Each HOST:PORT given (several: a sequence, or with commas), else of SPLITSERVE_ADDRESS, else of the local cluster
    that `splitserve up` started.

    Raises: ConfigError: there is none, or one is malformed.
    """
    if address is None:
        address = os.environ.get("SPLITSERVE_ADDRESS") or _local_routers()
    found = tuple(part.strip() for part in address.split(",")) if isinstance(address, str) else tuple(address)
    return tuple(dict.fromkeys(check_address(each, "the router's address") for each in found or ("",)))


def _local_routers() -> tuple[str, ...]:
    state = read_state()
    if state is None or not state.router_addresses:
        raise ConfigError(
            "no router is named and no local cluster is running; start one with `splitserve up` (for one command: "
            "--local), or name a router by its HOST:PORT (--address on the command line, or SPLITSERVE_ADDRESS)"
        )
    return state.router_addresses
