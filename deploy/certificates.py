"""A development authority and one certificate for each role; production has an authority of its own."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ..core.errors import ConfigError
from ..proto.tls import DOMAIN, PeerRole

CA_NAME = "ca"
ROLES = tuple(role for role in PeerRole if role is not PeerRole.WORKER)
_CLOCK_SKEW = timedelta(minutes=5)  # of hosts whose clocks differ


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """What a certificate file says."""

    path: Path
    roles: tuple[str, ...]
    hosts: tuple[str, ...]
    expires_at: datetime


def make_authority(directory: Path, *, days: int) -> None:
    """Write ca.pem and ca.key. Raises: ConfigError: one is there already, or cannot be written."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "splitserve development CA")])
    usage = x509.KeyUsage(
        key_cert_sign=True,
        crl_sign=True,
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    made = (
        _builder(name, name, key, days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    _write_pair(directory, CA_NAME, key, made, replace=False)


def make_certificate(
    directory: Path,
    role: PeerRole,
    *,
    hosts: Sequence[str],
    days: int,
    also: Sequence[PeerRole] = (),
    replace: bool = False,
) -> Path:
    """Write ROLE.pem and ROLE.key, signed by the authority of the directory.

    Args:
        hosts: names and IP addresses that servers with it may be dialled by.
        also: further roles that it proves.
    Raises: ConfigError: there is no authority, a file is there already, or a host is not a name.
    """
    ca_key, ca = _read_authority(directory)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, role.value)])
    worker = [PeerRole.WORKER] if role in (PeerRole.PREFILL, PeerRole.DECODE) else []
    proved = [x509.DNSName(each.dns_name) for each in (role, *also, *worker)]
    names: list[x509.GeneralName] = [*proved, *(_general_name(host) for host in hosts)]
    purposes = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    made = (
        _builder(subject, ca.subject, key, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    return _write_pair(directory, role.value, key, made, replace=replace)


def read_certificates(directory: Path) -> list[Certificate]:
    """Every .pem file of a directory. Raises: ConfigError: there is none, or one is no certificate."""
    found = []
    for path in sorted(directory.glob("*.pem")):
        try:
            made = x509.load_pem_x509_certificate(path.read_bytes())
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} is not a certificate that can be read: {error}") from error
        found.append(_described(path, made))
    if not found:
        raise ConfigError(
            f"{directory} holds no certificate (*.pem); make some with `splitserve certs init {directory}`"
        )
    return found


def _described(path: Path, made: x509.Certificate) -> Certificate:
    try:
        names = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        names = x509.SubjectAlternativeName([])
    dns = names.get_values_for_type(x509.DNSName)
    suffix = f".{DOMAIN}"
    return Certificate(
        path=path,
        roles=tuple(name.removesuffix(suffix) for name in dns if name.endswith(suffix)),
        hosts=(
            *(name for name in dns if not name.endswith(suffix)),
            *(str(address) for address in names.get_values_for_type(x509.IPAddress)),
        ),
        expires_at=made.not_valid_after_utc,
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + timedelta(days=days))
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        pass
    if not host or not all(part.replace("-", "").isalnum() and part.isascii() for part in host.split(".")):
        raise ConfigError(f"--host {host!r} is neither an IP address nor a host name")
    return x509.DNSName(host)


def _read_authority(directory: Path) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    try:
        key = serialization.load_pem_private_key((directory / f"{CA_NAME}.key").read_bytes(), None)
        made = x509.load_pem_x509_certificate((directory / f"{CA_NAME}.pem").read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{directory} holds no authority that can sign: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{directory / CA_NAME}.key is not a key that this command made")
    return key, made


def _write_pair(
    directory: Path, name: str, key: ec.EllipticCurvePrivateKey, made: x509.Certificate, *, replace: bool
) -> Path:
    plain = serialization.NoEncryption()
    secret = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    _write(directory / f"{name}.key", secret, 0o600, replace)
    path = directory / f"{name}.pem"
    _write(path, made.public_bytes(serialization.Encoding.PEM), 0o644, replace)
    return path


def _write(path: Path, data: bytes, mode: int, replace: bool) -> None:
    """Never readable by others in between, and seen by a reader whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not replace:
            raise ConfigError(f"{path} is there already; choose another directory, or --renew to replace certificates")
        part.unlink(missing_ok=True)
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)
        part.replace(path)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
