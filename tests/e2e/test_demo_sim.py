"""The demo, from end to end with the sim engine: real processes, real kills, a raw audit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from loadtest.demo.tasks import MODULES, Call, ToolError, run_tool, steps
from tests.support.patience import PATIENT


def demo(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gateway.cli", "demo", "--engine", "sim", "--out", str(out)]
    return subprocess.run(
        [*command, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
        env={**os.environ, **PATIENT, "COLUMNS": "120", "TMPDIR": str(out.parent)},
    )


@pytest.mark.slow
def test_nothing_is_lost_or_repeated_through_kills_a_drain_and_a_join(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    run = demo(out)
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads(out.read_text())
    assert report["passed"]
    assert report["problems"] == []
    assert (report["lost_tokens"], report["repeated_tokens"], report["altered_tokens"]) == (0, 0, 0)
    assert report["checked_tokens"] == report["output_tokens"] > 0
    assert report["turns"] >= 8 * 6
    assert report["failover_gap_ms"]["count"] >= 1
    assert report["gateway_gap_ms"]["count"] >= 1
    assert report["killed_replica"]
    assert report["killed_gateway"]
    assert report["joined_replica"] == "r4"
    assert report["drain"]["moved_with_kv"] >= 1
    assert any(move["covered"] for move in report["moved_idle"])
    assert "passed" in run.stdout


@pytest.mark.slow
def test_without_faults_nearly_every_reusable_token_is_cached(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    run = demo(out, "--no-faults", "--json")
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads(run.stdout)
    assert report == json.loads(out.read_text())
    assert report["prefix"]["share_of_ideal"] >= 0.98
    assert report["killed_replica"] == report["killed_gateway"] == ""


@pytest.mark.parametrize("module", MODULES)
def test_every_scripted_call_works_on_this_machines_library(module: str) -> None:
    script = steps(module)
    calls = [step.call for step in (next(script) for _ in range(12)) if step.call is not None]
    assert len(calls) == 11
    for call in calls:
        assert 0 < len(run_tool(call, 800)) <= 800


@pytest.mark.parametrize(
    "call",
    [
        Call("open_file", {"path": "../../../etc/passwd", "first_line": 1}),
        Call("list_folder", {"path": "/"}),
        Call("calculate", {"expression": "__import__('os').getpid()"}),
    ],
    ids=str,
)
def test_tools_refuse_what_lies_outside(call: Call) -> None:
    with pytest.raises(ToolError):
        run_tool(call, 800)
