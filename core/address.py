"""HOST:PORT as people write it."""

from __future__ import annotations

import re

from .errors import ConfigError


def check_address(address: str, what: str) -> str:
    """The address, if it can be one. Raises: ConfigError: it is malformed; `what` names it in the message."""
    match = re.fullmatch(r"(?:\[[^\]/]+\]|[^:/\s]+):(\d{1,5})", address)
    if match is None or not 0 < int(match[1]) < 65536:
        raise ConfigError(f"{what} is {address!r}; it must be HOST:PORT, as in 127.0.0.1:7000")
    return address


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens on `host`."""
    return host == "localhost" or host.startswith("127.") or host.strip("[]") == "::1"
