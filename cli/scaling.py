"""`splitserve scaling`: the decisions of a controller that scales, shown or made once more from what it saw."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import typer

from ..core.config import load_config
from ..core.errors import ConfigError, SplitserveError
from ..scheduling.scaling_log import read_records
from ..scheduling.scaling_signals import Pool


def command(
    action: Annotated[Literal["show", "replay"], typer.Argument(help="show the decisions, or make them again.")],
    log: Annotated[Path, typer.Argument(help="scaling-*.jsonl in the cluster's log_dir.")],
    file: Annotated[
        Path | None, typer.Argument(help="The cluster's YAML file, for replay.", show_default="none")
    ] = None,
    all_: Annotated[bool, typer.Option("--all", help="show: also decisions that changed nothing.")] = False,
) -> None:
    """Show why pools were scaled, or check that the same signals lead to the same decisions again.

    Replay with another file tells what other settings would have decided, as long as nothing was changed by it yet.
    Exit code 1: a decision differs.

    $ splitserve scaling show scaling-20260101-120000-1.jsonl

    $ splitserve scaling replay scaling-20260101-120000-1.jsonl cluster.yaml
    """
    if not log.is_file():
        raise ConfigError(f"there is no file {log}; the controller writes scaling-*.jsonl into the cluster's log_dir")
    if action == "show":
        _show(log, everything=all_)
        return
    from ..deploy.scaler import replay_log

    count, differing = replay_log(log, load_config(file, {}))
    for record, decision in differing:
        print(f"{record.signals.at_s:,.1f} s: {_targets(record.decision.targets)}, now {_targets(decision.targets)}")
        print("\n".join(f"  {reason}" for reason in decision.reasons))
    if differing:
        raise SplitserveError(f"{len(differing)} of {count} decisions differ")
    print(f"{count} decisions, all of them the same again")


def _show(log: Path, *, everything: bool) -> None:
    with log.open(encoding="utf-8") as lines:
        for record in read_records(lines):
            decision = record.decision
            if not decision.actions and not everything:
                continue
            actions = ", ".join(f"{a.kind} {a.worker or a.pool}" for a in decision.actions) or "nothing"
            print(f"{decision.at_s:,.1f} s: {actions}; {_targets(decision.targets)}")
            print("\n".join(f"  {reason}" for reason in decision.reasons))


def _targets(targets: Mapping[Pool, int]) -> str:
    return ", ".join(f"{pool} {count}" for pool, count in targets.items())
