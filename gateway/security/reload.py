"""Files that are read again when they change, so that nothing has to be restarted for it."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")

CHECK_INTERVAL_S = 0.5
"""The files are looked at no oftener than this, and only when somebody asks."""
MAX_FILE_BYTES = 1 << 20
"""Certificates, keys, key sets: a larger file is a mistake."""

_Signature = tuple[tuple[int, int, int], ...]


class Reloaded(Generic[T]):
    """What ``load`` makes of some files. :meth:`current` looks whether they changed; what cannot be
    read or used then is logged once and the last good value stays, so that a file half written, or
    a certificate whose key has not come yet, stops nobody. Safe in any thread: gRPC asks from its
    own.

    Raises what ``load`` does for the first time."""

    def __init__(
        self,
        paths: Sequence[Path],
        load: Callable[[], T],
        *,
        check_interval_s: float = CHECK_INTERVAL_S,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._paths = tuple(paths)
        self._load = load
        self._interval_s = check_interval_s
        self._now = now
        self._lock = threading.Lock()
        self._seen = self._signature()
        self._value = load()
        self._look_at = now() + check_interval_s
        self.generation = 0
        """How often a new value was taken."""

    def current(self) -> T:
        """The value of the files as they are, or as they last could be used."""
        with self._lock:
            now = self._now()
            if now >= self._look_at:
                self._look_at = now + self._interval_s
                self._reload()
            return self._value

    def _reload(self) -> None:
        names = ", ".join(map(str, self._paths))
        try:
            signature = self._signature()
        except OSError as error:
            if self._seen != ():
                log.warning("%s: cannot be read, what it was stays in use: %s", names, error)
            self._seen = ()
            return
        if signature == self._seen:
            return
        self._seen = signature
        try:
            self._value = self._load()
        except (OSError, ValueError) as error:
            log.warning("%s: cannot be used, what it was stays in use: %s", names, error)
        else:
            self.generation += 1
            log.info("%s: read again", names)

    def _signature(self) -> _Signature:
        found = (os.stat(path) for path in self._paths)
        return tuple((stat.st_mtime_ns, stat.st_size, stat.st_ino) for stat in found)


def read(path: Path) -> bytes:
    """A file's content. Raises OSError, ValueError if it is too large."""
    with path.open("rb") as file:
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"{path} has more than {MAX_FILE_BYTES} bytes")
    return content
