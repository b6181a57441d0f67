"""A whole fleet of real processes: `sessile up`, and the cluster that tests and the demo use."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from sessile import Moved, Runtime, Sessile, Tokens, TurnStatus
from typer.testing import CliRunner

from gateway.cli.launch import Cluster, LaunchFailed
from gateway.cli.main import app
from tests.support.patience import PATIENT

LONG = 900
"""Tokens of a turn that something happens to: it still runs then, even if a process has stood still
for some seconds."""


@contextmanager
def running_up(
    tmp_path: Path, *arguments: str
) -> Iterator[tuple[subprocess.Popen[bytes], dict[str, Any]]]:
    command = [sys.executable, "-m", "gateway.cli", "up", "--json", "--listen", "127.0.0.1:0"]
    command += ["--log-directory", str(tmp_path), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        with process.stdout:
            yield process, json.loads(process.stdout.readline())
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


@contextmanager
def serving(kind: str, *arguments: str) -> Iterator[dict[str, Any]]:
    """A process by itself; what it says when it serves."""
    command = [sys.executable, "-m", "gateway.cli", kind, "--json", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        with process.stdout:
            yield json.loads(process.stdout.readline())
            process.terminate()
            assert process.stdout.read() == b""
    finally:
        process.terminate()
        process.wait()


def alive(pid: int) -> bool:
    """Runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pids: list[int]) -> None:
    give_up_at = time.monotonic() + 20
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < give_up_at, "children outlive their parent"
        time.sleep(0.05)


def sessile(*arguments: str) -> str:
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_up_serves_chat_and_ends_in_order(tmp_path: Path) -> None:
    with running_up(tmp_path) as (process, fleet):
        target = ["--gateway", fleet["gateways"][0]]
        said = json.loads(sessile("chat", "hello", "--max-tokens", "8", "--json", *target))
        assert said["usage"]["output_tokens"] <= 8
        session = said["session_id"]
        (turn,) = json.loads(sessile("sessions", "transcript", session, "--json", *target))
        assert turn["output_text"] == said["text"]
        moved = json.loads(sessile("migrate", session, "--json", *target))
        assert moved["moved"]
        replicas = json.loads(sessile("replicas", "ls", "--json", *target))
        assert [replica["ref"]["replica_id"] for replica in replicas] == ["r1", "r2"]
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        wait_until_gone(list(fleet["pids"].values()))
        assert not Path(fleet["redis"].removeprefix("unix://")).exists()


def test_a_session_is_there_again_on_the_same_data_directory(tmp_path: Path) -> None:
    data = ["--data-directory", str(tmp_path / "data")]
    with running_up(tmp_path, *data) as (process, fleet):
        target = ["--gateway", fleet["gateways"][0], "--max-tokens", "8", "--json"]
        said = json.loads(sessile("chat", "hello", *target))
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    with running_up(tmp_path, *data) as (_, fleet):
        target = ["--gateway", fleet["gateways"][0], "--max-tokens", "8", "--json"]
        again = json.loads(sessile("chat", "more", "--session", said["session_id"], *target))
        assert again["turn_index"] == 1
        assert again["usage"]["input_tokens"] > said["usage"]["input_tokens"]


def test_fleets_and_workers_on_one_store_take_no_name_from_each_other(tmp_path: Path) -> None:
    with (
        running_up(tmp_path) as (_, first),
        running_up(tmp_path, "--redis", first["redis"]) as (_, second),
        serving("worker", "--redis", first["redis"]) as one,
        serving("worker", "--redis", first["redis"]) as other,
    ):
        names = [*first["replicas"], *second["replicas"], one["name"], other["name"]]
        target = ["--gateway", second["gateways"][0]]
        give_up_at = time.monotonic() + 20
        while True:
            seen = json.loads(sessile("replicas", "ls", "--json", *target))
            if {replica["ref"]["replica_id"] for replica in seen} == set(names):
                break
            assert time.monotonic() < give_up_at, "not all are there"
    assert len(set(names)) == 6
    assert one["address"] in {replica["endpoint"] for replica in seen}


def test_a_gateway_keeps_the_data_of_its_private_store_and_says_where_it_serves(
    tmp_path: Path,
) -> None:
    arguments = ["--listen", "127.0.0.1:0", "--data-directory", str(tmp_path / "data")]
    with serving("gateway", "--id", "g1", *arguments) as told:
        assert (told["kind"], told["name"]) == ("gateway", "g1")
        assert sessile("replicas", "ls", "--json", "--gateway", told["address"]) == "[]\n"
    assert any((tmp_path / "data").iterdir())


