"""Dashboards ask for metrics and labels that gateways export, and nothing else."""

import json
import re
from typing import Any

import pytest
from prometheus_client.core import Metric

from services.gateway.counters import RequestCounters
from services.gateway.metrics import Report
from tests.helm.chart import CHART, find_all, render
from tests.helm.options import OPTIONS

FILES = sorted((CHART / "dashboards").glob("*.json"))
# What Prometheus adds to each series.
TARGET_LABELS = {"namespace", "pod"}
SUFFIXES = {
    "counter": ("_total",),
    "gauge": ("",),
    "histogram": ("_bucket", "_sum", "_count"),
    "info": ("_info",),
}


def _exported() -> dict[str, set[str]]:
    """Labels by the name of a series: families are told also while they have no samples."""
    report = Report(
        version="0",
        is_draining=False,
        num_active=0,
        max_active=0,
        counters=RequestCounters(),
        topology=None,
        workers=(),
        stores=(),
    )
    return {
        f"{metric.name}{suffix}": _labels(metric)
        for metric in report.collect()
        for suffix in SUFFIXES[metric.type]
    }


def _labels(metric: Metric) -> set[str]:
    own = set(metric._labelnames) if hasattr(metric, "_labelnames") else set()
    more = {
        "histogram": {"le"},
        # What an information says is labels too.
        "info": {"version"} if metric.name == "model1_build" else {"reason"},
    }
    return own | more.get(metric.type, set())


def _expressions(dashboard: dict[str, Any]) -> list[str]:
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    variables = dashboard["templating"]["list"]
    return asked + [each["query"] for each in variables if each["type"] == "query"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_metric_is_exported(file: Any) -> None:
    exported = _exported()
    for expression in _expressions(json.loads(file.read_text())):
        names = re.findall(r"\bmodel1_\w+", expression)
        assert names
        assert [name for name in names if name not in exported] == [], expression


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_label_is_one_of_the_metric(file: Any) -> None:
    exported = _exported()
    for panel in json.loads(file.read_text())["panels"]:
        for target in panel["targets"]:
            labels = TARGET_LABELS.union(
                *(exported[name] for name in re.findall(r"\bmodel1_\w+", target["expr"]))
            )
            used = {
                label.strip()
                for group in re.findall(r"by \(([^)]*)\)", target["expr"])
                for label in group.split(",")
            }
            used |= set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            assert used <= labels, target["expr"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_what_every_gateway_reports_is_not_added_up_over_gateways(file: Any) -> None:
    of_one_gateway = re.compile(
        r"model1_(requests|prompt|generated|first_token|gateway|routing)_\w+"
    )
    for expression in _expressions(json.loads(file.read_text())):
        if of_one_gateway.search(expression) or expression.startswith("label_values"):
            continue
        assert re.search(r"max by \([^)]+\) \((rate\(|increase\(|model1_)", expression), expression


def test_there_is_a_config_map_for_each_that_grafana_finds() -> None:
    manifests = render(*OPTIONS["monitoring"])
    found = find_all(manifests, "ConfigMap")
    dashboards = {
        name: json.loads(text)
        for each in found
        if each["metadata"]["labels"].get("grafana_dashboard") == "1"
        for name, text in each["data"].items()
    }
    assert dashboards == {f"model1-{f.stem}.json": json.loads(f.read_text()) for f in FILES}
    assert {file.stem for file in FILES} == {"gateway", "attention", "experts", "kv"}
    assert len({each["uid"] for each in dashboards.values()}) == len(FILES)
