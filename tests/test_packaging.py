"""What is installed is what is in the repository, under one name, with one version; the default install stays light."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import splitserve
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
NOT_PACKAGED = {"tests", "examples", "docs", "scripts", "typings", "build", "dist"}
HEAVY = ("torch", "ray", "transformers")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def package_folders(root: Path) -> Iterator[Path]:
    """Every folder below `root`, relative to it, that holds Python files and is part of the package."""
    for top in root.iterdir():
        if top.is_dir() and not top.name.startswith(".") and top.name not in NOT_PACKAGED:
            yield from {path.parent.relative_to(root) for path in top.rglob("*.py")}


def test_every_folder_with_python_files_is_listed_as_a_package() -> None:
    found = {".".join(("splitserve", *folder.parts)) for folder in package_folders(ROOT)}
    assert {"splitserve", *found} == set(PYPROJECT["tool"]["setuptools"]["packages"])


def test_every_top_level_folder_has_its_link_for_mypy() -> None:
    folders = {folder.parts[0] for folder in package_folders(ROOT)}
    links = {path.name: path for path in (ROOT / "typings" / "splitserve").iterdir() if path.is_symlink()}
    assert links.keys() == folders | {"__init__.py"} & links.keys()
    assert all(link.resolve() == ROOT / name for name, link in links.items())


def test_the_root_holds_no_module_but_init() -> None:
    assert [path.name for path in ROOT.glob("*.py")] == ["__init__.py"]


def test_wheel_holds_every_module_and_stub_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "source"  # a copy: a build in place would leave build/ behind and pick up its leftovers
    shutil.copytree(
        ROOT, source, symlinks=True, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__")
    )
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(tmp_path), str(source)], check=True, timeout=100)
    (wheel,) = tmp_path.glob("splitserve-*.whl")
    assert wheel.name.split("-")[1] == splitserve.__version__

    wanted = {"splitserve/__init__.py", "splitserve/py.typed"}
    for folder in package_folders(source):
        files = [path for path in (source / folder).iterdir() if path.suffix in {".py", ".pyi", ".proto", ".c"}]
        wanted |= {f"splitserve/{path.relative_to(source)}" for path in files}
    for folder in ("planner", "benchmarks"):
        wanted |= {f"splitserve/{folder}/data/{path.name}" for path in (source / folder / "data").iterdir()}
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if ".dist-info/" not in name} == wanted
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_version_is_written_once() -> None:
    assert PYPROJECT["project"]["dynamic"] == ["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", splitserve.__version__)


def test_every_requirement_is_pinned_inside_its_range() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {canonicalize_name(name): pin for name, pin in (line.split("==") for line in lines if line[0] != "#")}
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *extras["serve"], *extras["http"], *extras["plot"], *extras["dev"]]
    for requirement in map(Requirement, lines):
        if requirement.name != "splitserve":
            assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


@pytest.mark.parametrize(
    ("package", "pattern"), [("protobuf", r"Protobuf Python Version: (.+)"), ("grpcio", r"VERSION = '(.+)'")]
)
def test_lowest_allowed_runtime_loads_the_stubs(package: str, pattern: str) -> None:
    made_by = {
        version for path in (ROOT / "proto").glob("*_pb2*.py") for version in re.findall(pattern, path.read_text())
    }
    (version,) = made_by
    ranges = {Requirement(line).name: Requirement(line).specifier for line in PYPROJECT["project"]["dependencies"]}
    lowest = next(bound.version for bound in ranges[package] if bound.operator == ">=")
    assert Version(lowest) >= Version(version)


def test_default_install_brings_no_torch_and_serve_does() -> None:
    def names(lines: list[str]) -> set[str]:
        return {Requirement(line).name for line in lines}

    assert not names(PYPROJECT["project"]["dependencies"]) & set(HEAVY)
    assert names(PYPROJECT["project"]["optional-dependencies"]["serve"]) >= set(HEAVY)


@pytest.mark.parametrize("package", ["core", "scheduling", "client", "planner", "router"])
def test_light_packages_import_nothing_heavy(package: str) -> None:
    modules = [f"splitserve.{package}.{path.stem}" for path in (ROOT / package).glob("*.py")]
    code = (
        f"import importlib, sys; [importlib.import_module(name.removesuffix('.__init__')) for name in {modules}];"
        f"print(*sorted(set({HEAVY}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == []


def test_committed_stubs_are_what_the_protos_generate() -> None:
    check = [sys.executable, str(ROOT / "scripts" / "generate_protos.py"), "--check"]
    done = subprocess.run(check, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
