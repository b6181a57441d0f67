"""The compose file describes a fleet that can start: its commands are ones the command line has."""

from __future__ import annotations

import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_spec import PyCompose
from compose_spec.models import ComposeSpecification
from typer.testing import CliRunner

import gateway.main
import workers.main
from gateway.cli.main import app
from gateway.cli.serve import DRAIN_GRACE_S
from gateway.config import GatewayConfig
from statestore.process import Announce
from workers.config import WorkerConfig

ROOT = Path(__file__).parents[2]
SHUTDOWN_GRACE_S = 2.0
"""Of a worker, by default."""
SERVERS = ("gateway-1", "gateway-2", "worker-1", "worker-2", "worker-3")


def interpolated(text: str) -> str:
    """As compose does it where no variable is set."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    content = yaml.safe_load(interpolated((ROOT / "docker-compose.yml").read_text()))
    assert isinstance(content, dict)
    return content


def configured(command: str, monkeypatch: pytest.MonkeyPatch) -> GatewayConfig | WorkerConfig:
    """What the process that a ``sessile`` command line names would run with."""
    given: list[GatewayConfig | WorkerConfig] = []

    def run(config: GatewayConfig | WorkerConfig, announce: Announce) -> None:
        given.append(config)

    monkeypatch.setattr(gateway.main, "run", run)
    monkeypatch.setattr(workers.main, "run", run)
    result = CliRunner().invoke(app, shlex.split(command))
    assert result.exit_code == 0, result.output
    return given[0]


def test_the_fleet_is_complete(compose: dict[str, Any]) -> None:
    assert set(compose["services"]) == {"redis", "jaeger", "prometheus", "grafana", *SERVERS}
    named = set(compose["volumes"])
    for service in compose["services"].values():
        for source in (volume.split(":")[0] for volume in service.get("volumes", ())):
            assert (ROOT / source).exists() if source.startswith(".") else source in named
        assert set(service.get("depends_on", ())) <= set(compose["services"])
    for name in (name for name in SERVERS if name.startswith("worker")):
        needed = compose["services"][name]["depends_on"]
        assert {"redis", "gateway-1", "gateway-2"} == set(needed), "workers are stopped first"


def test_the_file_is_a_compose_file(compose: dict[str, Any]) -> None:
    """By a parser of the specification, which refuses unknown keys and wrong values."""
    merged = {name: compose[name] for name in ("name", "services", "volumes")}
    parsed = PyCompose.from_yaml(yaml.safe_dump(merged, sort_keys=False))
    parsed.validate_volumes()
    parsed.validate_networks()
    read = ComposeSpecification.model_validate(merged).services or {}
    assert set(read) == set(compose["services"])
    with pytest.raises(Exception, match="comand"):
        PyCompose.from_yaml("services: {a: {image: x, comand: y}}")


@pytest.mark.parametrize("name", SERVERS)
def test_health_is_asked_where_the_server_listens(compose: dict[str, Any], name: str) -> None:
    service = compose["services"][name]
    command, subcommand, address = service["healthcheck"]["test"][1:]
    assert (command, subcommand) == ("sessile", "health")
    listen = re.search(r"--listen 0\.0\.0\.0:(\d+)", service["command"])
    assert listen is not None
    assert address == f"127.0.0.1:{listen[1]}"


def test_no_server_can_write_to_its_image_or_gain_rights(compose: dict[str, Any]) -> None:
    for name in (*SERVERS, "jaeger", "prometheus", "grafana"):
        service = compose["services"][name]
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), name
    grace = int(compose["services"]["worker-1"]["stop_grace_period"].removesuffix("s"))
    assert grace > DRAIN_GRACE_S + SHUTDOWN_GRACE_S


def test_metrics_are_scraped_where_they_are_served(compose: dict[str, Any]) -> None:
    jobs = yaml.safe_load((ROOT / "deploy/prometheus.yml").read_text())["scrape_configs"]
    targets = {t for job in jobs for config in job["static_configs"] for t in config["targets"]}
    listen = compose["services"]["worker-1"]["environment"][
        "SESSILE_COMMON__TELEMETRY__PROMETHEUS_LISTEN"
    ]
    assert targets == {f"{name}:{listen.rpartition(':')[2]}" for name in SERVERS}


def test_the_store_keeps_what_it_acknowledged(compose: dict[str, Any]) -> None:
    command = compose["services"]["redis"]["command"]
    assert "--appendonly yes" in command
    assert "--maxmemory-policy noeviction" in command


@pytest.mark.parametrize("name", SERVERS)
def test_every_server_starts_with_a_command_that_exists(
    compose: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = compose["services"][name]
    for variable, value in service["environment"].items():
        monkeypatch.setenv(variable, value)
    config = configured(service["command"], monkeypatch)
    assert config.redis_url == "redis://redis:6379/0"
    host, _, port = config.listen.rpartition(":")
    assert host == "0.0.0.0"
    published = [entry.rsplit(":", 1)[1] for entry in service.get("ports", ())]
    if isinstance(config, WorkerConfig):
        # Peers and gateways reach a worker by its service's name; both its ports are on all
        # interfaces, on the network of the compose project only.
        assert config.advertise_host == config.replica.replica_id == name
        assert config.kv_listen.startswith("0.0.0.0:")
        assert published == []
    else:
        assert config.gateway_id == name
        assert published == [port]


def test_the_image_runs_the_command_line_without_root() -> None:
    lines = (ROOT / "deploy/Dockerfile").read_text().splitlines()
    instructions = [line.split(maxsplit=1) for line in lines if re.match(r"[A-Z]+ ", line)]
    assert ["USER", "10001"] in instructions
    assert ["ENTRYPOINT", '["sessile"]'] in instructions
    sources = {argument.split()[0] for word, argument in instructions if word == "COPY"}
    for source in sources - {"--from=build"}:
        assert (ROOT / source).exists(), source


def linted(dockerfile: Path) -> subprocess.CompletedProcess[str]:
    hadolint = Path(sys.executable).parent / "hadolint"
    assert hadolint.exists(), "this environment is old: run make install"
    command = [str(hadolint), "--no-color", str(dockerfile)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the linter's wheels are for x86-64")
def test_the_linter_of_dockerfiles_has_nothing_to_say(tmp_path: Path) -> None:
    found = linted(ROOT / "deploy/Dockerfile")
    assert (found.returncode, found.stdout) == (0, ""), found.stdout + found.stderr
    careless = tmp_path / "Dockerfile"
    careless.write_text("FROM python\nRUN cd /tmp && apt-get install curl\nUSER root\n")
    found = linted(careless)
    assert found.returncode == 1
    for rule in ("DL3002", "DL3006", "DL3008", "DL3015"):  # root, tag, version, recommends
        assert rule in found.stdout
