"""What `splitserve doctor` finds wrong, and that it finds nothing wrong with a sound worker."""

from __future__ import annotations

import pytest
from splitserve.cli.diagnosis import OLD_S, Examination, diagnose
from splitserve.proto import worker_pb2


def holding(**changes: object) -> worker_pb2.Holding:
    fields = {"sequence_id": "r#1", "request_id": "r", "attempt": 1, "router_id": "a", "num_blocks": 3}
    return worker_pb2.Holding(**{"state": "running", "age_s": 1.0, **fields, **changes})


def examined(**changes: object) -> Examination:
    fields = {"name": "decode-0", "address": "127.0.0.1:1", "status": worker_pb2.WorkerStatus(num_blocks=8)}
    return Examination(**{**fields, "info": worker_pb2.WorkerInfo(), "holdings": (holding(),), **changes})


def test_a_sound_worker_has_no_findings() -> None:
    old = holding(age_s=10 * OLD_S)  # a long answer
    assert list(diagnose(examined(holdings=(holding(), old), num_cached_blocks=5))) == []


@pytest.mark.parametrize(
    ("changes", "what", "do"),
    [
        ({"status": None, "failure": "connection refused"}, "does not answer: connection refused", "127.0.0.1:1"),
        ({"status": worker_pb2.WorkerStatus(fault="2 memory errors")}, "2 memory errors", "restart"),
        ({"status": worker_pb2.WorkerStatus(stalled=True)}, "no step ends", "log"),
        ({"num_orphaned_blocks": 2}, "2 KV blocks belong to nobody", "splitserve drain decode-0"),
        ({"holdings": (holding(request_id="", router_id=""),)}, "of no request: r#1", "splitserve drain decode-0"),
        ({"holdings": (holding(state="held", age_s=OLD_S + 1),)}, "waits to be fetched", "lease"),
        ({"holdings": (holding(state="reserved", age_s=OLD_S + 1),)}, "wait for KV", "prefill workers"),
        ({"holdings": (holding(state="waiting", age_s=OLD_S + 1),)}, "wait for KV blocks", "kv_memory"),
    ],
)
def test_what_is_wrong_is_said_with_what_to_do(changes: dict[str, object], what: str, do: str) -> None:
    (finding,) = diagnose(examined(**changes))
    assert finding.worker == "decode-0"
    assert what in finding.what
    assert do in finding.do
