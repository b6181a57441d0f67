"""The compose file describes a fleet that can start: its commands are ones the command line has."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import gateway.main
import workers.main
from gateway.cli.main import app
from gateway.config import GatewayConfig
from statestore.process import Announce
from workers.config import WorkerConfig

ROOT = Path(__file__).parents[2]
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
    assert set(compose["services"]) == {"redis", "jaeger", *SERVERS}
    named = set(compose["volumes"])
    for service in compose["services"].values():
        assert {volume.split(":")[0] for volume in service.get("volumes", ())} <= named
        assert set(service.get("depends_on", ())) <= set(compose["services"])


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
    assert ["USER", "sessile"] in instructions
    assert ["ENTRYPOINT", '["sessile"]'] in instructions
    sources = {argument.split()[0] for word, argument in instructions if word == "COPY"}
    for source in sources - {"--from=build"}:
        assert (ROOT / source).exists(), source
