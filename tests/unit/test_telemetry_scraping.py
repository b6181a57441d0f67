"""The Prometheus listener: with the process's certificate, renewed while it serves."""

from __future__ import annotations

import dataclasses
import http.client
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from gateway.config import GatewayConfig
from gateway.security.config import GatewaySecurity, TlsConfig, WorkerSecurity
from gateway.security.tls import Tls
from gateway.telemetry import scraping
from gateway.telemetry.config import TelemetryConfig
from gateway.telemetry.metrics import GatewayMetrics
from gateway.telemetry.setup import installed
from tests.support.certificates import HOST, Authority
from workers.config import ReplicaSettings, WorkerConfig


@contextmanager
def served(tls: Tls) -> Iterator[str]:
    """host:port."""
    config = TelemetryConfig(prometheus_listen=f"{HOST}:0")
    made = installed(config, "x", "one", {}, tls=tls.metrics, for_libraries=False)
    with made as telemetry:
        GatewayMetrics(telemetry.meter("test")).epoch_taken("placement")
        yield telemetry.prometheus_address


def scraped(address: str, ca: Path, shown: TlsConfig | None = None) -> str:
    context = ssl.create_default_context(cafile=str(ca))
    if shown is not None:
        context.load_cert_chain(shown.certificate, shown.key)
    with urllib.request.urlopen(f"https://{address}/metrics", timeout=5, context=context) as answer:
        return str(answer.read().decode())


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "pki")


def test_metrics_are_served_with_the_processs_certificate(
    authority: Authority, tmp_path: Path
) -> None:
    stranger = Authority(tmp_path / "stranger").certificate
    with served(authority.tls("worker")) as address:
        assert "sessile_epochs_taken" in scraped(address, authority.certificate)
        with pytest.raises(urllib.error.URLError, match="certificate verify failed"):
            scraped(address, stranger)
        with pytest.raises((ConnectionError, http.client.BadStatusLine)):
            urllib.request.urlopen(f"http://{address}/metrics", timeout=5)
        assert "sessile_epochs_taken" in scraped(address, authority.certificate)


def test_who_connects_and_says_nothing_keeps_nobody_waiting(authority: Authority) -> None:
    with served(authority.tls("worker")) as address:
        host, _, port = address.rpartition(":")
        with socket.create_connection((host, int(port)), 5):
            assert "sessile_epochs_taken" in scraped(address, authority.certificate)


def test_connections_are_bounded_and_their_places_are_given_back(authority: Authority) -> None:
    with served(authority.tls("worker")) as address:
        host, _, port = address.rpartition(":")

        def closed(peer: socket.socket) -> bool:
            with suppress(ConnectionResetError):
                return peer.recv(1) == b""
            return True

        with ExitStack() as held:
            silent = [
                held.enter_context(socket.create_connection((host, int(port)), 5))
                for _ in range(scraping.MAX_CONNECTIONS)
            ]
            with socket.create_connection((host, int(port)), 5) as one_more:
                assert closed(one_more)
            silent[0].settimeout(0.1)
            with pytest.raises(TimeoutError):
                closed(silent[0])
        give_up_at = time.monotonic() + 30
        while time.monotonic() < give_up_at:
            with suppress(ConnectionError, urllib.error.URLError, ssl.SSLError):
                assert "sessile_epochs_taken" in scraped(address, authority.certificate)
                return
            time.sleep(0.05)  # until its threads have noticed
        pytest.fail("the places are gone")


def test_a_connection_that_gets_no_thread_takes_no_place(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = scraping.MAX_CONNECTIONS
    start = threading.Thread.start

    def refused(thread: threading.Thread) -> None:
        nonlocal left
        if "process_request" in thread.name and left:
            left -= 1
            raise RuntimeError("can't start new thread")
        start(thread)

    with served(authority.tls("worker")) as address:
        monkeypatch.setattr(threading.Thread, "start", refused)
        for _ in range(scraping.MAX_CONNECTIONS):
            with pytest.raises((ConnectionError, ssl.SSLError, urllib.error.URLError)):
                scraped(address, authority.certificate)
        assert not left
        assert "sessile_epochs_taken" in scraped(address, authority.certificate)


def test_certificates_are_renewed_without_a_restart(authority: Authority, tmp_path: Path) -> None:
    renewed = Authority(tmp_path / "renewed")
    files = authority.issue("worker")
    with served(Tls(files, check_interval_s=0.0)) as address:
        assert scraped(address, authority.certificate)
        new = renewed.issue("worker")
        files.key.write_bytes(new.key.read_bytes())
        with pytest.raises(urllib.error.URLError):
            scraped(address, renewed.certificate)  # of a key without its certificate nothing is
        assert scraped(address, authority.certificate)
        files.certificate.write_bytes(new.certificate.read_bytes())
        assert scraped(address, renewed.certificate)
        with pytest.raises(urllib.error.URLError, match="certificate verify failed"):
            scraped(address, authority.certificate)


def test_a_certificate_is_asked_for_only_where_it_is_required(
    authority: Authority, tmp_path: Path
) -> None:
    files = dataclasses.replace(authority.issue("gw"), require_client_certificate=True)
    stranger = Authority(tmp_path / "stranger").issue("scraper")
    with served(Tls(files)) as address:
        assert scraped(address, authority.certificate, authority.issue("scraper"))
        for shown in (None, stranger):
            with pytest.raises((ConnectionError, ssl.SSLError, urllib.error.URLError)):
                scraped(address, authority.certificate, shown)


FILES = TlsConfig(Path("c"), Path("k"), Path("ca"))


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "metrics.example.com"])
def test_off_loopback_metrics_need_tls_or_a_word_that_they_do_not(host: str) -> None:
    metrics = TelemetryConfig(prometheus_listen=f"{host}:9464")
    replica = ReplicaSettings("r1")
    with pytest.raises(ValueError, match=r"prometheus_listen .* no TLS.*--tls-cert.*--insecure"):
        GatewayConfig(telemetry=metrics)
    with pytest.raises(ValueError, match=r"prometheus_listen .* no TLS.*--tls-cert.*--insecure"):
        WorkerConfig("redis://h", replica, telemetry=metrics)
    for tls, insecure in ((FILES, False), (None, True)):
        GatewayConfig(telemetry=metrics, security=GatewaySecurity(tls, allow_insecure=insecure))
        security = WorkerSecurity(tls, allow_insecure=insecure)
        WorkerConfig("redis://h", replica, telemetry=metrics, security=security)
    local = TelemetryConfig(prometheus_listen="127.0.0.1:9464")
    assert GatewayConfig(telemetry=local)
    assert WorkerConfig("redis://h", replica, telemetry=local)
