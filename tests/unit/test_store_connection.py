"""URLs of the store: taken apart, refused with the fix, and never shown with their secrets."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from statestore.connection import StoreAddress, StoreConnection, parse_address, redacted
from statestore.ports import StoreError
from statestore.redis_executor import connect, connect_when_there
from tests.support.servers import free_port

pytestmark = pytest.mark.anyio

PLAIN = StoreConnection()
CA = Path("ca.pem")


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://h", StoreAddress("server", (("h", 6379),), False, "", "")),
        ("redis://h:1/3", StoreAddress("server", (("h", 1),), False, "", "", db=3)),
        ("redis://[::1]:7/", StoreAddress("server", (("::1", 7),), False, "", "")),
        ("rediss://u:p%40%2F@h", StoreAddress("server", (("h", 6379),), True, "u", "p@/")),
        ("redis://:a/b?c@h", StoreAddress("server", (("h", 6379),), False, "", "a/b?c")),
        ("unix:///a/b%20c", StoreAddress("server", (), False, "", "", socket="/a/b c")),
        ("unix://:p@/a?db=2", StoreAddress("server", (), False, "", "p", socket="/a", db=2)),
        (
            "rediss+sentinel://u:p@a,b:2/main/1",
            StoreAddress("sentinel", (("a", 26379), ("b", 2)), True, "u", "p", "", "main", 1),
        ),
        (
            "redis+cluster://a:1,[::1]",
            StoreAddress("cluster", (("a", 1), ("::1", 6379)), False, "", ""),
        ),
    ],
)
def test_a_url_says_where_the_store_is(url: str, address: StoreAddress) -> None:
    assert parse_address(url, PLAIN) == address


SECRET = "geheim"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (f"http://u:{SECRET}@h", "begins with redis://"),
        (f"u:{SECRET}@h:1", "has no ://"),
        (f"unix+cluster://{SECRET}@/s", "reached by TCP"),
        (f"unix://u:{SECRET}@host/s", "absolute path"),
        (f"redis://u:{SECRET}@a,b", "has one host"),
        (f"redis://u:{SECRET}@h:port", "host:port"),
        (f"redis://u:{SECRET}@h:70000", "1 to 65535"),
        (f"redis://u:{SECRET}@h/x", "number of a database"),
        (f"redis+sentinel://u:{SECRET}@h", "names its service"),
        (f"redis+cluster://u:{SECRET}@h/1", "no databases"),
        (f"rediss://u:{SECRET}@h?ssl_ca_certs=x", "is a setting"),
    ],
)
def test_a_url_of_another_form_is_refused_without_its_secret(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        parse_address(url, PLAIN)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "settings", "message"),
    [
        ("redis://u@h", {"username": "v"}, "different users"),
        ("redis://u:p@h", {"password": "q"}, "give one"),
        ("redis://u:p@h", {"password_file": Path("f")}, "give one"),
        ("redis://h", {"tls_ca": CA}, "rediss"),
        ("unix:///s", {"tls_certificate": CA, "tls_key": CA}, "rediss"),
    ],
)
def test_settings_that_contradict_a_url_are_refused(
    url: str, settings: dict[str, Path | str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        parse_address(url, StoreConnection(**settings))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"password": "p", "password_file": Path("f")}, "one of them"),
        ({"tls_key": CA}, "belong together"),
        ({"wait_s": -1}, "for ever"),
        ({"wait_replicas": -1}, "negative"),
        ({"wait_timeout_ms": 0}, "1 to 900"),
        ({"wait_timeout_ms": 1000}, "1 to 900"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        StoreConnection(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://h:1/2", "redis://h:1/2"),
        ("redis://u:p@h:1", "redis://***@h:1"),
        ("rediss+sentinel://u:p@a,b/main", "rediss+sentinel://***@a,b/main"),
        ("unix://:p@/s", "unix://***@/s"),
        ("redis://u:p/q?r@s@h:1", "redis://***@h:1"),
    ],
)
def test_what_is_shown_of_a_url_has_no_credentials(url: str, shown: str) -> None:
    assert redacted(url) == shown


async def test_no_secret_is_logged_or_told_while_a_store_is_waited_for(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    settings = StoreConnection(wait_s=0, sentinel_password=SECRET)
    for url in (
        f"redis://u:{SECRET}@127.0.0.1:{free_port()}",
        f"redis+cluster://u:{SECRET}@127.0.0.1:{free_port()}",
        f"redis+sentinel://u:{SECRET}@127.0.0.1:{free_port()}/main",
    ):
        for attempt in (connect, connect_when_there):
            with pytest.raises(StoreError) as caught:
                await attempt(url, settings)
            assert SECRET not in str(caught.value)
    assert SECRET not in caplog.text
    assert SECRET not in repr(settings)
    assert SECRET not in repr(parse_address(f"redis://u:{SECRET}@h", PLAIN))
