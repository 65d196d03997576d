"""How the controller proves to its routers who it is: a key of its own, of which they are given the digest."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping

from ..client.routers import key_metadata
from .options import CONTROLLER_KEY


class AdminAccess:
    """A key for the life of one cluster. Routers get its digest alone; the controller keeps it with Ray's head, for its
    own next incarnation.
    """

    def __init__(self, secret: str = "") -> None:
        self.secret = secret = secret or secrets.token_urlsafe(32)
        self.metadata = key_metadata(secret)  # of calls to routers
        self.environment: Mapping[str, str] = {  # of routers
            CONTROLLER_KEY: hashlib.sha256(secret.encode()).hexdigest()
        }
