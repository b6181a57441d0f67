"""The examples, as their readers run them: each in a process of its own, against a server whose
model says what the example is about."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.testing import LocalServer, tool_call

EXAMPLES = Path(__file__).parents[2] / "sdk" / "examples"
TIMEOUT_S = 60


@pytest.fixture
def server() -> Iterator[LocalServer]:
    with LocalServer() as running:
        yield running


def command(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-W", "error", str(EXAMPLES / f"{name}.py"), *arguments]


def example(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command(name, *arguments),
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_each_example_has_a_test() -> None:
    tested = set(re.findall(r'(?:example|command)\(\s*"(\w+)"', Path(__file__).read_text()))
    assert tested == {path.stem for path in EXAMPLES.glob("*.py")}


def test_an_agent_uses_its_tools(server: LocalServer) -> None:
    server.will_say(tool_call("weather", city="Rome"), tool_call("weather", city="Oslo", unit="F"))
    server.will_say("So: ", tool_call("difference", a=31, b=12), tool_call("weather", city="Ur"))
    server.will_say("Rome is 19 degrees warmer.")
    # The address from the environment, as the others take it from their arguments.
    shown = example("tool_agent", SESSILE_GATEWAY=server.address).stdout
    assert '[-> {"degrees":31.0,"unit":"C"}]' in shown
    assert '[-> {"degrees":53.6,"unit":"F"}]' in shown
    assert "[-> 19.0]" in shown
    assert '[-> {"error": "\'Ur\'"}]' in shown
    assert shown.endswith("Rome is 19 degrees warmer.\n")


def test_a_hundred_agents_run_at_once(server: LocalServer) -> None:
    done = example("hundred_agents", server.address)
    assert "300/300 turns" in done.stderr
    found = re.search(r"100 agents, 300 turns in [\d.]+ s, (\d+)% of the input", done.stdout)
    assert found is not None, done.stdout
    assert int(found[1]) > 30


def test_three_forks_continue_one_story(server: LocalServer) -> None:
    server.will_say("Once upon a time.")
    server.will_say("A.").will_say("Abc.").will_say("Ab.")
    server.will_say("The end.")
    lines = example("fork_three", server.address).stdout.splitlines()
    assert lines[0] == "begins: Once upon a time."
    attempts = [line for line in lines if line.startswith("attempt")]
    assert {line.rpartition(": ")[2] for line in attempts} == {"A.", "Abc.", "Ab."}
    assert not any("(0 tokens" in line for line in attempts)
    assert lines[-2:] == ["kept: Abc.", "ends: The end."]


@pytest.mark.parametrize("moment", ["in a turn", "after a tool"])
def test_a_job_survives_the_kill_of_its_process(moment: str) -> None:
    with LocalServer(step_ms=3) as server:
        server.will_say(tool_call("page", number=1))
        server.will_say(tool_call("page", number=2))
        server.will_say("Both are read.")
        last = "turn job.1 begins" if moment == "in a turn" else "calling page(2)"
        with subprocess.Popen(
            command("resume_after_crash", "job", server.address), stdout=subprocess.PIPE, text=True
        ) as first:
            assert first.stdout is not None
            before = []
            for line in first.stdout:
                before.append(line.strip())
                if last in line:
                    first.send_signal(signal.SIGKILL)
                    break
        assert first.returncode == -signal.SIGKILL
        assert "calling page(1) as call_job.0_0" in before

        after = example("resume_after_crash", "job", server.address).stdout.splitlines()
        assert "turn job.0 goes on" in after
        assert "turn job.1 goes on" in after
        assert not any("calling page(1)" in line for line in after)
        assert "calling page(2) as call_job.1_0" in after
        assert after[-1] == "answer: Both are read."
        assert server.unsaid == ()


def test_the_client_works_without_an_event_loop(server: LocalServer) -> None:
    server.will_say("A barnacle.")
    server.will_say(tool_call("letters", word="barnacle"))
    server.will_say("Eight.")
    lines = example("without_async", server.address).stdout.splitlines()
    assert lines[:2] == ["A barnacle.", "Eight."]
    assert lines[2] == "turn 0: 12 tokens"
    assert len(lines) == 5


def test_a_turn_is_part_of_the_applications_trace(server: LocalServer) -> None:
    server.will_say(tool_call("search", query="barnacles"))
    server.will_say("Something that does not move.")
    spans = list(printed(example("traced", server.address).stdout))
    assert len({span["context"]["trace_id"] for span in spans}) == 1
    named = {span["name"]: span for span in spans}
    root = named["handle a request"]
    assert root["parent_id"] is None

    def parent(name: str) -> object:
        return next(
            span["name"] for span in spans if span["context"]["span_id"] == named[name]["parent_id"]
        )

    assert parent("look into the index") == "execute_tool search"
    assert parent("execute_tool search") == "handle a request"
    chats = [span for span in spans if span["name"].startswith("chat")]
    assert [span["parent_id"] for span in chats] == [root["context"]["span_id"]] * 2


def printed(text: str) -> Iterator[dict[str, Any]]:
    """The JSON objects that follow one another in a text."""
    decoder, at = json.JSONDecoder(), 0
    while at < len(text):
        value, at = decoder.raw_decode(text, at)
        yield value
        at += len(text[at:]) - len(text[at:].lstrip())
