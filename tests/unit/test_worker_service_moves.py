"""Moving sessions and their KV: imports, hand-overs, releases, drains."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import anyio
import pytest
from sessile.v1 import replica_pb2 as pb
from sessile.v1 import types_pb2

from gateway.core import errors
from statestore.ports import SessionWritten
from statestore.records import Position, Session, TurnStatus
from tests.support.replica_world import (
    SESSION,
    TENANT,
    Heard,
    RunningReplica,
    World,
    in_virtual_time,
    listen,
    world,
)
from workers import transcript
from workers.engines.port import Sampling
from workers.engines.sim.config import SimConfig, SimTiming
from workers.engines.sim.model import expected_output
from workers.kv.transfer import MAX_CONCURRENT_PULLS
from workers.service import RECONCILE_S


def epoch(session: Session) -> types_pb2.Epoch:
    return types_pb2.Epoch(number=session.epoch.number, nonce=session.epoch.nonce)


def ref(replica: RunningReplica) -> types_pb2.ReplicaRef:
    return types_pb2.ReplicaRef(
        replica_id=replica.ref.replica_id, incarnation=replica.ref.incarnation
    )


def import_request(source: RunningReplica, up_to: Position) -> pb.ImportSessionRequest:
    return pb.ImportSessionRequest(
        session_id=SESSION,
        migration_id="m1",
        source_endpoint=f"{source.ref.replica_id}:1",
        source=ref(source),
        up_to=types_pb2.Position(length=up_to.length, digest=up_to.digest),
        tenant=TENANT,
    )


async def two_replicas(w: World, output: int = 60) -> tuple[RunningReplica, RunningReplica]:
    """A session with one turn on the first."""
    first, second = await w.start_owner("r1"), await w.start("r2")
    await listen(first, await w.request(first, params={"max_tokens": output}))
    return first, second


@in_virtual_time
async def test_an_idle_session_moves_with_its_kv() -> None:
    async with world() as w:
        first, second = await two_replicas(w)
        session = await w.session()
        answer = await second.app.import_session(import_request(first, session.head))
        # The last token's KV is computed only when the next turn needs it.
        whole = (session.head.length - 1) // 16
        assert answer.pages == whole
        assert answer.bytes_copied == whole * second.engine.info.page_bytes
        assert answer.verified.length == whole * 16
        assert w.channel.exports == {}
        await w.give(second)
        await first.app.release_session(
            pb.ReleaseSessionRequest(session_id=SESSION, epoch=epoch(await w.session()))
        )
        heard = await listen(second, await w.request(second, "More", "t2"))
        assert heard.accepted.cached_tokens == whole * 16
        assert heard.finished.usage.cached_tokens == whole * 16
        ledger, start = await w.ledger(), heard.accepted.output_start.length
        assert heard.tokens == expected_output(ledger[:start], 20, Sampling(), 0.0)


@in_virtual_time
async def test_a_corrupted_page_is_refused_and_what_follows_is_recomputed() -> None:
    async with world() as w:
        first, second = await two_replicas(w, output=120)
        w.channel.corrupt_page = 2
        session = await w.session()
        answer = await second.app.import_session(import_request(first, session.head))
        # Two rounds, each good up to its own third page.
        assert answer.pages == 4
        assert "verified" in answer.detail
        await w.give(second)
        heard = await listen(second, await w.request(second, "More", "t2"))
        ledger, start = await w.ledger(), heard.accepted.output_start.length
        assert heard.accepted.cached_tokens == 4 * 16
        assert heard.tokens == expected_output(ledger[:start], 20, Sampling(), 0.0)


@in_virtual_time
async def test_a_broken_pull_is_tried_once_more_and_then_given_up() -> None:
    async with world() as w:
        first, second = await two_replicas(w)
        head = (await w.session()).head
        w.channel.failures = 1
        answer = await second.app.import_session(import_request(first, head))
        assert answer.pages
        assert not answer.detail
        third = await w.start("r3")
        w.channel.failures = 2
        answer = await third.app.import_session(import_request(first, head))
        assert answer.pages == 0
        assert "the stream broke" in answer.detail
        assert third.engine.load().free_pages == third.engine.info.capacity_pages


def keeps_its_own(replica: RunningReplica) -> None:
    """Its pages are not for peers, as those of an engine with a storage of its own."""
    replica.engine._info = replace(replica.engine.info, page_bytes=0)


@in_virtual_time
async def test_an_engine_with_a_storage_of_its_own_has_the_context_before_it_owns_the_session() -> (
    None
):
    async with world() as w:
        first, second = await two_replicas(w)
        keeps_its_own(second)
        session = await w.session()
        answer = await second.app.import_session(import_request(first, session.head))
        whole = (session.head.length - 1) // 16
        assert (answer.pages, answer.bytes_copied) == (whole, 0)
        assert f"0 of {whole} pages were in its own storage" in answer.detail
        assert answer.verified.length == whole * 16
        assert w.channel.pulls == 0
        assert second.engine.load().running == 0
        await w.give(second)
        heard = await listen(second, await w.request(second, "More", "t2"))
        assert heard.finished.usage.cached_tokens >= whole * 16
        ledger, start = await w.ledger(), heard.accepted.output_start.length
        assert heard.tokens == expected_output(ledger[:start], 20, Sampling(), 0.0)


@in_virtual_time
async def test_what_an_engine_cannot_get_ready_in_time_is_computed_in_the_turn() -> None:
    slow = SimConfig(timing=SimTiming(prefill_token_ms=1000.0), eos_probability=0)
    async with world(slow) as w:
        first = await w.start_owner("r1")
        second = await w.start("r2", pull_timeout_s=5.0)
        keeps_its_own(second)
        await listen(first, await w.request(first, params={"max_tokens": 4}))
        answer = await second.app.import_session(import_request(first, (await w.session()).head))
        assert (answer.pages, answer.detail) == (0, "not ready within 5.0 s")
        assert second.engine.load().running == 0


@in_virtual_time
async def test_a_turn_pulls_its_prefix_as_planned_and_runs_even_if_that_fails() -> None:
    async with world() as w:
        first, second = await two_replicas(w)
        await w.give(second)
        request = await w.request(second, "More", "t2")
        request.prefix.source_endpoint = "r1:1"
        request.prefix.source.CopyFrom(ref(first))
        heard = await listen(second, request)
        assert heard.finished.usage.cached_tokens > 0
        third = await w.start("r3")
        await w.give(third)
        w.channel.failures = 9
        request = await w.request(third, "Again", "t3")
        request.prefix.source_endpoint = "r2:1"
        request.prefix.source.CopyFrom(ref(second))
        heard = await listen(third, request)
        assert heard.finished.usage.cached_tokens == 0
        assert heard.finished.status == types_pb2.TURN_STATUS_COMMITTED


@in_virtual_time
async def test_an_import_that_does_not_fit_is_refused_whole() -> None:
    async with world() as w:
        first, _ = await two_replicas(w, output=200)
        w.config = SimConfig(capacity_pages=4, timing=SimTiming(step_ms=10))
        small = await w.start("r3")
        answer = await small.app.import_session(import_request(first, (await w.session()).head))
        assert answer.pages == 0
        assert "KV pages" in answer.detail
        assert w.channel.pulls == 0


@in_virtual_time
async def test_pulls_into_a_replica_are_bounded_and_the_others_wait() -> None:
    async with world() as w:
        first, second = await w.start("r1"), await w.start("r2")
        pulling, most, pull = 0, 0, w.channel.pull

        async def counted(*args: Any) -> int:
            nonlocal pulling, most
            pulling, most = pulling + 1, max(most, pulling + 1)
            try:
                return await pull(*args)
            finally:
                pulling -= 1

        second.app._transfer._pull_pages = counted
        w.channel.latency_s = 1.0
        names = [f"ses_{index:016d}" for index in range(2 * MAX_CONCURRENT_PULLS + 1)]
        requests = []
        for name in names:
            await w.open(name, leading=name)
            await w.give(first, name)
            await listen(first, await w.request(first, session_id=name))
            requests.append(import_request(first, (await w.session(name)).head))
            requests[-1].session_id = name
        answers: list[pb.ImportSessionResponse] = []

        async def move(request: pb.ImportSessionRequest) -> None:
            answers.append(await second.app.import_session(request))

        async with anyio.create_task_group() as tasks:
            for request in requests:
                tasks.start_soon(move, request)
        assert most == MAX_CONCURRENT_PULLS
        assert len(answers) == len(names)
        assert all(answer.pages and not answer.detail for answer in answers)


@in_virtual_time
async def test_an_import_needs_the_ledgers_own_digest() -> None:
    async with world() as w:
        first, second = await two_replicas(w)
        head = (await w.session()).head
        with pytest.raises(errors.InvalidRequest):
            await second.app.import_session(import_request(first, Position(head.length, b"")))
        with pytest.raises(errors.DataLoss):
            await second.app.import_session(import_request(first, Position(head.length, b"x" * 16)))
        with pytest.raises(errors.MigrationRefused):
            await second.app.import_session(
                import_request(first, Position(head.length + 1, b"x" * 16))
            )


@in_virtual_time
async def test_a_closed_session_is_not_brought_back_by_a_late_import() -> None:
    async with world() as w:
        first, second = await two_replicas(w)
        request = import_request(first, (await w.session()).head)
        await w.store.close(SESSION, None)
        with pytest.raises(errors.SessionClosed):
            await second.app.import_session(request)
        assert second.app._ports.residency.get(SESSION) is None


@in_virtual_time
async def test_pages_of_another_layout_are_not_exported() -> None:
    async with world() as w:
        first, _ = await two_replicas(w)
        request = pb.ExportKvRequest(
            session_id=SESSION, source=ref(first), kv_fingerprint=b"other", block_hashes=[]
        )
        with pytest.raises(errors.MigrationRefused):
            await first.app.export_kv(request)
        request.kv_fingerprint = first.engine.info.kv_fingerprint
        request.block_hashes.append(b"z" * 16)
        assert (await first.app.export_kv(request)).offered_pages == 0


@in_virtual_time
async def test_pages_are_pulled_from_the_incarnation_that_was_meant_only() -> None:
    async with world() as w:
        first, second = await two_replicas(w)
        request = import_request(first, (await w.session()).head)
        request.source.incarnation -= 1
        answer = await second.app.import_session(request)
        assert answer.pages == 0
        assert f"this is {first.ref}, not " in answer.detail
        assert w.channel.pulls == 0
        unnamed = pb.ExportKvRequest(
            session_id=SESSION, kv_fingerprint=first.engine.info.kv_fingerprint
        )
        with pytest.raises(errors.NotOwner):
            await first.app.export_kv(unnamed)


async def switched(w: World, target: RunningReplica, head: types_pb2.Position) -> Session:
    """What the store does at the end of a migration."""
    session = await w.session()
    outcome = await w.store.switch_migration(
        SESSION, session.epoch, "m1", Position(head.length, head.digest),
        session.active_turn_id, w.nonce(),
    )  # fmt: skip
    assert isinstance(outcome, SessionWritten), outcome
    assert outcome.session.owner is not None
    assert outcome.session.owner.replica == target.ref
    return outcome.session


@in_virtual_time
async def test_a_running_turn_is_handed_over_at_a_step_boundary() -> None:
    async with world() as w:
        first, second = await two_replicas(w)
        heard, held = Heard(), pb.HandOverResponse()
        request = await w.request(first, "More", "t2", params={"max_tokens": 40})

        async def move() -> None:
            if held.turn_id or len(heard.tokens) < 10:
                return
            session = await w.session()
            await w.store.begin_migration(SESSION, session.epoch, "m1", second.ref, 30_000)
            held.CopyFrom(
                await first.app.hand_over(
                    pb.HandOverRequest(
                        session_id=SESSION, epoch=epoch(session), migration_id="m1", lease_ms=9000
                    )
                )
            )
            await anyio.sleep(1)  # nothing moves while it is held
            stored = await w.session()
            assert Position(held.head.length, held.head.digest) == stored.head
            answer = await second.app.import_session(import_request(first, stored.head))
            assert answer.pages == (held.head.length - 1) // 16
            moved = await switched(w, second, held.head)
            await first.app.release_session(
                pb.ReleaseSessionRequest(
                    session_id=SESSION,
                    epoch=epoch(moved),
                    moved_to=types_pb2.TurnRedirect(replica=ref(second), endpoint="r2:1"),
                    migration_id="m1",
                )
            )

        await listen(first, request, heard, between=move)
        assert held.turn_id == "t2"
        assert heard.events[-1].redirect.endpoint == "r2:1"
        assert heard.end.length == held.head.length
        request = await w.request(second, "", "t2")
        request.turn.resume_from.CopyFrom(heard.end)
        rest = await listen(second, request)
        ledger, start = await w.ledger(), rest.accepted.output_start.length
        assert heard.tokens + rest.tokens == ledger[start:]
        assert ledger[start:] == expected_output(ledger[:start], 40, Sampling(), 0.0)
        assert rest.accepted.attempt == 2
        assert first.app.session_ids() == []


@pytest.mark.parametrize("aborted", [True, False], ids=["aborted", "lease ran out"])
def test_a_held_turn_that_is_not_moved_goes_on_here(aborted: bool) -> None:
    @in_virtual_time
    async def turn() -> None:
        async with world() as w:
            first, _ = await two_replicas(w)
            heard, held = Heard(), pb.HandOverResponse()
            request = await w.request(first, "More", "t2", params={"max_tokens": 40})

            async def hold() -> None:
                if held.turn_id or len(heard.tokens) < 10:
                    return
                session = await w.session()
                held.CopyFrom(
                    await first.app.hand_over(
                        pb.HandOverRequest(
                            session_id=SESSION,
                            epoch=epoch(session),
                            migration_id="m1",
                            lease_ms=2000,
                        )
                    )
                )
                await anyio.sleep(1.5)
                assert (await w.session()).head.length == held.head.length
                if aborted:
                    await first.app.abort_hand_over(
                        pb.AbortHandOverRequest(session_id=SESSION, migration_id="m1")
                    )

            await listen(first, request, heard, between=hold)
            ledger, start = await w.ledger(), heard.accepted.output_start.length
            assert heard.tokens == ledger[start:]
            assert heard.tokens == expected_output(ledger[:start], 40, Sampling(), 0.0)
            assert heard.accepted.attempt == 1
            assert (await w.turn("t2")).status is TurnStatus.COMMITTED

    turn()


@in_virtual_time
async def test_a_hand_over_without_a_turn_tells_the_ledgers_end() -> None:
    async with world() as w:
        first, _ = await two_replicas(w)
        session = await w.session()
        request = pb.HandOverRequest(
            session_id=SESSION, epoch=epoch(session), migration_id="m1", lease_ms=1000
        )
        answer = await first.app.hand_over(request)
        assert not answer.turn_id
        assert answer.head.length == session.head.length
        request.epoch.number -= 1
        with pytest.raises(errors.NotOwner):
            await first.app.hand_over(request)


@in_virtual_time
async def test_a_release_under_an_older_epoch_is_ignored() -> None:
    async with world() as w:
        first, _ = await two_replicas(w)
        session = await w.session()
        old = types_pb2.Epoch(number=session.epoch.number - 1, nonce=b"x" * 8)
        request = pb.ReleaseSessionRequest(session_id=SESSION, epoch=old, drop_kv=True)
        assert not (await first.app.release_session(request)).released
        assert first.app.session_ids() == [SESSION]
        request.epoch.CopyFrom(epoch(session))
        assert (await first.app.release_session(request)).released
        load = first.engine.load()
        assert load.pinned_pages == 0
        assert load.free_pages == first.engine.info.capacity_pages
        assert not (await first.app.release_session(request)).released


@in_virtual_time
async def test_a_draining_replica_ends_when_it_is_empty() -> None:
    async with world() as w:
        first, _ = await two_replicas(w)
        answer = await first.app.set_draining(
            pb.SetDrainingRequest(draining=True, shutdown_when_empty=True)
        )
        assert list(answer.session_ids) == [SESSION]
        assert [r.draining for r in await w.store.fleet()] == [True, False]
        # It still serves what it owns.
        await listen(first, await w.request(first, "More", "t2"))
        assert not first.stop.is_set()
        await first.app.release_session(
            pb.ReleaseSessionRequest(session_id=SESSION, epoch=epoch(await w.session()))
        )
        await anyio.sleep(1)
        assert first.stop.is_set()


@in_virtual_time
async def test_a_session_taken_in_silence_does_not_keep_a_drained_replica_up() -> None:
    async with world() as w:
        first, second = await two_replicas(w)
        await w.give(second)
        assert first.app.session_ids() == [SESSION]
        await first.app.set_draining(pb.SetDrainingRequest(draining=True, shutdown_when_empty=True))
        await anyio.sleep(1)
        assert first.stop.is_set()


@pytest.mark.parametrize("became", ["moved", "under way", "nothing"])
def test_what_a_move_brings_keeps_a_drained_replica_up_until_it_came_to_nothing(
    became: str,
) -> None:
    @in_virtual_time
    async def move() -> None:
        async with world() as w:
            first, second = await two_replicas(w)
            session = await w.session()
            if became != "nothing":
                await w.store.begin_migration(SESSION, session.epoch, "m1", second.ref, 60_000)
            request = import_request(first, session.head)
            await second.app.import_session(request)
            if became == "moved":
                await switched(w, second, request.up_to)
            assert second.app.session_ids() == [SESSION]
            await second.app.set_draining(
                pb.SetDrainingRequest(draining=True, shutdown_when_empty=True)
            )
            await anyio.sleep(1)
            assert second.stop.is_set() is (became == "nothing")

    move()


async def moved(w: World, source: RunningReplica, target: RunningReplica, *, told: bool) -> None:
    """``told``: the source hears of the move; it is fenced in any case."""
    session = await w.session()
    await w.store.begin_migration(SESSION, session.epoch, "m1", target.ref, 60_000)
    request = import_request(source, session.head)
    await target.app.import_session(request)
    await switched(w, target, request.up_to)
    if told:
        release = pb.ReleaseSessionRequest(session_id=SESSION, epoch=epoch(session))
        await source.app.release_session(release)


@pytest.mark.parametrize("told", [False, True])
def test_a_session_that_comes_back_unused_is_held_whether_its_leave_was_told_or_not(
    told: bool,
) -> None:
    @in_virtual_time
    async def there_and_back() -> None:
        async with world() as w:
            first, second = await two_replicas(w)
            await moved(w, first, second, told=told)
            await moved(w, second, first, told=True)
            request = pb.SetDrainingRequest(draining=True, shutdown_when_empty=True)
            await first.app.set_draining(request)
            await anyio.sleep(1)
            assert not first.stop.is_set()
            assert first.app.session_ids() == [SESSION]
            assert first.engine.load().pinned_pages > 0

    there_and_back()


@in_virtual_time
async def test_a_move_that_is_undone_after_a_switch_nobody_heard_of_is_noticed() -> None:
    async with world() as w:
        first, second = await two_replicas(w)
        old = epoch(await w.session())
        await moved(w, first, second, told=False)
        await w.store.abort_migration(SESSION, "m1")
        release = pb.ReleaseSessionRequest(session_id=SESSION, epoch=old)
        await second.app.release_session(release)
        await anyio.sleep(2 * RECONCILE_S + 1)
        assert first.app.session_ids() == []
        assert second.app.session_ids() == [SESSION]


@in_virtual_time
async def test_a_refused_turn_costs_a_moved_session_no_pins() -> None:
    async with world() as w:
        first, second = await two_replicas(w)
        await moved(w, first, second, told=True)
        pinned = second.engine.load().pinned_pages
        assert pinned
        behind = types_pb2.Precondition(turn_index=0)
        with pytest.raises(errors.StaleClient):
            await listen(second, await w.request(second, "More", "t2", precondition=behind))
        assert second.app.session_ids() == [SESSION]
        assert second.engine.load().pinned_pages == pinned


@in_virtual_time
async def test_a_cancel_does_not_wait_for_a_pull_of_pages() -> None:
    async with world() as w:
        first, second = await two_replicas(w)
        w.channel.latency_s = 20.0
        await w.give(second)
        request = await w.request(second, "More", "t2")
        request.prefix.source_endpoint = "r1:1"
        request.prefix.source.CopyFrom(ref(first))
        heard = Heard()

        async def cancel() -> None:
            await w.store.cancel_turn(SESSION, "t2")
            await second.app.stop_turn(pb.StopTurnRequest(session_id=SESSION, turn_id="t2"))

        began = anyio.current_time()
        await listen(second, request, heard, between=cancel)
        assert heard.finished.status == types_pb2.TURN_STATUS_CANCELLED
        assert anyio.current_time() - began < 1


def test_a_transcript_that_is_too_large_is_told_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transcript, "MAX_RESPONSE_BYTES", 1)

    @in_virtual_time
    async def told() -> None:
        async with world() as w:
            replica = await w.start_owner()
            for name in ("t1", "t2", "t3"):
                await listen(replica, await w.request(replica, "Go on", name))
            request = pb.ReadTurnsRequest(tenant=TENANT)
            request.request.session_id = SESSION
            parts = []
            for following in (1, 2, 0):
                part = (await replica.app.read_turns(request)).transcript
                parts += [turn.turn_id for turn in part.turns]
                assert part.next_turn_index == following
                request.request.from_turn_index = following
            assert parts == ["t1", "t2", "t3"]

    told()


@in_virtual_time
async def test_a_transcript_is_told_from_the_ledger_by_any_replica() -> None:
    async with world() as w:
        first, second = await two_replicas(w)
        live = await listen(first, await w.request(first, "More", "t2"))
        request = pb.ReadTurnsRequest(tenant=TENANT)
        request.request.session_id = SESSION
        request.request.include_token_ids = True
        told = (await second.app.read_turns(request)).transcript
        one, two = told.turns
        assert [m.content for m in one.input] == ["Be brief.", "Hello"]
        assert [m.content for m in two.input] == ["More"]
        assert two.output_text == live.text
        assert two.usage == live.finished.usage
        assert list(one.token_ids) + list(two.token_ids) == await w.ledger()
        assert told.next_turn_index == 0
        request.request.max_turns = 1
        assert (await second.app.read_turns(request)).transcript.next_turn_index == 1
        request.request.from_turn_index = 1
        assert (await second.app.read_turns(request)).transcript.next_turn_index == 0
        request.tenant = "other"
        with pytest.raises(errors.NotFound):
            await second.app.read_turns(request)


@in_virtual_time
async def test_the_heartbeat_tells_which_leading_messages_are_resident() -> None:
    async with world() as w:
        first = await w.start("r1")
        await w.open("ses_bbbbbbbbbbbbbbbb", leading="Long instructions. " * 20)
        await w.give(first, "ses_bbbbbbbbbbbbbbbb")
        await listen(first, await w.request(first, session_id="ses_bbbbbbbbbbbbbbbb"))
        leading = first.app.load().leading
        assert set(leading) == {(b"L" * 16).hex()}
        assert 300 < leading[(b"L" * 16).hex()] <= 400


@in_virtual_time
async def test_known_leading_messages_are_not_rendered_by_themselves_again() -> None:
    async with world() as w:
        first = await w.start("r1")
        codec, rendered = first.app._ports.codec, list[int]()
        render = codec.render

        def counted(*args: Any) -> list[int]:
            rendered.append(len(args[1]))
            return render(*args)

        codec.render = counted  # type: ignore[method-assign, assignment]
        for name in ("ses_bbbbbbbbbbbbbbbb", "ses_cccccccccccccccc"):
            await w.open(name, leading="Long instructions. " * 20)
            await w.give(first, name)
            await listen(first, await w.request(first, session_id=name))
        assert rendered == [2, 1, 2]
        assert first.app.load().leading
