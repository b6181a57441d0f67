"""The commands of docker-compose.yml, run as processes: their addresses and the store's are
replaced by free ones of this machine, nothing else."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import anyio
import pytest
import yaml
from sessile import Sessile, TurnStatus

from statestore.embedded import embedded_server

ROOT = Path(__file__).parents[2]
SERVERS = ("gateway-1", "gateway-2", "worker-1", "worker-2", "worker-3")
SESSILE = (sys.executable, "-m", "gateway.cli")
STOP_TIMEOUT_S = 30


def services() -> dict[str, Any]:
    """As compose reads them where no variable is set."""
    text = (ROOT / "docker-compose.yml").read_text()
    found = yaml.safe_load(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text))["services"]
    assert isinstance(found, dict)
    return found


def local(command: str, name: str) -> list[str]:
    """The same command on free ports of loopback."""
    words = re.sub(r"0\.0\.0\.0:\d+", "127.0.0.1:0", command)
    return shlex.split(words.replace(f"--advertise-host {name}", "--advertise-host 127.0.0.1"))


def start(name: str, service: dict[str, Any], store: str, logs: Path) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "SESSILE_REDIS": store,
        "SESSILE_COMMON__TELEMETRY__PROMETHEUS_LISTEN": "127.0.0.1:0",
    }
    assert set(service["environment"]) - set(environment) <= {
        "OTEL_EXPORTER_OTLP_ENDPOINT",
        "OTEL_METRICS_EXPORTER",
    }, "what is not taken over here needs a receiver"
    with (logs / f"{name}.log").open("wb") as log:
        return subprocess.Popen(
            [*SESSILE, *local(service["command"], name), "--json"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.anyio
async def test_the_commands_make_a_fleet_that_is_healthy_and_answers(
    anyio_backend: str, tmp_path: Path
) -> None:
    found = services()
    with ExitStack() as stack:
        async with embedded_server(None) as store:
            running = {}
            for name in SERVERS:
                process = start(name, found[name], store, tmp_path)
                running[name] = stack.enter_context(process)
                stack.callback(process.kill)
            address = {}
            for name, process in running.items():
                assert process.stdout is not None
                line = await anyio.to_thread.run_sync(process.stdout.readline)
                assert line, (tmp_path / f"{name}.log").read_text()
                address[name] = json.loads(line)["address"]
            asked = [*SESSILE, *found["worker-3"]["healthcheck"]["test"][2:-1]]
            for name in ("gateway-1", "worker-3"):
                done = await anyio.run_process([*asked, address[name]], check=False)
                assert (done.returncode, done.stdout) == (0, b"SERVING\n"), done.stderr
            async with Sessile([address["gateway-1"], address["gateway-2"]]) as client:
                session = await client.open()
                result = await session.run("hello", max_tokens=4).result()
                assert result.status is TurnStatus.COMMITTED
                await session.close()  # else workers that all end wait for a place to move it to
            for process in reversed(running.values()):
                process.terminate()
            for name, process in running.items():
                code = await anyio.to_thread.run_sync(process.wait, STOP_TIMEOUT_S)
                assert code == 0, (tmp_path / f"{name}.log").read_text()
            done = await anyio.run_process([*asked, address["gateway-1"]], check=False)
            assert done.returncode == 1
            assert b"does not answer" in done.stderr
