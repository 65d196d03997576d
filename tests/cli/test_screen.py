"""What people are shown of a cluster: a column for what is known, and no silence about what stays down."""

from __future__ import annotations

import pytest
from rich.console import Console
from splitserve.cli.screen import check_none_is_stuck
from splitserve.cli.status import Row, cluster_table
from splitserve.core.errors import Unavailable
from splitserve.deploy.members import ClusterView, Member, Phase


def view(**phases: Phase) -> ClusterView:
    members = [
        Member(name=name.replace("_", "-"), role="prefill", phase=phase, reason=f"because of {name}")
        for name, phase in phases.items()
    ]
    return ClusterView(members=tuple(members), routers=(), ready=True, settled=True)


def test_a_process_that_stays_down_is_named_with_what_to_do() -> None:
    check_none_is_stuck(view(prefill_0=Phase.READY, prefill_1=Phase.STARTING))
    with pytest.raises(Unavailable) as told:
        check_none_is_stuck(view(prefill_0=Phase.READY, prefill_1=Phase.FAILED, prefill_2=Phase.UNPLACED))
    assert told.value.message == (
        "prefill-1: failed, because of prefill_1; prefill-2: no room, because of prefill_2; "
        "`splitserve restart prefill-1` tries again"
    )


@pytest.mark.parametrize("rate", [None, 1234.0])
def test_rates_have_a_column_where_they_are_known(rate: float | None) -> None:
    console = Console(width=120)
    rows = [
        Row(name="router-0", role="router", state="ready", address="127.0.0.1:1"),
        Row(name="prefill-0", role="prefill", state="ready", address="127.0.0.1:2", tokens_per_s=rate, note="a note"),
    ]
    with console.capture() as capture:
        console.print(cluster_table(rows, []))
    text = capture.get()
    assert ("tokens/s" in text) == ("1,234" in text) == (rate is not None)
    assert "127.0.0.1:2  a note" in text
