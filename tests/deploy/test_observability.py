"""Dashboard, alerts and their configuration ask for what there is."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from titans_server.api.operations import METRICS
from titans_server.telemetry.metrics import Metrics, Residents

Compose = dict[str, Any]

FUNCTIONS = {"histogram_quantile", "sum", "rate", "increase", "by", "label_values"}
OF_PROMETHEUS = {"up"}


class Busy:
    """A server with something in every place."""

    num_running = num_waiting = num_ingesting = 1

    def residents(self) -> list[Residents]:
        return [Residents("memory", 1, 1)]


@pytest.fixture(scope="module")
def samples() -> dict[str, set[str]]:
    """Every sample that a server may send, and its labels."""
    metrics = Metrics()
    metrics.serve(Busy(), model_name="", fingerprint="", device="")
    found: dict[str, set[str]] = {}
    for family in metrics.registry.collect():
        ends = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(family.type, [""])
        labels = {label for sample in family.samples for label in sample.labels}
        found |= {family.name + end: labels for end in ends}
    for name, collector in vars(metrics).items():  # those with labels have no samples yet
        for each in collector.values() if isinstance(collector, dict) else [collector]:
            if names := getattr(each, "_labelnames", ()):
                for sample in found:
                    if sample.startswith(each._name):
                        found[sample] |= set(names)
        assert name
    return found


@pytest.fixture(scope="module")
def dashboard(root: Path) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads((root / "deploy/grafana/dashboards/titans.json").read_text())
    return parsed


@pytest.fixture(scope="module")
def alerts(root: Path) -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((root / "deploy/prometheus/alerts.yml").read_text())["groups"]
    rules: list[dict[str, Any]] = group["rules"]
    return rules


def expressions(dashboard: dict[str, Any]) -> Iterator[str]:
    for panel in dashboard["panels"]:
        yield from (target["expr"] for target in panel.get("targets", []))
    yield from (variable["query"]["query"] for variable in dashboard["templating"]["list"])


def asked(expression: str) -> set[str]:
    """The metrics that an expression is made of."""
    bare = re.sub(r'"[^"]*"|\{[^}]*\}|\[[^]]*\]|by \([^)]*\)', " ", expression)
    return set(re.findall(r"[a-z_:][a-z0-9_:]*", bare)) - FUNCTIONS - {"instance"}


def labels(expression: str) -> set[str]:
    grouped = ",".join(re.findall(r"by \(([^)]*)\)", expression))
    matched = re.findall(r"[{,](\w+)[=!]", expression)
    return ({label.strip() for label in grouped.split(",")} | set(matched)) - {""}


def check(expression: str, samples: dict[str, set[str]]) -> None:
    names = asked(expression)
    assert names and names <= samples.keys() | OF_PROMETHEUS, expression
    known = {"job", "instance"}.union(*({"le"} | samples.get(name, set()) for name in names))
    assert labels(expression) <= known, expression
    assert all(expression.count(a) == expression.count(b) for a, b in ("()", "{}", "[]"))


def test_the_dashboard_asks_for_metrics_and_labels_that_there_are(
    dashboard: dict[str, Any], samples: dict[str, set[str]]
) -> None:
    found = list(expressions(dashboard))
    assert len(found) > 30
    for expression in found:
        check(expression, samples)


def test_the_alerts_ask_for_metrics_and_labels_that_there_are(
    alerts: list[dict[str, Any]], samples: dict[str, set[str]]
) -> None:
    for rule in alerts:
        check(rule["expr"], samples)


def test_an_unknown_metric_or_label_would_be_found(samples: dict[str, set[str]]) -> None:
    for wrong in ("rate(titans_nothing_total[5m])", 'sum(titans_errors_total{session="x"})', "sum by (key) (up)"):
        with pytest.raises(AssertionError):
            check(wrong, samples)


def test_every_metric_of_ours_is_on_the_dashboard(dashboard: dict[str, Any], samples: dict[str, set[str]]) -> None:
    shown = set().union(*(asked(expression) for expression in expressions(dashboard)))
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in samples if name.startswith("titans_")}
    assert families == {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown if name.startswith("titans_")}


def test_alerts_look_for_error_codes_that_there_are(alerts: list[dict[str, Any]], root: Path) -> None:
    codes = set(re.findall(r"`(\w+)`", (root / "docs/api.md").read_text().partition("## Errors")[2]))
    for rule in alerts:
        for text in re.findall(r'code=~?"([^"]*)"', rule["expr"]):
            assert set(text.split("|")) <= codes


def test_a_first_error_is_an_increase(alerts: list[dict[str, Any]]) -> None:
    """Prometheus sees none where a sample begins at 1."""
    registry = Metrics().registry
    codes = {
        code for rule in alerts for text in re.findall(r'code=~?"([^"]*)"', rule["expr"]) for code in text.split("|")
    }
    assert {code: registry.get_sample_value("titans_errors_total", {"code": code}) for code in codes} == dict.fromkeys(
        codes, 0.0
    )
    for name, label, values in (
        ("titans_work_failures_total", "work", ("load", "ingest", "commit")),
        ("titans_request_success_total", "finished_reason", ("stop", "length", "abort")),
    ):
        assert [registry.get_sample_value(name, {label: value}) for value in values] == [0.0] * 3


def test_every_alert_is_explained_and_every_metric_named_in_the_guide_exists(
    alerts: list[dict[str, Any]], samples: dict[str, set[str]], root: Path
) -> None:
    guide = (root / "docs/operations.md").read_text()
    assert set(re.findall(r"`(Titans[A-Z]\w+)`", guide)) == {rule["alert"] for rule in alerts}
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in samples}
    named = set(re.findall(r"\b((?:titans|process)_[a-z_]+[a-z])\b", guide)) - {"titans_server"}
    assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in named} <= families


def test_panels_have_ids_of_their_own_and_the_datasource_that_is_provisioned(
    dashboard: dict[str, Any], root: Path
) -> None:
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    folder = root / "deploy/grafana/provisioning"
    (source,) = yaml.safe_load((folder / "datasources/prometheus.yml").read_text())["datasources"]
    used = {target["datasource"]["uid"] for panel in dashboard["panels"] for target in panel.get("targets", [])}
    assert used == {source["uid"]}


def test_the_profile_scrapes_the_server_and_shows_the_dashboard(compose: Compose, root: Path) -> None:
    services = compose["services"]
    watching = {name for name, service in services.items() if service.get("profiles") == ["observability"]}
    assert watching == {"prometheus", "grafana"}
    config = yaml.safe_load((root / "deploy/prometheus/prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    assert (job["metrics_path"], job["static_configs"]) == (METRICS, [{"targets": ["server:8000"]}])
    mounted = {name: dict(volume.split(":")[:2] for volume in services[name]["volumes"]) for name in watching}
    for volumes in mounted.values():
        for source in volumes:
            assert source in compose["volumes"] or (root / source).is_dir(), source
    assert [f"{mounted['prometheus']['./deploy/prometheus']}/alerts.yml"] == config["rule_files"]
    provider = yaml.safe_load((root / "deploy/grafana/provisioning/dashboards/titans.yml").read_text())["providers"][0]
    assert mounted["grafana"]["./deploy/grafana/dashboards"] == provider["options"]["path"]
    (source,) = yaml.safe_load((root / "deploy/grafana/provisioning/datasources/prometheus.yml").read_text())[
        "datasources"
    ]
    assert source["url"] == "http://prometheus:9090"


def test_only_this_machine_reaches_grafana_and_nobody_prometheus(compose: Compose) -> None:
    assert compose["services"]["grafana"]["ports"] == ["127.0.0.1:3000:3000"]
    assert "ports" not in compose["services"]["prometheus"]
