"""How the controller proves to its routers who it is: a key of its own, of which they are given the digest."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping

from ..client.routers import key_metadata
from .options import CONTROLLER_KEY


class AdminAccess:
    """A key for the life of one controller. Only its digest leaves the process, and only to routers."""

    def __init__(self) -> None:
        secret = secrets.token_urlsafe(32)
        self.metadata = key_metadata(secret)  # of calls to routers
        self.environment: Mapping[str, str] = {  # of routers
            CONTROLLER_KEY: hashlib.sha256(secret.encode()).hexdigest()
        }
