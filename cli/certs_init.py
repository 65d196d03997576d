"""`splitserve certs init`: a development authority and a certificate for each role."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..proto.tls import PeerRole
from .certs import Directory


def command(
    directory: Directory = Path("certs"),
    host: Annotated[
        list[str] | None,
        typer.Option(help="Name or IP address that clients reach routers by; repeatable, localhost is always in it."),
    ] = None,
    days: Annotated[int, typer.Option(min=1, max=825, help="Days that the certificates are good for.")] = 90,
    switch_roles: Annotated[
        bool, typer.Option("--switch-roles", help="Let prefill and decode workers prove both roles, for `switch`.")
    ] = False,
    renew: Annotated[
        bool, typer.Option("--renew", help="Make new certificates with the authority that is there.")
    ] = False,
) -> None:
    """Make a development authority and certificates for client, operator, router, prefill and decode.

    Keys get mode 0600. A process needs ca.pem and the two files of its role; ca.key signs, and stays where it is.
    Running processes take renewed files at the next connection.

    $ splitserve certs init certs --host 10.0.0.5

    $ splitserve certs init certs --host 10.0.0.5 --renew
    """
    from ..deploy.certificates import ROLES, make_authority, make_certificate

    if not renew:
        make_authority(directory, days=10 * days)
    hosts = list(dict.fromkeys(["localhost", "127.0.0.1", "::1", *(host or ())]))
    both = (PeerRole.PREFILL, PeerRole.DECODE)
    for role in ROLES:
        also = [each for each in both if each is not role] if switch_roles and role in both else []
        make_certificate(directory, role, hosts=hosts, days=days, also=also, replace=renew)
    print(f"{directory} holds ca.pem and a certificate for {', '.join(role.value for role in ROLES)}. For a shell:\n")
    print(f"export SPLITSERVE_TLS_CA={directory.absolute()}/ca.pem")
    for name, ending in (("CERT", "pem"), ("KEY", "key")):
        print(f"export SPLITSERVE_TLS_{name}='{directory.absolute()}/{{role}}.{ending}'")
    print("\nand for a configuration file:\n\nsecurity:\n  ca: " + f"{directory.absolute()}/ca.pem")
    print(f"  cert: {directory.absolute()}/{{role}}.pem\n  key: {directory.absolute()}/{{role}}.key")