def test_up_ends_when_nothing_of_it_is_left(tmp_path: Path) -> None:
    with running_up(tmp_path) as (process, fleet):
        for pid in fleet["pids"].values():
            os.kill(pid, signal.SIGKILL)
        assert process.wait(20) == 1


def test_children_die_with_a_killed_parent(tmp_path: Path) -> None:
    with running_up(tmp_path) as (process, fleet):
        process.kill()
        wait_until_gone(list(fleet["pids"].values()))


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def cluster(anyio_backend: str, tmp_path: Path) -> AsyncIterator[Cluster]:
    options = {"eos_probability": "0"}
    async with Cluster(
        log_directory=tmp_path, engine_options=options, environment=PATIENT
    ) as fleet:
        await fleet.start(gateways=2, workers=2)
        yield fleet


@pytest.mark.anyio
async def test_a_turn_survives_its_replica_and_its_gateway(cluster: Cluster) -> None:
    """The reference is what the same session says undisturbed: the sim engine's tokens are hashes
    of the whole context, so a lost or repeated token would change all that follow."""
    async with Sessile(cluster.targets) as client:
        calm = await client.open(system="count", seed=1)
        stormy = await client.open(system="count", seed=1)
        expected = await calm.run("go", max_tokens=LONG).result()
        turn = stormy.run("go", max_tokens=LONG)
        owner = ""
        seen = 0
        async for event in turn:
            if isinstance(event, Tokens):
                seen += len(event.token_ids)
            if isinstance(event, Moved):
                owner = event.target.replica_id
            if seen > 40 and not owner:
                owner = str((await client.session(stormy.session_id).refresh()).owner)
                next(child for child in cluster.workers if child.name == owner).kill()
                cluster.gateways[0].kill()
        result = await turn.result()
    assert result.status is TurnStatus.COMMITTED
    assert result.token_ids == expected.token_ids
    assert result.text == expected.text
    assert result.moves >= 1


@pytest.mark.anyio
async def test_a_hung_gateway_is_given_up(cluster: Cluster) -> None:
    """Its connections stay open: only unanswered pings tell."""
    first = Runtime(rng=random.Random(1))
    assert random.Random(1).randrange(2) == 0, "the client starts at the first gateway"
    async with Sessile(cluster.targets, runtime=first) as client:
        turn = (await client.open()).run("go", max_tokens=LONG)
        await anext(turn)
        hung = next(child for child in cluster.gateways if child.address == cluster.targets[0])
        hung.kill(signal.SIGSTOP)
        result = await turn.result()
    assert result.reconnects == 1
    assert len(result.token_ids) == LONG


@pytest.mark.anyio
async def test_ctrl_c_ends_the_answer_on_the_server_too(cluster: Cluster) -> None:
    command = [sys.executable, "-m", "gateway.cli", "chat", "hi", "--max-tokens", "9000"]
    chat = await anyio.open_process([*command, "--gateway", cluster.targets[0]])
    async with chat:
        assert chat.stdout is not None
        await chat.stdout.receive(1)
        chat.send_signal(signal.SIGINT)
        assert await chat.wait() == 130
    async with Sessile(cluster.targets) as client:
        (info,) = [info async for info in client.list()]
        (turn,) = await client.session(info.session_id).transcript()
    assert turn.status is TurnStatus.CANCELLED
    assert turn.output_text


@pytest.mark.anyio
async def test_a_restarted_replica_is_ready_again(cluster: Cluster) -> None:
    first = cluster.workers[0]
    first.kill()
    again = await cluster.start_worker(first.name)
    await cluster.wait_ready()
    assert again.pid != first.pid
    assert again.log != first.log


@pytest.mark.anyio
async def test_a_gateway_killed_meanwhile_is_not_waited_for(cluster: Cluster) -> None:
    dying = cluster.gateways[1]
    dying.kill(signal.SIGSTOP)
    async with anyio.create_task_group() as tasks:

        async def kill() -> None:
            await anyio.sleep(0.5)
            dying.kill()

        tasks.start_soon(kill)
        await cluster.wait_ready(timeout_s=20)
    assert not dying.running
    cluster.gateways[0].kill()
    with pytest.raises(LaunchFailed, match="no gateway"):
        await cluster.wait_ready(timeout_s=20)


@pytest.mark.anyio
async def test_a_child_that_does_not_come_up_says_why(anyio_backend: str, tmp_path: Path) -> None:
    async with Cluster(log_directory=tmp_path) as fleet:
        with pytest.raises(LaunchFailed, match="not one of"):
            await fleet.start_worker("r1", engine_options={"nonsense": "1"})
