"""API keys: made here, shown once, kept as hashes in a TOML file.

A key is ``sk-<id>-<secret>``; the id is no secret and names the key in lists and logs. Kept is the
SHA-256 of the whole key. A slow hash (argon2, bcrypt) protects what people choose, by making each
guess dear; a secret of 256 random bits cannot be guessed at any price, and every call would pay.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import os
import re
import secrets
import tomllib
from base64 import b32encode
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gateway.security.access import Role, checked_tenant
from gateway.security.reload import read

PREFIX = "sk-"
SECRET_BYTES = 32
MAX_KEYS = 4096
"""In one file."""
_KEY = re.compile(r"sk-([a-z2-7]{8})-[A-Za-z0-9_-]{43}")
_FIELDS = {"id", "sha256", "tenant", "role", "created", "expires", "note"}
HEADER = "# API keys of Sessile, as hashes: sessile keys create|list|revoke --file <this file>\n"


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What is kept of a key."""

    id: str
    sha256: str
    """Hex, of the whole key."""
    tenant: str
    role: Role
    created: datetime
    expires: datetime | None = None
    """None: only when it is revoked."""
    note: str = ""
    """For people."""

    def expired(self, now: datetime) -> bool:
        """Whether it is void at ``now``."""
        return self.expires is not None and now >= self.expires


def new_key(
    tenant: str, role: Role, now: datetime, expires: datetime | None = None, note: str = ""
) -> tuple[str, ApiKey]:
    """A new key (to be shown once, it is nowhere else) and what is kept of it."""
    key_id = b32encode(secrets.token_bytes(5)).decode().lower()
    key = f"{PREFIX}{key_id}-{secrets.token_urlsafe(SECRET_BYTES)}"
    return key, ApiKey(key_id, _digest(key), checked_tenant(tenant), role, now, expires, note)


class KeyRing:
    """The keys of a file, for looking them up."""

    def __init__(self, keys: Sequence[ApiKey]) -> None:
        self._keys: Mapping[str, ApiKey] = {key.id: key for key in keys}

    def find(self, presented: str, now: datetime) -> ApiKey | None:
        """The valid key that was presented. Takes as long for an unknown id as for a wrong
        secret."""
        match = _KEY.fullmatch(presented)
        if match is None:
            return None
        kept = self._keys.get(match[1])
        expected = kept.sha256 if kept is not None else "0" * 64
        right = hmac.compare_digest(_digest(presented), expected)
        return kept if right and kept is not None and not kept.expired(now) else None


def load_keys(path: Path) -> tuple[ApiKey, ...]:
    """Raises OSError, ValueError saying what is wrong (never with the value of a hash)."""
    try:
        content = tomllib.loads(read(path).decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no file of keys: {error}") from error
    tables = content.pop("keys", [])
    if content or not isinstance(tables, list) or len(tables) > MAX_KEYS:
        raise ValueError(f"{path} holds at most {MAX_KEYS} [[keys]] and nothing else")
    keys = tuple(_key(table, f"{path}, key {number}") for number, table in enumerate(tables, 1))
    if len({key.id for key in keys}) != len(keys):
        raise ValueError(f"{path} has two keys of one id")
    return keys


@contextmanager
def edited(path: Path) -> Iterator[list[ApiKey]]:
    """The file's keys as a list to change; written back at the end, whole and at once, readable by
    its owner only. A file that is not there is one without keys. Raises OSError, ValueError."""
    with Path(f"{path}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        keys = list(load_keys(path)) if path.exists() else []
        yield keys
        if len(keys) > MAX_KEYS:
            raise ValueError(f"{path} holds {MAX_KEYS} keys already: revoke some")
        new = Path(f"{path}.new")
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(HEADER + "".join(map(_toml, keys)))
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)


def _key(table: Any, where: str) -> ApiKey:
    if not isinstance(table, dict):
        raise ValueError(f"{where} is no table")
    if unknown := set(table) - _FIELDS:
        raise ValueError(f"{where}: unknown {', '.join(sorted(unknown))}")
    for name in ("id", "sha256", "tenant", "role"):
        if not isinstance(table.get(name), str):
            raise ValueError(f"{where}: {name} is missing or no text")
    for name in ("created", "expires"):
        moment = table.get(name)
        if not isinstance(moment, datetime) and (moment is not None or name == "created"):
            raise ValueError(f"{where}: {name} is no time, as in 2030-01-31T12:00:00Z")
        if isinstance(moment, datetime) and moment.tzinfo is None:
            raise ValueError(f"{where}: {name} must say its zone, as in 2030-01-31T12:00:00Z")
    if re.fullmatch(r"[0-9a-f]{64}", table["sha256"]) is None:
        raise ValueError(f"{where}: sha256 is not 64 hex digits (a key itself is never put here)")
    if table["role"] not in tuple(Role):
        raise ValueError(f"{where}: role is {' or '.join(Role)}")
    checked_tenant(table["tenant"])
    return ApiKey(**{**table, "role": Role(table["role"])})


def _toml(key: ApiKey) -> str:
    lines = {
        "id": json.dumps(key.id),
        "sha256": json.dumps(key.sha256),
        "tenant": json.dumps(key.tenant),
        "role": json.dumps(str(key.role)),
        "created": _moment(key.created),
    }
    if key.expires is not None:
        lines["expires"] = _moment(key.expires)
    if key.note:
        lines["note"] = json.dumps(key.note)
    return "\n[[keys]]\n" + "".join(f"{name} = {value}\n" for name, value in lines.items())


def _moment(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
