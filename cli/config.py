"""`splitserve config`: checks a cluster's YAML file, or shows all of it with the defaults filled in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
import yaml

from ..core.config import WORKER_ROLES, load_config
from ..deploy.roles import role_needs, with_threads
from ..deploy.scaler import check_scaling


def command(
    action: Annotated[Literal["check", "show"], typer.Argument(help="check: is the file right? show: every key.")],
    file: Annotated[Path | None, typer.Argument(help="YAML file.", show_default="the defaults")] = None,
) -> None:
    """Check a cluster's YAML file without starting anything, or show every key with the value it will have.

    Exit code 2: a key or value is wrong; the message names the key, what was got and what is wanted.

    $ splitserve config check cluster.yaml

    $ splitserve config show cluster.yaml
    """
    config = load_config(file, {})
    if action == "show":
        print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), end="")
        return
    check_scaling(config)
    print(f"{file or 'the defaults'}: right. {config.model} on")
    print(
        f"  {config.router.replicas} router{'s' if config.router.replicas > 1 else ''} from port {config.router.port}"
    )
    for role in WORKER_ROLES:
        if replicas := config.replicas(role):
            fewest, most = config.bounds(role)
            needs = role_needs(with_threads(config), role)
            print(f"  {replicas} {role} worker{'s' if replicas > 1 else ''} ({fewest} to {most}), each with {needs}")
