"""A fleet with TLS between all parts, keys and an audit log: what works, and who is kept out."""

from __future__ import annotations

import json
import logging
import socket
import ssl
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import grpc
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519
from grpc import aio
from jwt.algorithms import OKPAlgorithm
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from sessile import (
    NotFound,
    PermissionDenied,
    RetryPolicy,
    Sessile,
    Session,
    TurnStatus,
    Unauthenticated,
    Unavailable,
    sync,
)
from sessile.v1 import replica_pb2, replica_pb2_grpc

from gateway.config import GatewayConfig
from gateway.main import open_store
from gateway.security.config import JwtConfig, TlsConfig
from gateway.telemetry.setup import Telemetry
from statestore.connection import StoreConnection
from statestore.ports import StoreError
from tests.support.certificates import Authority, yesterday
from tests.support.secured_fleet import SecuredFleet, secured_fleet

pytestmark = pytest.mark.anyio
ONCE = RetryPolicy(max_attempts=1)
TURN_TOKENS = 2000
"""Of turns that last for some seconds."""


class Issuer:
    """Signs tokens, and publishes its key."""

    def __init__(self, path: Path) -> None:
        self._key = ed25519.Ed25519PrivateKey.generate()
        public = json.loads(OKPAlgorithm.to_jwk(self._key.public_key()))
        path.write_text(json.dumps({"keys": [{**public, "alg": "EdDSA", "use": "sig"}]}))
        self.config = JwtConfig(path, "https://id.example.com", "sessile")

    def token(self, key: Any = None, **more: Any) -> str:
        claims = {
            "iss": self.config.issuer,
            "aud": self.config.audience,
            "exp": int(time.time()) + 600,
            "tenant": "acme",
        }
        return jwt.encode({**claims, **more}, key or self._key, algorithm="EdDSA")

    def forged(self) -> str:
        return self.token(ed25519.Ed25519PrivateKey.generate())


