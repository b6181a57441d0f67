"""The pytest fixtures as a user has them: pytest runs the user's tests in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from gateway.testing import LocalServer

SAMPLE = '''
import pytest
import sessile
from sessile import Moved, Tokens
from gateway.testing import tool_call


@sessile.tool
def weather(city: str) -> str:
    """The weather of a city."""
    return {"Rome": "sunny"}[city]


async def agent(client):
    session = await client.open(system="Be brief.", tools=[weather])
    return session, await session.run_tools("Is it warm in Rome?").result()


@pytest.mark.anyio
async def test_the_agent_asks_for_the_weather(sessile_server, sessile_client):
    sessile_server.will_say("Let me see. ", tool_call("weather", city="Rome"))
    sessile_server.will_say("It is warm.")
    async with sessile_client as client:
        session, result = await agent(client)
        assert result.text == "It is warm."
        assert [call.output for call in result.calls] == ["sunny"]
        first, second = await session.transcript()
        assert second.input[0].content == "sunny"
    assert sessile_server.unsaid == ()


class TestCrash:
    @pytest.fixture
    def sessile_server_options(self):
        return {"replicas": 2, "step_ms": 10}

    def test_a_turn_survives_its_replica(self, sessile_server, sessile_sync_client):
        sessile_server.will_say("word " * 30)
        session = sessile_sync_client.open()
        turn = session.run("Go on.")
        moves = 0
        for event in turn:
            if isinstance(event, Tokens) and len(sessile_server.replicas) == 2:
                sessile_server.crash(session.refresh().owner.replica_id)
            moves += isinstance(event, Moved)
        assert turn.text == "word " * 30
        assert moves


def test_that_fails(sessile_server, sessile_sync_client):
    sessile_server.will_say("no")
    assert sessile_sync_client.open().run("Is it?").result().text == "yes"


@pytest.fixture
def anyio_backend():
    return "asyncio"
'''


def test_the_fixtures_are_installed_for_pytest() -> None:
    plugins = {plugin.value for plugin in entry_points(group="pytest11")}
    assert "gateway.testing.plugin" in plugins, "this environment is old: run make install"


def test_a_users_tests_run_with_the_fixtures(tmp_path: Path) -> None:
    (tmp_path / "test_sample.py").write_text(SAMPLE)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert "2 passed" in done.stdout, done.stdout + done.stderr
    assert "1 failed" in done.stdout, done.stdout
    assert "AssertionError: assert 'no' == 'yes'" in done.stdout


def test_an_error_of_the_start_is_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.testing.server.gateway_main.serve", None)
    with pytest.raises(ExceptionGroup), LocalServer():
        pass


def test_a_server_needs_a_replica() -> None:
    with pytest.raises(ValueError, match="needs a replica"):
        LocalServer(replicas=0)
