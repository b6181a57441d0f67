"""The shipped dashboard asks for metrics that there are, by labels that they have."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser as promql
import pytest
import yaml

from gateway.telemetry.instruments import INSTRUMENTS, Instrument
from tests.support.prometheus import exported_names

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana/sessile.json").read_text())

EXPORTED: dict[str, Instrument] = {
    name: one for one in INSTRUMENTS.values() for name in exported_names(one)
}
BY_PROMETHEUS = {"instance", "job"}
VARIABLES = {"$__rate_interval": "1m", "$instance": ".*", "${datasource}": "prometheus"}


def expressions() -> Iterator[tuple[str, str]]:
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]


def parsed(expression: str) -> Any:
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    assert "$" not in expression
    return promql.parse(expression)


def nodes(expression: Any) -> list[Any]:
    found: list[Any] = []

    def visit(node: Any) -> bool:
        found.append(node)
        return True

    promql.walk(expression, visit)
    return found


def selectors(expression: Any) -> list[Any]:
    return [node for node in nodes(expression) if isinstance(node, promql.VectorSelector)]


def labels_of(name: str) -> set[str]:
    one = EXPORTED[name]
    bucket = {"le"} if name.endswith("_bucket") else set()
    return {label.replace(".", "_") for label in one.attributes} | BY_PROMETHEUS | bucket


@pytest.mark.parametrize(("panel", "expression"), list(expressions()))
def test_an_expression_asks_for_what_is_exported(panel: str, expression: str) -> None:
    tree = parsed(expression)
    used = selectors(tree)
    assert used, panel
    for selector in used:
        assert selector.name in EXPORTED, f"{panel}: {selector.name} is not exported"
        asked = {matcher.name for matcher in selector.matchers.matchers}
        assert asked <= labels_of(selector.name), panel
    known = set.union(*(labels_of(selector.name) for selector in used))
    for node in nodes(tree):
        if isinstance(node, promql.AggregateExpr) and node.modifier is not None:
            assert set(node.modifier.labels) <= known, panel
        if isinstance(node, promql.Call) and node.func.name == "rate":
            name = node.args[0].vector_selector.name
            assert EXPORTED[name].kind != "gauge", f"{panel}: the rate of a gauge"
        if isinstance(node, promql.Call) and node.func.name == "histogram_quantile":
            assert all(selector.name.endswith("_bucket") for selector in selectors(node))


def test_every_metric_has_a_place_on_the_dashboard() -> None:
    shown = {s.name for _, expression in expressions() for s in selectors(parsed(expression))}
    missing = [one.name for one in INSTRUMENTS.values() if not exported_names(one) & shown]
    assert not missing


def test_an_unknown_metric_would_be_found() -> None:
    assert [s.name for s in selectors(parsed("rate(no_such_total[$__rate_interval]) + x"))] == [
        "no_such_total",
        "x",
    ]
    assert "no_such_total" not in EXPORTED


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(at["x"] + dx, at["y"] + dy) for dx in range(at["w"]) for dy in range(at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells


def test_a_metric_s_attributes_are_few_and_buckets_only_a_histogram_s() -> None:
    for one in INSTRUMENTS.values():
        assert bool(one.buckets) == (one.kind == "histogram"), one.name
        assert list(one.buckets) == sorted(set(one.buckets))
        assert not {"sessile.session_id", "sessile.turn_id", "sessile.replica"} & {*one.attributes}


def test_prometheus_and_grafana_are_told_where_things_are() -> None:
    scraped = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
    targets = [t for job in scraped for group in job["static_configs"] for t in group["targets"]]
    assert targets
    assert all(target.endswith(":9464") for target in targets)
    sources = yaml.safe_load(
        (DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text()
    )
    assert [one["type"] for one in sources["datasources"]] == ["prometheus", "jaeger"]
    boards = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/sessile.yml").read_text())
    assert boards["providers"][0]["options"]["path"] == "/var/lib/grafana/dashboards"
