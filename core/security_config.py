"""`security`: the certificates of every process."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from .config_section import File, Section

_ROLE = "; {role} stands for router, prefill, decode (colocated too) or operator (the controller)"


class SecurityConfig(Section):
    """Mutual TLS on every link, or none; files are in PEM and read again when they change."""

    ca: File = Field(
        default=None, description="Certificate of the authority that signs everybody's; empty: no TLS anywhere"
    )
    cert: File = Field(default=None, description=f"Certificate of each process{_ROLE}")
    key: File = Field(default=None, description="Its private key, named likewise")
    tls_required: bool = Field(
        default=False, description="Refuse to listen on another address than loopback without TLS, instead of warning"
    )
    http_client_cert: bool | None = Field(
        default=None, description="Ask HTTP clients for a certificate, with TLS; empty: unless there are API keys"
    )

    @model_validator(mode="after")
    def _all_three(self) -> Self:
        named = {name: getattr(self, name) for name in ("ca", "cert", "key")}
        missing = [name for name, path in named.items() if path is None]
        if missing and len(missing) < len(named):
            raise ValueError(f"ca, cert and key go together; {' and '.join(missing)} is not set")
        return self
