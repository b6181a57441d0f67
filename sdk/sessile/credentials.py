"""What a client shows to a gateway, and by what it knows the gateway.

``SESSILE_API_KEY`` and ``SESSILE_TLS`` (``1`` for the system's authorities, or a file of
certificates) stand in for arguments that are not given.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import grpc

from sessile.errors import InvalidRequest

log = logging.getLogger("sessile")

API_KEY_VARIABLE = "SESSILE_API_KEY"
TLS_VARIABLE = "SESSILE_TLS"
AUTHORIZATION = "authorization"

Token = str | Callable[[], str]
"""A token, or what gives one for each call. The latter must be quick: keep the token until it is
about to expire."""
Tls = bool | str | os.PathLike[str]
"""True: the system's authorities; a path: the PEM file of those that sign for the gateways."""

_LOCAL = ("127.", "localhost:", "[::1]:", "unix:")


def authorization(
    api_key: str | None, token: Token | None, environment: Mapping[str, str] = os.environ
) -> Callable[[], tuple[tuple[str, str], ...]]:
    """Gives the metadata of a call that says who calls. Raises InvalidRequest, which does not
    repeat what was given."""
    if api_key is not None and token is not None:
        raise _invalid("api_key and token are both given.", "Give one of them.")
    if api_key is None and token is None:
        api_key = environment.get(API_KEY_VARIABLE) or None
    secret = api_key if api_key is not None else token
    if secret is None:
        return lambda: ()
    if isinstance(secret, str):
        fixed = _header(secret)
        return lambda: fixed
    source = secret
    return lambda: _header(source())


def channel_credentials(
    tls: Tls | None,
    credentials: grpc.ChannelCredentials | None,
    environment: Mapping[str, str] = os.environ,
) -> grpc.ChannelCredentials | None:
    """For the connections; None: without TLS. Raises InvalidRequest for a file that cannot be
    read."""
    if credentials is not None:
        if tls is not None:
            raise _invalid("tls and credentials are both given.", "Give one of them.")
        return credentials
    if tls is None:
        named = environment.get(TLS_VARIABLE, "")
        tls = {"": False, "0": False, "1": True}.get(named, named)
    if tls is False:
        return None
    if tls is True:
        return grpc.ssl_channel_credentials()
    try:
        return grpc.ssl_channel_credentials(Path(tls).read_bytes())
    except OSError as error:
        raise _invalid(
            f"the certificates of the gateways' authority cannot be read: {error}.",
            "Give the path of a PEM file, or True for the system's authorities.",
        ) from error


def warn_if_overheard(targets: Sequence[str], *, secret: bool, encrypted: bool) -> None:
    """A secret that others on the network can read is worth a word."""
    if secret and not encrypted:
        far = [target for target in targets if not target.startswith(_LOCAL)]
        if far:
            log.warning("an API key or token goes to %s without TLS; set tls", ", ".join(far))


def _header(secret: object) -> tuple[tuple[str, str], ...]:
    text = secret.strip() if isinstance(secret, str) else ""
    if not text or not text.isascii() or not text.isprintable() or " " in text:
        raise _invalid(
            "the API key or token is not one word of ASCII.", "Give it as it was issued."
        )
    return ((AUTHORIZATION, f"Bearer {text}"),)


def _invalid(message: str, hint: str) -> InvalidRequest:
    return InvalidRequest(message, reason="INVALID_REQUEST", hint=hint)
