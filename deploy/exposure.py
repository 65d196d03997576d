"""Servers that others can reach: refused or warned about where nothing protects them."""

from __future__ import annotations

import ipaddress
import logging

from ..core.errors import ConfigError
from ..proto.tls import Tls

logger = logging.getLogger(__name__)


def check_exposure(host: str, tls: Tls | None, *, required: bool) -> None:
    """Raises: ConfigError: TLS is required, and this host would be reached without it."""
    if tls is not None or is_loopback(host):
        return
    what = (
        f"{host} can be reached from other machines, and nothing is encrypted or asked for a certificate; set ca, cert "
        "and key (`splitserve certs init` makes them), or listen on 127.0.0.1"
    )
    if required:
        raise ConfigError(f"security.tls_required is set: {what}")
    logger.warning("%s; fine on a network that you trust (docs/security.md)", what)


def is_loopback(host: str) -> bool:
    """A name counts as loopback only if it is localhost: others may mean anything tomorrow."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
