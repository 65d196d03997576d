"""Generate the stubs in proto/ from its .proto files, or check that the committed ones are up to date."""

from __future__ import annotations

import argparse
import sys
import sysconfig
import tempfile
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
IMPORT_ROOT = ROOT / "typings"  # shows proto/ as splitserve/proto, so that the stubs import as splitserve.proto


def generate(out: Path) -> None:
    """Write the stubs of every .proto file to `out`/splitserve/proto."""
    (out / "splitserve" / "proto").mkdir(parents=True, exist_ok=True)
    plugins = Path(sysconfig.get_path("scripts"))  # of this interpreter, active environment or not
    arguments = [
        "protoc",
        f"--plugin={plugins / 'protoc-gen-mypy'}",
        f"--plugin={plugins / 'protoc-gen-mypy_grpc'}",
        f"-I{IMPORT_ROOT}",
        f"-I{Path(grpc_tools.__file__).parent / '_proto'}",
        f"--python_out={out}",
        f"--grpc_python_out={out}",
        f"--mypy_out=quiet:{out}",
        f"--mypy_grpc_out=quiet:{out}",
        *(str(path) for path in sorted((IMPORT_ROOT / "splitserve" / "proto").glob("*.proto"))),
    ]
    if protoc.main(arguments) != 0:
        sys.exit("protoc failed; its message is above")


def stale() -> list[str]:
    """Names of stubs in proto/ that are missing, differ from what would be generated, or have no .proto any more."""
    with tempfile.TemporaryDirectory() as out:
        generate(Path(out))
        wanted = {path.name: path.read_bytes() for path in (Path(out) / "splitserve" / "proto").iterdir()}
    found = {path.name: path.read_bytes() for path in (ROOT / "proto").glob("*_pb2*.py*")}
    return sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a committed stub is stale")
    if not parser.parse_args().check:
        generate(IMPORT_ROOT)
    elif names := stale():
        sys.exit(f"stale stubs in proto/: {', '.join(names)}; run `make proto` and commit the result")


if __name__ == "__main__":
    main()
