"""Server processes: an orderly stop at the first signal, an immediate one at the second."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

SCRIPT = """
import sys, anyio
from statestore.process import run_process

async def serve(*, stop, task_status):
    if sys.argv[1] == "early":
        raise ValueError("no address")
    task_status.started("here:1")
    if sys.argv[1] == "late":
        raise ValueError("no more")
    if sys.argv[1] == "by itself":
        return
    await stop.wait()
    print("stopping", flush=True)
    if sys.argv[1] == "never":
        await anyio.sleep_forever()

run_process(serve)
print("ended", flush=True)
"""


@pytest.mark.parametrize(
    ("ending", "signals"),
    [("by itself", []), ("orderly", [signal.SIGTERM]), ("never", [signal.SIGINT, signal.SIGTERM])],
)
def test_a_server_runs_until_its_end_or_a_signal(
    ending: str, signals: list[signal.Signals]
) -> None:
    command = [sys.executable, "-c", SCRIPT, ending]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "here:1\n"
        for number in signals:
            process.send_signal(number)
            if number == signals[0]:
                assert process.stdout.readline() == "stopping\n"
        assert process.stdout.read() == "ended\n"
    assert process.returncode == 0


@pytest.mark.parametrize("ending", ["early", "late"])
def test_what_a_server_fails_with_is_raised(ending: str) -> None:
    script = SCRIPT.replace(
        "run_process(serve)",
        """
try:
    run_process(serve)
except* ValueError as group:
    print(*group.exceptions)
""",
    )
    command = [sys.executable, "-c", script, ending]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    heard = ["no address"] if ending == "early" else ["here:1", "no more"]
    assert done.stdout.splitlines() == [*heard, "ended"]
