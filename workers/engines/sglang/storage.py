"""sglang's side of the pages in host memory: loaded by its scheduler processes as a HiCache storage
(``--hicache-storage-backend dynamic``).

sglang writes every page of its prefix cache here as soon as it is full (write-through) and asks
here for what its own cache lacks. The pages are in a file that is mapped by this process and by the
worker; which page is where, the worker knows. Whatever goes wrong here is a miss, and is logged:
a request is then computed.
"""

from __future__ import annotations

import logging
import mmap
import socket
import threading
from typing import Any

import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheStorage, HiCacheStorageConfig

from workers.engines.sglang import page_wire

log = logging.getLogger(__name__)


class SessileStorage(HiCacheStorage):  # type: ignore[misc]
    """One rank's storage. Its ``extra_config`` names the worker's socket."""

    def __init__(self, storage_config: HiCacheStorageConfig, kwargs: dict[str, Any]) -> None:
        del kwargs
        self._config = storage_config
        self._socket_path = str(storage_config.extra_config["socket"])
        self._local = threading.local()
        self._memory: memoryview | None = None

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """Called once, before anything else: now it is known how large a page is."""
        super().register_mem_pool_host(mem_pool_host)
        config = self._config
        page = mem_pool_host.get_dummy_flat_data_page()
        shards = 1 if config.is_mla_model else config.tp_size
        self._part_bytes = page.nbytes
        self._parts = shards * config.pp_size
        self._part = config.pp_rank * shards + (0 if config.is_mla_model else config.tp_rank)
        answer = self._ask(
            {
                "op": "hello",
                "part_bytes": self._part_bytes,
                "parts": self._parts,
                "layout": f"{mem_pool_host.layout} {page.dtype} {tuple(page.shape)}",
            }
        )
        page_bytes = self._part_bytes * self._parts
        with open(answer["path"], "r+b") as file:
            self._memory = memoryview(mmap.mmap(file.fileno(), answer["pages"] * page_bytes))

    # -- what sglang calls, in threads of its own ---------------------------------------------

    def batch_exists(self, keys: list[str], extra_info: Any = None) -> int:
        del extra_info
        try:
            return int(self._ask({"op": "count", "keys": keys})["pages"])
        except (OSError, ValueError, RuntimeError) as error:
            log.warning("the worker does not tell which pages it has: %s", error)
            return 0

    def batch_get(
        self, keys: list[str], target_locations: Any = None, target_sizes: Any = None
    ) -> list[torch.Tensor | None]:
        del target_sizes
        found: list[torch.Tensor | None] = [None] * len(keys)
        try:
            held = self._ask({"op": "hold", "keys": keys})
            try:
                for index, page in enumerate(held["pages"]):
                    target = target_locations[index]
                    target.view(torch.uint8).copy_(self._bytes(page))
                    found[index] = target
            finally:
                self._ask({"op": "release", "hold": held["hold"]})
        except (OSError, ValueError, RuntimeError) as error:
            log.warning("pages could not be read from the worker: %s", error)
        return found

    def batch_set(
        self,
        keys: list[str],
        values: Any = None,
        target_locations: Any = None,
        target_sizes: Any = None,
    ) -> bool:
        """What the worker has no room for, or has already, is passed over."""
        del target_locations, target_sizes
        try:
            answer = self._ask({"op": "allocate", "keys": keys})
            for index, page in answer["pages"]:
                self._bytes(page).copy_(values[index].contiguous().view(torch.uint8).flatten())
            if answer["pages"]:
                self._ask({"op": "seal", "fill": answer["fill"], "part": self._part})
        except (OSError, ValueError, RuntimeError) as error:
            log.warning("pages could not be written for the worker: %s", error)
            return False
        return True

    def get(
        self, key: str, target_location: Any = None, target_sizes: Any = None
    ) -> torch.Tensor | None:
        return self.batch_get([key], [target_location], [target_sizes])[0]

    def set(
        self,
        key: str,
        value: Any = None,
        target_location: Any = None,
        target_sizes: Any = None,
    ) -> bool:
        return self.batch_set([key], [value], [target_location], [target_sizes])

    def exists(self, key: str) -> bool:
        return self.batch_exists([key]) == 1

    # -- the worker ---------------------------------------------------------------------------

    def _bytes(self, page: int) -> torch.Tensor:
        """This rank's part of a page, in place."""
        assert self._memory is not None
        start = (page * self._parts + self._part) * self._part_bytes
        return torch.frombuffer(
            self._memory, dtype=torch.uint8, offset=start, count=self._part_bytes
        )

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """One question to the worker, on this thread's connection. Raises OSError, ValueError, or
        RuntimeError with what the worker finds wrong."""
        connection = getattr(self._local, "connection", None)
        try:
            if connection is None:
                connection = socket.socket(socket.AF_UNIX)
                connection.settimeout(page_wire.ANSWER_TIMEOUT_S)
                connection.connect(self._socket_path)
                self._local.connection = connection
            page_wire.send(connection, message)
            answer = page_wire.receive(connection)
            if answer is None:
                raise ConnectionError("the worker has closed the connection")
        except (OSError, ValueError):
            if connection is not None:
                connection.close()
            self._local.connection = None  # what was asked may still be answered there
            raise
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer
