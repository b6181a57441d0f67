"""What failures of the redis library, errors of a server and its INFO mean to the store's users."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Iterator
from typing import Any, Protocol

from redis import exceptions as errors

from statestore.ports import StoreCorrupt, StoreError, StoreMisconfigured, StoreUnavailable

log = logging.getLogger(__name__)

OLDEST_VERSION = 7

# TimeoutError of the standard library is an OSError.
FAILURES = (errors.RedisError, errors.RedisClusterException, OSError, RuntimeError)
"""What clients raise. RuntimeError: see :func:`failure`."""

# Conditions of a server that pass, or that an operator ends while callers repeat.
_TRANSIENT = ("BUSY", "LOADING", "CLUSTERDOWN", "MASTERDOWN", "NOREPLICAS", "MISCONF", "OOM")


class _Client(Protocol):
    async def aclose(self) -> None: ...


async def close_all(*clients: _Client) -> None:
    """Closes every one. That a connection does not close in order (TLS waits for the peer's word)
    is no failure of what was done over it."""
    for client in clients:
        try:
            await client.aclose()
        except FAILURES as error:
            log.info("a connection to the store was dropped, not closed: %s", error)


class ScriptUnknown(StoreUnavailable):
    """The server does not know the script yet (or forgot it in a restart)."""


def no_answer(timeout_s: float) -> StoreUnavailable:
    """The time limit of one attempt passed."""
    return StoreUnavailable(f"the store did not answer within {timeout_s:.3g} s")


def failure(error: BaseException, script: str = "") -> StoreError:
    """The meaning of a failure of the client or an error of the server. Raises what is neither."""
    if isinstance(error.__cause__, errors.AuthenticationError | errors.NoPermissionError):
        error = error.__cause__  # the client says ConnectionError
    match error:
        case StoreError():
            return error
        # So says uvloop of a write to a connection that was reset a moment before.
        case RuntimeError() if "handler is closed" not in str(error):
            raise error
        case errors.NoScriptError():
            return ScriptUnknown("the store does not know a script")
        case errors.AuthenticationError() | errors.AuthorizationError():
            return StoreMisconfigured(
                f"the store refuses the credentials: {error}; give those of a user that it has (in"
                " the URL, or username with password or password_file)"
            )
        case errors.ResponseError() if _lacks_permission(error):
            return StoreMisconfigured(
                f"the store's user lacks a permission{_of(script)}: {error}; deploy/redis/users.acl"
                " has what Sessile's users need"
            )
        case errors.ReadOnlyError() | errors.OutOfMemoryError():
            return StoreUnavailable(f"the store cannot write now: {error}")
        case errors.AskError() | errors.MovedError():
            return StoreUnavailable(f"a slot of the cluster is moving: {error}")
        case errors.ClusterError() | errors.TryAgainError() | errors.RedisClusterException():
            return StoreUnavailable(f"the cluster cannot serve this now: {error}")
        case errors.ResponseError() if not str(error).startswith(_TRANSIENT):
            return StoreCorrupt(f"script {script or '?'} failed: {error}")
        case _:
            return StoreUnavailable(f"no answer from the store: {error}")


def failure_to_connect(error: BaseException, *, tls: bool = False) -> StoreError:
    """The same for a first connection: what no waiting will change is a misconfiguration."""
    for cause in _causes(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            return StoreMisconfigured(
                f"the store's certificate is not trusted: {cause.verify_message}; tls_ca has to be"
                " the CA that signed it, and the certificate has to name the host as it is called"
            )
        if isinstance(cause, ssl.SSLError) and not isinstance(
            cause, ssl.SSLEOFError | ssl.SSLZeroReturnError
        ):
            return StoreMisconfigured(
                f"the store and this process do not agree on TLS: {cause.reason or cause}; if it"
                " asks for a client certificate, set tls_certificate and tls_key to one that its CA"
                " signed; if it has no TLS, its URL begins with redis"
            )
    if isinstance(error, errors.ResponseError) and "cluster support disabled" in str(error):
        return StoreMisconfigured("the store is no Cluster: leave +cluster out of its URL")
    meaning = failure(error)
    if tls and any(isinstance(cause, ConnectionResetError) for cause in _causes(error)):
        return StoreUnavailable(
            f"{meaning} (so does a server that asks for a client certificate and is shown none, or"
            " one that its CA did not sign: tls_certificate, tls_key)"
        )
    return meaning


def check_info(info: dict[str, Any]) -> None:
    """Refuses a server whose INFO says that it would lose data silently."""
    version = str(info.get("redis_version", "0"))
    if int(version.partition(".")[0]) < OLDEST_VERSION:
        raise StoreMisconfigured(
            f"the store is version {version}: use Redis {OLDEST_VERSION} or newer, or Valkey"
        )
    if info.get("redis_mode") == "sentinel":
        raise StoreMisconfigured(
            "this is a Sentinel, no store: its URL is redis+sentinel://host:port/service"
        )
    check_policy(info)


def check_policy(info: dict[str, Any]) -> None:
    """Refuses a server that may evict keys."""
    policy = info.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        raise StoreMisconfigured(
            f"the store's maxmemory-policy is {policy}, which drops sessions when memory is short:"
            " set it with CONFIG SET maxmemory-policy noeviction, and in the server's configuration"
        )


def tell_doubts(info: dict[str, Any], wait_replicas: int, where: str = "") -> None:
    """Logs :func:`doubts`."""
    for doubt in doubts(info, wait_replicas):
        log.warning("%s%s", doubt, where)


def doubts(info: dict[str, Any], wait_replicas: int) -> Iterator[str]:
    """What an operator should know of a server that works, by its INFO."""
    replicas = int(info.get("connected_slaves", 0))
    if not int(info.get("aof_enabled", 0)) and not replicas:
        yield (
            "the store has neither an append-only file nor replicas: acknowledged tokens end with"
            " this server (set appendonly yes, or add replicas)"
        )
    if replicas < wait_replicas:
        yield (
            f"the store has {replicas} replicas now and wait_replicas is {wait_replicas}: turns"
            " wait until there are so many"
        )


def _lacks_permission(error: errors.ResponseError) -> bool:
    """NOPERM; a command inside a script is refused in other words (of Redis 7.0, and later)."""
    inside = ("The user executing the script can't", "ACL failure in script")
    return isinstance(error, errors.NoPermissionError) or any(text in str(error) for text in inside)


def _of(script: str) -> str:
    return f" for script {script}" if script else ""


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was raised from or while handling."""
    cause: BaseException | None = error
    for _ in range(8):
        if cause is None:
            return
        yield cause
        cause = cause.__cause__ or cause.__context__
