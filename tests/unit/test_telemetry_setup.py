"""What a process sets up of OpenTelemetry from its settings and the standard environment."""

from __future__ import annotations

import subprocess
import sys
import threading
import urllib.request

import pytest

from gateway.telemetry import setup
from gateway.telemetry.config import TelemetryConfig
from gateway.telemetry.metrics import MAX_TENANTS, OTHER_TENANTS, GatewayMetrics, Tenants
from gateway.telemetry.setup import Telemetry, installed
from gateway.telemetry.tracing import session_context
from tests.support.otlp import receiver


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ENDPOINT", "PROTOCOL", "TRACES_ENDPOINT", "METRICS_ENDPOINT"):
        monkeypatch.delenv(f"OTEL_EXPORTER_OTLP_{name}", raising=False)


def entered(config: TelemetryConfig) -> Telemetry:
    with installed(config, "sessile-test", "one", {}, for_libraries=False) as telemetry:
        return telemetry


def test_spans_and_metrics_go_to_the_endpoint_and_are_flushed_at_the_end() -> None:
    with receiver() as received:
        config = TelemetryConfig(otlp_endpoint=received.endpoint, metrics_interval_s=600)
        says = {"sessile.site": "here"}
        made = installed(config, "sessile-test", "one", says, for_libraries=False)
        with made as telemetry:
            tracing = telemetry.tracing("test")
            tracing.opened("ses_a", "ses_parent", {"sessile.tenant": "t"})
            with tracing.session_span("turn", "ses_a"):
                pass
            GatewayMetrics(telemetry.meter("test")).epoch_taken("placement")
        assert {span.name for span in received.spans} == {"session", "turn"}
        assert "sessile.epochs.taken" in received.metrics
        root, turn = received.of("session")[0], received.of("turn")[0]
    own = session_context("ses_a")
    assert (root.trace_id, root.span_id) == (f"{own.trace_id:032x}", f"{own.span_id:016x}")
    assert root.parent_id == ""
    assert (turn.trace_id, turn.parent_id) == (root.trace_id, root.span_id)
    assert turn.span_id != root.span_id
    assert root.links[0][0] == f"{session_context('ses_parent').trace_id:032x}"
    assert (turn.service, turn.instance) == ("sessile-test", "one")


def test_the_standard_environment_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    with receiver() as received:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", received.endpoint)
        monkeypatch.setenv("OTEL_SERVICE_NAME", "named")
        monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
        monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
        for ratio in (None, 1.0):  # what is set goes before the environment
            config = TelemetryConfig(sample_ratio=ratio)
            with installed(config, "x", "one", {}, for_libraries=False) as telemetry:
                assert telemetry.meter_provider is None
                with telemetry.tracing("test").session_span(f"turn {ratio}", "ses_a"):
                    pass
        assert [span.name for span in received.spans] == ["turn 1.0"]
        assert received.spans[0].service == "named"
        monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
        assert entered(TelemetryConfig()).tracer_provider is None


def test_metrics_are_served_for_prometheus_until_the_end() -> None:
    config = TelemetryConfig(prometheus_listen="127.0.0.1:0")
    with installed(config, "x", "one", {}, for_libraries=False) as telemetry:
        assert telemetry.tracer_provider is None
        GatewayMetrics(telemetry.meter("test")).failed_over(0.3, "refused")
        url = f"http://{telemetry.prometheus_address}/metrics"
        with urllib.request.urlopen(url, timeout=5) as answer:
            text = answer.read().decode()
    assert 'sessile_failover_gap_seconds_bucket{le="0.5",sessile_cause="refused"} 1.0' in text
    assert 'sessile_failover_gap_seconds_bucket{le="0.2",sessile_cause="refused"} 0.0' in text
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(url, timeout=5)


def test_an_address_in_use_is_told() -> None:
    config = TelemetryConfig(prometheus_listen="127.0.0.1:0")
    with installed(config, "x", "one", {}, for_libraries=False) as telemetry:
        again = TelemetryConfig(prometheus_listen=telemetry.prometheus_address)
        with pytest.raises(OSError, match="cannot listen for Prometheus on"):
            entered(again)


def test_a_collector_that_is_away_does_not_hold_up_the_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(setup, "FLUSH_TIMEOUT_S", 0.2)  # the exporter tries for seconds
    config = TelemetryConfig(otlp_endpoint="http://127.0.0.1:9", metrics=False)
    with (
        installed(config, "x", "one", {}, for_libraries=False) as telemetry,
        telemetry.tracing("test").session_span("turn", "ses_a"),
    ):
        pass
    flushing = [thread for thread in threading.enumerate() if thread.name == "telemetry flush"]
    assert flushing
    assert "not all telemetry was exported" in caplog.text
    for thread in flushing:  # its exporter draws random delays, which other tests are not to see
        thread.join(60)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"otlp_endpoint": "127.0.0.1:4317"}, "http://"),
        ({"sample_ratio": 1.5}, "from 0 to 1"),
        ({"metrics_interval_s": 0}, "positive"),
        ({"prometheus_listen": "9464"}, "host:port"),
        ({"log_format": "xml"}, "auto, text or json"),
        ({"log_level": "LOUD"}, "DEBUG, INFO, WARNING, ERROR, CRITICAL"),
    ],
)
def test_settings_that_make_no_sense_are_refused(setting: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TelemetryConfig(**setting)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf", "over gRPC only"),
        ("OTEL_TRACES_EXPORTER", "zipkin", "otlp or none"),
    ],
)
def test_an_environment_that_cannot_be_followed_is_refused(
    name: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=said):
        entered(TelemetryConfig(otlp_endpoint="http://127.0.0.1:4317"))


def test_a_process_that_exports_nothing_imports_nothing_that_could() -> None:
    # The Redis client looks at the SDK of metrics by itself.
    code = (
        "import sys, gateway.main, workers.main\n"
        "from gateway.telemetry.config import TelemetryConfig\n"
        "from gateway.telemetry.setup import installed\n"
        "with installed(TelemetryConfig(), 'x', 'y', {}) as t:\n"
        "    assert not t.tracing('z').on\n"
        "parts = ('opentelemetry.sdk.trace', 'opentelemetry.exporter', 'prometheus_client')\n"
        "found = [m for m in sys.modules if m.startswith(parts)]\n"
        "assert not found, found\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_tenants_are_labels_only_if_asked_for_and_so_many() -> None:
    assert Tenants(False).label("acme") == {}
    tenants = Tenants(True)
    for number in range(MAX_TENANTS):
        tenants.label(f"t{number}")
    assert tenants.label("t0") == {"sessile.tenant": "t0"}
    assert tenants.label("one more") == {"sessile.tenant": OTHER_TENANTS}
