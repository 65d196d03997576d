"""C of this package, compiled once for the CPU that runs it, into the user's cache.

At first use and not when the package is installed: so one wheel serves every machine and carries no binary, a client
needs no compiler, and the code may use whatever instructions this CPU has. Triton's kernels come about the same way.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

import xxhash

from .user_cache import cache_directory

logger = logging.getLogger(__name__)

FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fPIC", "-shared")
TIMEOUT_S = 60.0
SWITCH = "SPLITSERVE_CPU_KERNEL"  # "off": as if there were no compiler


def compiled(source: Path) -> ctypes.CDLL | None:
    """The shared library made from a C file, or None: it is switched off, or a line in the log says why."""
    if os.environ.get(SWITCH) == "off":
        return None
    target = cache_directory("compiled") / f"{source.stem}-{_digest(source)}.so"
    try:
        with suppress(OSError):  # not there yet, or damaged
            return ctypes.CDLL(str(target))
        _compile(source, target)
        return ctypes.CDLL(str(target))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None)  # by the compiler
        logger.warning("%s is not compiled, slower code takes its place: %s", source.name, said or error)
        return None


def _compile(source: Path, target: Path) -> None:
    """Raises: OSError, SubprocessError: it did not work; nothing is left behind."""
    compiler = shlex.split(os.environ.get("CC", "")) or ["cc"]
    if shutil.which(compiler[0]) is None:
        raise FileNotFoundError(f"there is no C compiler {compiler[0]!r}; install gcc or clang, or set CC")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".compiling-") as scratch:
        made = Path(scratch) / target.name
        subprocess.run(
            [*compiler, *FLAGS, str(source), "-o", str(made)],
            check=True,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=TIMEOUT_S,
        )
        made.rename(target)  # all or nothing, whoever else compiles it at the same time
    logger.info("compiled %s into %s", source.name, target)


def _digest(source: Path) -> str:
    """16 hex digits over all that decides about the result: hosts of different kinds may share a home directory."""
    digest = xxhash.xxh3_64(source.read_bytes())
    digest.update(repr((FLAGS, os.environ.get("CC"), platform.machine(), _instruction_set())).encode())
    return digest.hexdigest()


def _instruction_set() -> dict[str, str]:
    """The CPU's model and features as Linux names them."""
    wanted = ("model name", "flags", "Features", "CPU part")
    lines: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in wanted:
            lines.setdefault(name.strip(), value.strip())
    return lines
