"""Processes that end with this one, and what the kernel says of them."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import anyio

from statestore.embedded import dies_with_parent

START_TIMEOUT_S = 60.0


class Child:
    """One process. It ends with this one, whatever happens.

    It knows with which exit codes the tests have let it end: any other end, a SIGKILL by the kernel
    among them, is one of its own."""

    def __init__(
        self, name: str, command: Sequence[str], log: Path, env: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self.log = log
        self.stopped = False
        self.complaints: list[str] = []
        """What was wrong with how it ended."""
        self._excused: set[int] = set()
        self._judged = False
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                dies_with_parent(command, signal.SIGKILL),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=output,
                cwd=log.parent if env is None else None,
                env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    async def ready(self) -> None:
        """Until it announced itself on its standard output."""
        assert self.process.stdout is not None
        with anyio.move_on_after(START_TIMEOUT_S):
            await anyio.wait_readable(self.process.stdout)
            if self.process.stdout.readline():
                return
        raise RuntimeError(f"{self.name} did not start:\n{self.log.read_text()[-3000:]}")

    def signal(self, number: signal.Signals) -> None:
        if self.running:
            os.kill(self.pid, number)

    def kill(self) -> None:
        if self.running:
            self.may_end_with(-signal.SIGKILL)
            self.signal(signal.SIGKILL)

    def may_end_with(self, code: int) -> None:
        """The test has brought it to end so."""
        self._excused.add(code)

    def judge_its_end(self) -> None:
        """Complains, once, if it has ended though no test brought it to."""
        code = self.process.poll()
        if code is None or self._judged:
            return
        self._judged = True
        if code not in self._excused:
            said = self.log.read_text(errors="replace")[-1000:]
            self.complaints.append(f"{self.name} ended by itself with {code}: {said}")

    def stop(self) -> None:
        """SIGSTOP."""
        self.stopped = True
        self.signal(signal.SIGSTOP)

    def wake(self) -> None:
        """SIGCONT."""
        self.stopped = False
        self.signal(signal.SIGCONT)

    async def ended(self, within_s: float = 20.0) -> int:
        """Its exit code, once it has ended; TimeoutError."""
        try:
            await anyio.to_thread.run_sync(self.process.wait, within_s)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{self.name} did not end within {within_s} s") from None
        if self.process.stdout is not None:
            self.process.stdout.close()
        return int(self.process.returncode)

    async def terminate(self) -> int:
        """SIGTERM, and with a complaint SIGKILL if that does not help; its exit code."""
        self.judge_its_end()
        self.may_end_with(0)
        self.wake()
        self.signal(signal.SIGTERM)
        try:
            code = await self.ended()
        except TimeoutError as error:
            self.complaints.append(f"after SIGTERM {error}")
            self.kill()
            code = await self.ended()
        self.judge_its_end()
        return code


def rss_bytes(pid: int) -> int:
    """Resident memory of a process; 0 if it is gone."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def children() -> list[int]:
    """Pids of the living children of this process."""
    found: list[int] = []
    for task in Path("/proc/self/task").iterdir():
        try:
            found += [int(pid) for pid in (task / "children").read_text().split()]
        except OSError:
            continue
    return found
