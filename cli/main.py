"""The `splitserve` command: finds the subcommand, imports only that one, and turns typed errors into exit codes."""

from __future__ import annotations

import importlib
import json
import logging
import os
import time
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from .. import __version__
from ..core.errors import (
    ConfigError,
    InvalidRequest,
    ModelLoadFailed,
    ModelNotFound,
    ModelUnsupported,
    SplitserveError,
)
from .tls_flags import with_tls_flags

# Subcommand -> what it does. Each is `command` in the file of its name (with _ for -), imported when it is called.
SUBCOMMANDS = {
    "up": "Start a cluster on Ray and watch it.",
    "status": "Show the workers and requests of a running cluster.",
    "scale": "Change how many workers the pools of a running cluster have.",
    "restart": "Drain processes of a running cluster and start them again.",
    "remove": "Drain workers of a running cluster and take them out.",
    "scaling": "Show the decisions of a controller that scales, or replay them.",
    "logs": "Show what the processes of a running cluster wrote.",
    "drain": "Take a worker out of service without losing a request.",
    "switch": "Make a prefill worker a decode worker, or back.",
    "doctor": "Show what workers hold, for whom, and what is wrong.",
    "down": "Stop the cluster that `up` started.",
    "config": "Check a cluster's YAML file, or show it with its defaults.",
    "generate": "Send one prompt and print the answer.",
    "chat": "Talk with the model, turn by turn.",
    "bench": "Load a router and report latencies, throughput and goodput.",
    "plan": "Find how many prefill and decode workers a traffic needs.",
    "simulate": "Replay traffic on a cluster that need not exist.",
    "calibrate": "Measure a worker, for plans that fit it.",
    "keys": "List API keys; `keys new NAME` makes one.",
    "certs": "Show certificates; `certs init` makes some for development.",
    "demo": "Start a small cluster, answer eight prompts, stop it.",
    "router": "Run a router process.",
    "prefill-worker": "Run a prefill worker process.",
    "decode-worker": "Run a decode (or colocated) worker process.",
}

# Subcommands of a subcommand that is also a command itself; in the file of its name (with _ for the space).
_NESTED = {"plan verify", "keys new", "certs init"}

# Subcommands that call a router or a worker, and so take the flags for TLS.
_CALLERS = {"status", "doctor", "drain", "switch", "generate", "chat", "bench", "calibrate"}

# What the default install leaves out, by the extra that brings it.
_EXTRAS = {
    "certs": {"cryptography"},
    "plot": {"matplotlib"},
    "serve": {"gguf", "grpc_health", "grpc_reflection", "jinja2", "ray", "safetensors", "torch", "transformers"},
}

_BAD_INPUT = (InvalidRequest, ConfigError, ModelNotFound, ModelUnsupported, ModelLoadFailed)


class LazyGroup(TyperGroup):
    """Lists every subcommand from the table; imports one only in order to run it or to show its own help."""

    def __init__(self, **attrs: Any) -> None:
        super().__init__(**attrs)
        self.commands.update({name: TyperCommand(name, help=text) for name, text in SUBCOMMANDS.items()})

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        if name and rest and f"{name} {rest[0]}" in _NESTED:
            name, rest = f"{name} {rest[0]}", rest[1:]
        return name, _load(name) if name else command, rest

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            extra = next((extra for extra, names in _EXTRAS.items() if (error.name or "").split(".")[0] in names), None)
            if extra is None:
                raise
            needed = f"this needs {error.name}, which is not installed; run: pip install 'splitserve[{extra}]'"
            typer.secho(f"error: {needed}", fg="red", err=True)
            raise typer.Exit(2) from error
        except SplitserveError as error:
            typer.secho(f"error: {error.message}", fg="red", err=True)
            raise typer.Exit(2 if isinstance(error, _BAD_INPUT) else 1) from error


def _load(name: str) -> Any:
    module = importlib.import_module(f".{name.replace('-', '_').replace(' ', '_')}", __package__)
    single = typer.Typer(rich_markup_mode="rich", add_completion=False)
    single.command(name)(with_tls_flags(module.command) if name in _CALLERS else module.command)
    return typer.main.get_command(single)


app = typer.Typer(cls=LazyGroup, rich_markup_mode="rich", no_args_is_help=True, pretty_exceptions_enable=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"splitserve {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    verbose: Annotated[
        int, typer.Option("--verbose", "-v", count=True, help="Log more: -v information, -vv details.")
    ] = 0,
    log_json: Annotated[bool, typer.Option(help="Log one JSON object a line.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Serve large language models with prefill and decode split over two pools of workers.

    $ splitserve up
    $ splitserve generate "The capital of France is"
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if log_json else logging.Formatter(_LOG_FORMAT))
    logger = logging.getLogger("splitserve")
    logger.handlers = [handler]
    logger.setLevel((logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)])


_LOG_FORMAT = "%(asctime)s %(levelname).1s %(name)s: %(message)s"


class JsonFormatter(logging.Formatter):
    """One JSON object a record: time (UTC), level, logger, message and, for failures, the traceback."""

    def format(self, record: logging.LogRecord) -> str:
        row = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            row["traceback"] = self.formatException(record.exc_info)
        return json.dumps(row)


def main() -> None:
    """Entry point of the console script."""
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # or its C core logs lost connections beside our one line
    app()
