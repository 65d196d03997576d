"""Dashboards and alerts ask for metrics and labels that exist."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest
from splitserve.core.errors import BY_CODE
from splitserve.core.metrics import RouterMetrics, WorkerMetrics
from splitserve.worker.device import THROTTLE_REASONS

MONITORING = Path(__file__).resolve().parents[2] / "deploy" / "monitoring"


def exported() -> set[str]:
    """Names of every time series that a process can export."""
    names: set[str] = set()
    for role in ("prefill", "decode", "colocated"):
        registry = CollectorRegistry()
        WorkerMetrics(registry, role)
        names |= _series(registry)
    registry = CollectorRegistry()
    RouterMetrics(registry)
    return names | _series(registry)


def _series(registry: CollectorRegistry) -> set[str]:
    kinds = re.findall(r"^# TYPE (splitserve_\w+) (\w+)$", generate_latest(registry).decode(), re.M)
    ends = {"histogram": ("_bucket", "_sum", "_count")}
    return {name + end for name, kind in kinds for end in ends.get(kind, ("",))}


def alert_rules() -> list[dict[str, Any]]:
    return [
        rule for group in yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"] for rule in group["rules"]
    ]


def dashboard_expressions() -> list[str]:
    (path,) = (MONITORING / "grafana" / "dashboards").glob("*.json")
    return [target["expr"] for panel in json.loads(path.read_text())["panels"] for target in panel.get("targets", ())]


EXPRESSIONS = [*dashboard_expressions(), *(rule["expr"] for rule in alert_rules())]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_metrics_exist(expression: str) -> None:
    named = set(re.findall(r"\bsplitserve_\w+", expression))
    assert named or expression.startswith("up{")
    assert named <= exported()
    assert expression.count("(") == expression.count(")")


def test_every_metric_of_the_data_path_is_on_the_dashboard() -> None:
    shown = set(re.findall(r"\bsplitserve_\w+", " ".join(dashboard_expressions())))
    assert {"splitserve_ttft_seconds_bucket", "splitserve_kv_blocks_live", "splitserve_transfer_bytes_total"} <= shown
    assert len(shown) > 25


def test_label_values_in_alerts_exist() -> None:
    values = {
        "outcome": {*BY_CODE, "stop", "length"},
        "reason": set(THROTTLE_REASONS.values()),
        "role": {"prefill", "decode", "colocated"},
        "kind": {"corrected", "uncorrected"},
    }
    for rule in alert_rules():
        for label, wanted in re.findall(r'\b(\w+)=~?"([^"]+)"', rule["expr"]):
            if label in values:
                assert set(wanted.split("|")) <= values[label], rule["alert"]


def test_alerts_say_what_and_what_to_do() -> None:
    rules = alert_rules()
    assert len({rule["alert"] for rule in rules}) == len(rules)
    for rule in rules:
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in ("page", "warn")
        assert set(rule["annotations"]) == {"summary", "description"}


def test_provisioning_points_at_the_dashboard_and_the_data_source() -> None:
    folder = MONITORING / "grafana" / "provisioning"
    (source,) = yaml.safe_load((folder / "datasources" / "prometheus.yml").read_text())["datasources"]
    (path,) = (MONITORING / "grafana" / "dashboards").glob("*.json")
    panels = [panel for panel in json.loads(path.read_text())["panels"] if panel["type"] != "row"]
    assert {panel["datasource"]["uid"] for panel in panels} == {source["uid"]}
    assert len({panel["id"] for panel in json.loads(path.read_text())["panels"]}) == len(panels) + 5
    (provider,) = yaml.safe_load((folder / "dashboards" / "splitserve.yml").read_text())["providers"]
    (compose,) = yaml.safe_load_all((MONITORING.parent / "docker" / "compose.yaml").read_text())
    mounts = compose["services"]["grafana"]["volumes"]
    assert f"../monitoring/grafana/dashboards:{provider['options']['path']}:ro" in mounts