def lines(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def replica_channel(endpoint: str, tls: TlsConfig | None, ca: bytes) -> aio.Channel:
    address = endpoint.removeprefix("tls://")
    if tls is None:
        return aio.secure_channel(address, grpc.ssl_channel_credentials(ca))
    credentials = grpc.ssl_channel_credentials(
        ca, tls.key.read_bytes(), tls.certificate.read_bytes()
    )
    return aio.secure_channel(address, credentials)


async def refused(channel: aio.Channel) -> str:
    stub = replica_pb2_grpc.ReplicaServiceStub(channel)
    with pytest.raises(aio.AioRpcError) as error:
        await stub.StopTurn(replica_pb2.StopTurnRequest(session_id="ses_a"), timeout=5)
    await channel.close()
    assert error.value.code() is grpc.StatusCode.UNAVAILABLE
    return str(error.value.details())


async def test_turns_run_and_sessions_move_and_operators_are_written_down(tmp_path: Path) -> None:
    async with secured_fleet(tmp_path, "r1", "r2") as fleet, fleet.client("agent") as agent:
        session = await agent.open(system="Be brief.")
        assert (await session.run("Hello", max_tokens=64).result()).text
        owner = (await session.refresh()).owner
        assert owner is not None
        target = "r2" if owner.replica_id == "r1" else "r1"
        with pytest.raises(PermissionDenied):
            await agent.fleet.migrate(session.session_id, target=target)
        async with fleet.client("operator") as operator:
            moved = await operator.fleet.migrate(session.session_id, target=target)
            assert moved.moved
            assert moved.bytes_copied > 0, "its pages went over the KV channel"
            with pytest.raises(NotFound):
                await operator.session(session.session_id).refresh()
        async with fleet.client("operator", tenant="acme") as acting:
            assert (await acting.session(session.session_id).refresh()).model
        assert (await session.run("More", max_tokens=16).result()).text
        written = lines(fleet.audit_file)
    who = fleet.keys["operator"][:11]
    assert {(line["who"], line["role"]) for line in written} == {(who, "operator")}
    assert [(line["action"], line["outcome"], line["target"]) for line in written] == [
        (f"sessile.v1.{call}", outcome, {"session_id": session.session_id, **more})
        for call, more in (
            ("FleetService.MigrateSession", {"target_replica_id": target}),
            ("SessionService.GetSession", {}),
        )
        for outcome in ("BEGUN", "OK")
    ]
    assert all(str(line["peer"]).startswith("ipv4:127.0.0.1") for line in written)


async def test_who_has_no_key_or_no_tls_gets_nowhere(tmp_path: Path) -> None:
    async with secured_fleet(tmp_path, "r1") as fleet:
        ca = fleet.authority.certificate
        async with Sessile(fleet.address, tls=ca, retry=ONCE) as nobody:
            with pytest.raises(Unauthenticated):
                await nobody.open()
        async with Sessile(fleet.address, tls=ca, api_key="sk-x", retry=ONCE) as guess:
            with pytest.raises(Unauthenticated):
                await guess.open()
        async with Sessile(fleet.address, api_key=fleet.keys["agent"], retry=ONCE) as plain:
            with pytest.raises(Unavailable):
                await plain.open()
        foreign = Authority(tmp_path / "foreign").certificate
        async with Sessile(
            fleet.address, tls=foreign, api_key=fleet.keys["agent"], retry=ONCE
        ) as misled:
            with pytest.raises(Unavailable):
                await misled.open()
        async with fleet.client("agent", tenant="globex", retry=ONCE) as pretender:
            with pytest.raises(PermissionDenied):
                await pretender.open()

        def blocking() -> str:
            with sync.Sessile(fleet.address, tls=ca, api_key=fleet.keys["agent"]) as client:
                return client.open().session_id

        assert await anyio.to_thread.run_sync(blocking)


async def test_a_turn_outlives_the_key_that_began_it(tmp_path: Path) -> None:
    async with secured_fleet(tmp_path, "r1") as fleet:
        old = fleet.keys["agent"]
        fleet.add_key("new", "acme")
        async with (
            fleet.client("agent") as leaving,
            fleet.client("new") as staying,
            fleet.client("other") as other,
        ):
            session, stays = await leaving.open(), await _opened(staying)
            turn = session.run("Hello", max_tokens=TURN_TOKENS)
            undisturbed = (await other.open()).run("Hello", max_tokens=TURN_TOKENS)
            own = stays.run("Hello", max_tokens=TURN_TOKENS)
            watch, kept = session.watch(), stays.watch()
            for stream in (turn, undisturbed, own, watch, kept):
                await anext(stream)
            fleet.revoke(old)
            with anyio.fail_after(10):
                with pytest.raises(Unauthenticated, match="revoked") as ended:
                    await turn.result()
                assert ended.value.reason == "CREDENTIALS_ENDED"
                assert ended.value.hint
                with pytest.raises(Unauthenticated):
                    async for _ in watch:
                        pass
            begun = turn.position
            assert begun is not None
            again = staying.session(session.session_id).attach(turn.turn_id, resume_from=begun)
            results = [await one.result() for one in (again, own, undisturbed)]
            await kept.aclose()
            whole = await staying.session(session.session_id).attach(turn.turn_id).result()
        assert [result.reconnects for result in results] == [0, 0, 0]
        assert {result.usage.output_tokens for result in results} == {TURN_TOKENS}
        assert turn.text + results[0].text == whole.text


async def test_a_turn_outlives_the_tokens_that_it_is_read_with(tmp_path: Path) -> None:
    issuer = Issuer(tmp_path / "jwks.json")
    given: list[int] = []

    def token() -> str:
        given.append(int(time.time()) + 3)
        return issuer.token(exp=given[-1])

    async with secured_fleet(tmp_path, "r1") as fleet:
        await fleet.start_gateway(jwt=replace(issuer.config, leeway_s=0.0))
        ca = fleet.authority.certificate
        async with Sessile(fleet.address, tls=ca, token=token()) as fixed:
            session = await fixed.open()
            with pytest.raises(Unauthenticated, match="expired") as ended:
                await session.run("Hello", turn_id="t", max_tokens=3 * TURN_TOKENS).result()
            assert ended.value.reason == "CREDENTIALS_ENDED"
            assert given[0] <= time.time()
        async with Sessile(fleet.address, tls=ca, token=token) as renewing:
            session = renewing.session(session.session_id)
            # It has gone on without its reader, who was told well before its end.
            assert await session.cancel("t") is TurnStatus.CANCELLED
            result = await session.run("More", max_tokens=2 * TURN_TOKENS).result()
    assert result.usage.output_tokens == 2 * TURN_TOKENS
    assert result.reconnects >= 1


async def _opened(client: Sessile) -> Session:
    """As soon as the gateway has noticed the client's new key."""
    with anyio.fail_after(10):
        while True:
            try:
                return await client.open()
            except Unauthenticated:
                await anyio.sleep(0.05)


async def test_a_gateway_may_ask_its_callers_for_certificates(tmp_path: Path) -> None:
    async with secured_fleet(tmp_path, "r1") as fleet:
        certificate = fleet.authority.issue("listener")
        await fleet.start_gateway(tls=replace(certificate, require_client_certificate=True))
        foreign = Authority(tmp_path / "foreign").issue("stranger")

        async def opens(shown: TlsConfig | None) -> bool:
            ca, key = fleet.authority.pem, fleet.keys["agent"]
            pair = shown and (shown.key.read_bytes(), shown.certificate.read_bytes())
            credentials = grpc.ssl_channel_credentials(ca, *(pair or ()))
            async with Sessile(
                fleet.address, api_key=key, credentials=credentials, retry=ONCE
            ) as client:
                return bool((await client.open()).session_id)

        assert await opens(fleet.authority.issue("agent"))
        for shown in (None, foreign):
            with pytest.raises(Unavailable):
                await opens(shown)


async def test_callers_and_replicas_may_see_different_certificates(tmp_path: Path) -> None:
    """The listener's is signed by a public authority, that towards replicas by the fleet's own."""
    public = Authority(tmp_path / "public")
    async with secured_fleet(tmp_path, "r1") as fleet:
        await fleet.start_gateway(
            tls=replace(public.issue("listener"), ca=None), parts=fleet.authority.issue("inner")
        )
        async with Sessile(
            fleet.address, tls=public.certificate, api_key=fleet.keys["agent"]
        ) as client:
            session = await client.open()
            assert (await session.run("Hello", max_tokens=8).result()).text
        inside = fleet.authority.certificate
        async with Sessile(
            fleet.address, tls=inside, api_key=fleet.keys["agent"], retry=ONCE
        ) as misled:
            with pytest.raises(Unavailable):
                await misled.open()


async def test_replicas_hear_only_parts_of_the_fleet(tmp_path: Path) -> None:
    async with secured_fleet(tmp_path, "r1") as fleet, fleet.client("operator") as operator:
        (replica,) = await operator.fleet.replicas()
        assert replica.endpoint.startswith("tls://")
        ca, foreign = fleet.authority.pem, Authority(tmp_path / "foreign")
        await refused(aio.insecure_channel(replica.endpoint.removeprefix("tls://")))
        await refused(replica_channel(replica.endpoint, None, ca))
        await refused(replica_channel(replica.endpoint, foreign.issue("stranger"), ca))
        expired = fleet.authority.issue("expired", expires=yesterday())
        await refused(replica_channel(replica.endpoint, expired, ca))
        part = replica_channel(replica.endpoint, fleet.authority.issue("part"), ca)
        stub = replica_pb2_grpc.ReplicaServiceStub(part)
        assert not (await stub.StopTurn(replica_pb2.StopTurnRequest(session_id="ses_a"))).stopped
        await part.close()


async def test_certificates_are_renewed_without_a_restart(tmp_path: Path) -> None:
    async with secured_fleet(tmp_path, "r1", "r2") as fleet, fleet.client("agent") as agent:
        session = await agent.open()
        assert await session.run("Hello", max_tokens=8).result()
        before = fleet.authority.pem
        # Another authority takes over: every part first believes both, then shows the new one.
        renewed = Authority(tmp_path / "renewed")
        _believe_both(fleet, renewed)
        for name in ("gateway", "r1", "r2"):
            new = renewed.issue(name)
            (fleet.directory / "pki" / f"{name}.key").write_bytes(new.key.read_bytes())
            (fleet.directory / "pki" / f"{name}.crt").write_bytes(new.certificate.read_bytes())
        await _until_shown(renewed, fleet.address, *fleet.endpoints)
        async with Sessile(
            fleet.address, tls=renewed.certificate, api_key=fleet.keys["agent"]
        ) as later:
            again = later.session(session.session_id)
            await again.refresh()
            assert (await again.run("More", max_tokens=8).result()).text
        async with Sessile(
            fleet.address, tls=renewed.certificate, api_key=fleet.keys["operator"]
        ) as operator:
            replicas = await operator.fleet.replicas()
            assert {r.ref.replica_id for r in replicas} == {"r1", "r2"}
            owner = await _owner(session)
            other = "r2" if owner == "r1" else "r1"
            assert (await operator.fleet.migrate(session.session_id, target=other)).moved
            part = renewed.issue("part")
            endpoint = next(r.endpoint for r in replicas if r.ref.replica_id == owner)
            await refused(replica_channel(endpoint, part, before))


def _believe_both(fleet: SecuredFleet, renewed: Authority) -> None:
    fleet.authority.certificate.write_bytes(fleet.authority.pem + renewed.pem)


async def _until_shown(authority: Authority, *addresses: str) -> None:
    """Until every listener shows a certificate of this authority."""

    def shown(address: str) -> bool:
        host, _, port = address.removeprefix("tls://").rpartition(":")
        context = ssl.create_default_context(cafile=str(authority.certificate))
        try:
            with socket.create_connection((host, int(port)), 5) as plain:
                context.wrap_socket(plain, server_hostname=host).close()
        except ssl.SSLError:
            return False
        return True

    with anyio.fail_after(10):
        for address in addresses:
            while not await anyio.to_thread.run_sync(shown, address):  # noqa: ASYNC110
                await anyio.sleep(0.05)


async def _owner(session: object) -> str:
    owner = (await session.refresh()).owner  # type: ignore[attr-defined]
    return str(owner.replica_id)


async def test_no_secret_is_logged_traced_or_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    told: list[str] = []
    spans = InMemorySpanExporter()
    tracers = TracerProvider()
    tracers.add_span_processor(SimpleSpanProcessor(spans))
    async with secured_fleet(tmp_path, "r1", telemetry=Telemetry(tracers)) as fleet:
        issuer = Issuer(tmp_path / "jwks.json")
        await fleet.start_gateway(jwt=issuer.config)
        wrong = fleet.keys["agent"][:-4] + "AAAA"
        keys = (*fleet.keys.values(), wrong, "not a key at all")
        tokens = (issuer.token(), issuer.token(exp=1), issuer.token(aud="others"), issuer.forged())
        shown = [{"api_key": key} for key in keys] + [{"token": token} for token in tokens]
        for credentials in shown:
            for tenant in (None, "acme", "glob ex"):
                try:
                    async with Sessile(
                        fleet.address,
                        tls=fleet.authority.certificate,
                        tenant=tenant,
                        retry=ONCE,
                        **credentials,  # type: ignore[arg-type]
                    ) as client:
                        session = await client.open()
                        await session.run("Hello", max_tokens=4).result()
                        await client.fleet.migrate("ses_none")
                except Exception as error:  # noqa: BLE001 - all that callers are told
                    told.append(f"{error!r} {error}")
        audit = fleet.audit_file.read_text()
        kept = fleet.key_file.read_text()
        hashes = [line.split('"')[1] for line in kept.splitlines() if line.startswith("sha256")]
    assert len(told) > 5
    assert any("token is not accepted: it has expired" in text for text in told)
    secrets = [secret.split("-", 2)[2] for secret in (*fleet.keys.values(), wrong)]
    secrets += [part for token in tokens for part in token.split(".")[1:]]
    key_pem = (tmp_path / "pki" / "gateway.key").read_text().splitlines()[1]
    records = [f"{r.getMessage()} {r.__dict__}" for r in caplog.records]
    traced = [span.to_json() for span in spans.get_finished_spans()]
    assert any("sessile" in record for record in records)
    assert any("acme" in span or "ses_" in span for span in traced)
    for secret in (*secrets, *hashes, key_pem):
        for text in (*records, *told, *traced, audit):
            assert secret not in text


@pytest.mark.parametrize(
    "url",
    [
        "redis://sessile:hunter2@127.0.0.1:1/0",
        "rediss://:hunter2@127.0.0.1:1",
        "redis+cluster://sessile:hunter2@127.0.0.1:1",
        "redis+sentinel://sessile:hunter2@127.0.0.1:1/primary",
        "nonsense://sessile:hunter2@127.0.0.1:1",
        "redis://sessile:hunter2@127.0.0.1:none",
    ],
)
async def test_a_password_in_the_stores_url_is_never_said(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with pytest.raises((StoreError, ValueError)) as failed:  # noqa: PT012 - either may refuse it
        config = GatewayConfig(redis_url=url, redis=StoreConnection(wait_s=0.2))
        async with open_store(config):
            pytest.fail("there is no store")
    chain: BaseException | None = failed.value
    while chain is not None:
        assert "hunter2" not in f"{chain!r} {chain}"
        chain = chain.__cause__ or chain.__context__
    assert "hunter2" not in caplog.text


async def test_tenants_share_the_public_prefix_of_their_sessions_and_no_more(
    tmp_path: Path,
) -> None:
    system = "You are a careful assistant. " * 40
    file = tmp_path / "prefixes.toml"
    _write(file, f"[[prefixes]]\nmessages = [{{role = 'system', content = '{system}'}}]\n")

    async def cached(fleet: SecuredFleet, name: str, system: str) -> int:
        async with fleet.client(name) as client:
            session = await client.open(system=system)
            result = await session.run("the same long question " * 40, max_tokens=4).result()
            return result.usage.cached_tokens

    async with secured_fleet(tmp_path, "r1", public_prefixes=file) as fleet:
        assert await cached(fleet, "agent", system) == 0
        shared = await cached(fleet, "other", system)
        assert 0.9 * len(system) < shared < 1.1 * len(system), "a token is about a byte"
        assert await cached(fleet, "other", system) > shared + 500
        assert await cached(fleet, "agent", "No " + system) == 0
        assert await cached(fleet, "other", "No " + system) < 20


def _write(file: Path, text: str) -> None:
    file.write_text(text)
