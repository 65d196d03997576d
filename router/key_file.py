"""The file of API keys: names, digests, scopes and limits in YAML; read, added to, and read again when it changed."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import secrets
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ..core.api_key import ApiKey, Scope
from ..core.errors import ConfigError

logger = logging.getLogger(__name__)

_KEY_BYTES = 32  # random ones, so that a plain SHA-256 of a key cannot be searched for


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._-]+$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    scopes: tuple[Scope, ...] = (Scope.INFERENCE,)
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    max_requests_per_min: Annotated[int | None, Field(ge=1)] = None
    max_tokens_per_min: Annotated[int | None, Field(ge=1)] = None
    max_concurrent: Annotated[int | None, Field(ge=1)] = None

    @field_validator("scopes")
    @classmethod
    def _opens_something(cls, scopes: tuple[Scope, ...]) -> tuple[Scope, ...]:
        if not scopes:
            raise ValueError("at least one scope")
        return scopes

    def record(self) -> ApiKey:
        limits = self.model_dump(exclude={"sha256", "scopes"})
        return ApiKey(scopes=frozenset(self.scopes), **limits)


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    keys: tuple[_Entry, ...]

    @field_validator("keys")
    @classmethod
    def _each_once(cls, keys: tuple[_Entry, ...]) -> tuple[_Entry, ...]:
        if not keys:
            raise ValueError("at least one key; make one with `splitserve keys new NAME`")
        for field in ("name", "sha256"):
            values = [getattr(entry, field) for entry in keys]
            if twice := next((value for value in values if values.count(value) > 1), None):
                raise ValueError(f"each {field} once; {twice} is there twice")
        return keys


def read_keys(path: Path) -> Mapping[bytes, ApiKey]:
    """Every key by the SHA-256 of its secret. Raises: ConfigError: it cannot be read, or says something wrong."""
    return {bytes.fromhex(entry.sha256): entry.record() for entry in _parse(path, _read(path)).keys}


def key_digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


def add_key(path: Path, key: ApiKey) -> str:
    """Write a new key's digest into the file, made if it is missing. Returns the secret, which is nowhere else.

    Raises: ConfigError: the file is wrong, or has a key of this name.
    """
    tree = _read(path) if path.exists() else {"keys": []}
    before = _parse(path, tree).keys if tree.get("keys") else ()
    if any(entry.name == key.name for entry in before):
        raise ConfigError(f"{path} has a key {key.name!r} already; choose another name, or remove that entry first")
    secret = "ss-" + secrets.token_urlsafe(_KEY_BYTES)
    row: dict[str, Any] = {
        "name": key.name,
        "sha256": key_digest(secret).hex(),
        "scopes": sorted(scope.value for scope in key.scopes),
    }
    for field in ("weight", "max_requests_per_min", "max_tokens_per_min", "max_concurrent"):
        value = getattr(key, field)
        if value is not None and value != ApiKey.__dataclass_fields__[field].default:
            row[field] = value
    rows = [*tree.get("keys", []), row]
    _parse(path, {"keys": rows})
    _replace(path, yaml.safe_dump({"keys": rows}, sort_keys=False))
    return secret


class KeyFile:
    """The keys of a file as it is now; one that became wrong leaves those that were read before in force."""

    def __init__(self, path: Path) -> None:
        """Raises: ConfigError."""
        self._path = path
        self._seen = _stamp(path)
        self._keys = read_keys(path)

    def keys(self) -> Mapping[bytes, ApiKey]:
        """One stat() a call, which costs two microseconds: a key that was taken out is refused from then on."""
        stamp = _stamp(self._path)
        if stamp != self._seen:
            self._seen = stamp
            try:
                self._keys = read_keys(self._path)
                logger.info("read %d API keys of %s again", len(self._keys), self._path)
            except ConfigError as error:
                logger.error("%s; the keys read before stay in force", error.message)
        return self._keys


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        tree = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the API keys of {path}: {error}") from error
    except yaml.YAMLError:  # its message would quote the line, which may hold a secret
        tree = None
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path} holds no API keys in YAML; make the file with `splitserve keys new NAME --file {path}`"
        )
    return tree


def _parse(path: Path, tree: object) -> _File:
    try:
        return _File.model_validate(tree)
    except ValidationError as error:
        row = error.errors(include_input=False)[0]
        where = re.sub(r"\.(\d+)", r"[\1]", ".".join(str(part) for part in row["loc"]))
        raise ConfigError(
            f"{path}: {where}: {row['msg'].removeprefix('Value error, ')}; see docs/security.md"
        ) from None


def _replace(path: Path, text: str) -> None:
    """A router that reads the file meanwhile sees the old or the new one. Raises: ConfigError."""
    try:
        descriptor, part = tempfile.mkstemp(dir=path.parent, prefix=path.name)  # mode 0600
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(part, path)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
