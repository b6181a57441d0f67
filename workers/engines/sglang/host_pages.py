"""Pages in host memory that sglang's processes map too."""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from pathlib import Path


class HostPages:
    """A :class:`workers.kv.pages.PageMemory` of ``pages`` pages in a file system in memory. The
    file has no name, so nothing of it outlives the processes that have it: others map it by its
    :attr:`descriptor`, until :meth:`close`."""

    blocking = True

    def __init__(self, folder: Path, pages: int, page_bytes: int) -> None:
        """All of the memory is set aside now: a page that does not fit would end whoever first
        touches it with SIGBUS. Raises OSError if there is no room in ``folder``."""
        self.page_bytes = page_bytes
        self.pages = pages
        size = pages * page_bytes
        self.descriptor, name = tempfile.mkstemp(prefix="sessile-kv-", dir=folder)
        try:
            os.unlink(name)
            os.posix_fallocate(self.descriptor, 0, size)
            self._memory = memoryview(mmap.mmap(self.descriptor, size))
        except OSError as error:
            self.close()
            if error.errno not in (errno.ENOSPC, errno.ENOMEM):
                raise
            raise OSError(
                error.errno,
                f"{folder} has no room for {pages} KV pages ({size >> 20} MiB): make it larger "
                "(docker run --shm-size=…, in Kubernetes a volume of medium Memory), or lower "
                "host_memory_mb together with sglang's max_total_tokens",
            ) from error

    def read(self, page: int) -> memoryview:
        start = page * self.page_bytes
        return self._memory[start : start + self.page_bytes].toreadonly()

    def write(self, page: int, raw: memoryview) -> None:
        start = page * self.page_bytes
        self._memory[start : start + self.page_bytes] = raw

    def close(self) -> None:
        """Nobody can map the pages any more; who has them mapped keeps them. Idempotent."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


class NoPages:
    """Where sglang's own storage moves the KV, there are no pages here."""

    page_bytes = 1
    blocking = False

    def read(self, page: int) -> memoryview:
        raise ValueError(f"page {page}: KV is not kept here")

    def write(self, page: int, raw: memoryview) -> None:
        raise ValueError(f"page {page}: KV is not kept here")
