"""TLS to the store: what is refused at once and with the remedy, and what is read anew."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from statestore.connection import StoreConnection
from statestore.executor import Script, ScriptCall
from statestore.ports import StoreError, StoreMisconfigured, StoreUnavailable
from statestore.redis_executor import connect
from tests.support.servers import redis_binary
from tests.support.store_servers import Certificates, StoreServer

pytestmark = pytest.mark.anyio

ONE = ScriptCall(Script("one", "return 1"), ("k",), ())


@pytest.fixture(scope="module")
def server(certificates: Certificates) -> Iterator[StoreServer]:
    """Asks clients for a certificate."""
    with StoreServer(redis_binary(), certificates.options(clients=True), tls=True) as running:
        yield running


async def test_a_certificate_of_another_ca_is_refused(
    server: StoreServer, certificates: Certificates, tmp_path: Path
) -> None:
    other = Certificates.made(tmp_path)
    with pytest.raises(StoreMisconfigured, match="tls_ca has to be the CA"):
        await connect(server.url, replace(certificates.trusted, tls_ca=other.ca))
    with pytest.raises(StoreMisconfigured, match="tls_ca has to be the CA"):
        await connect(server.url, replace(certificates.trusted, tls_ca=None))


async def test_a_certificate_names_the_host_that_is_called(
    certificates: Certificates, tmp_path: Path
) -> None:
    other = Certificates.made(tmp_path, "elsewhere.example.org")
    with StoreServer(redis_binary(), other.options(), tls=True) as server:
        settings = StoreConnection(tls_ca=other.ca)
        with pytest.raises(StoreMisconfigured, match="name the host"):
            await connect(server.url, settings)
        executor = await connect(server.url, replace(settings, tls_check_hostname=False))
        await executor.aclose()


async def test_a_server_that_asks_for_a_certificate_gets_one(
    server: StoreServer, certificates: Certificates, tmp_path: Path
) -> None:
    """The alert that says so may be overtaken by the end of the connection."""
    other = Certificates.made(tmp_path)
    for wrong in (
        StoreConnection(tls_ca=certificates.ca),
        replace(other.trusted, tls_ca=certificates.ca),
    ):
        with pytest.raises(StoreError, match=r"tls_certificate(,| and) tls_key"):
            await connect(server.url, wrong)


async def test_tls_where_there_is_none_and_none_where_there_is(
    server: StoreServer, certificates: Certificates
) -> None:
    """Neither can be told from a server that hangs or is gone: both are waited for."""
    with pytest.raises(StoreUnavailable):
        await connect(server.url.replace("rediss", "redis"))
    with (
        StoreServer(redis_binary()) as plain,
        pytest.raises(StoreUnavailable, match=r"did not answer within 0\.2 s"),
    ):
        await connect(plain.url.replace("redis", "rediss"), certificates.trusted, timeout_s=0.2)


async def test_files_that_cannot_be_used_are_named(
    server: StoreServer, certificates: Certificates, tmp_path: Path
) -> None:
    other = Certificates.made(tmp_path)
    for wrong in (
        replace(certificates.trusted, tls_ca=tmp_path / "none.pem"),
        replace(certificates.trusted, tls_key=other.client_key),
        StoreConnection(tls_ca=certificates.ca, password_file=tmp_path / "none"),
    ):
        with pytest.raises(StoreMisconfigured, match=str(tmp_path)):
            await connect(server.url, wrong)


async def test_renewed_certificates_are_used_without_a_restart(tmp_path: Path) -> None:
    """Client and server get certificates of a new CA while the client runs."""
    old = Certificates.made(tmp_path)
    with StoreServer(redis_binary(), old.options(clients=True), tls=True) as server:
        executor = await connect(server.url, old.trusted)
        assert await executor.execute([ONE], 5) == [1]
        (tmp_path / "new").mkdir()
        new = Certificates.made(tmp_path / "new")
        for path in (tmp_path / "new").iterdir():
            shutil.copy(path, tmp_path)
        server.kill()
        server.start()
        (lost,) = await executor.execute([ONE], 5)
        assert isinstance(lost, StoreUnavailable)
        assert await executor.execute([ONE], 5) == [1]
        assert new.ca.read_bytes() == old.ca.read_bytes()
        await executor.aclose()
