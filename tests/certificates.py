"""Certificates for tests: an authority's directory, and the files of each role in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from splitserve.deploy.certificates import ROLES, make_authority, make_certificate
from splitserve.proto.tls import Tls

HOSTS = ("127.0.0.1", "localhost")


@dataclass(frozen=True)
class Certificates:
    """`tls(role)` is what a process of that role has."""

    directory: Path

    @classmethod
    def make(cls, directory: Path) -> Certificates:
        make_authority(directory, days=2)
        made = cls(directory)
        for role in ROLES:
            make_certificate(directory, role, hosts=HOSTS, days=1)
        return made

    def tls(self, role: str, *, ca: Path | None = None) -> Tls:
        return Tls(
            ca=ca or self.directory / "ca.pem", cert=self.directory / f"{role}.pem", key=self.directory / f"{role}.key"
        )
