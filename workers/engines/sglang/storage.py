"""sglang's side of the pages in host memory: loaded by its scheduler processes as a HiCache storage
(``--hicache-storage-backend dynamic``).

sglang writes every page of its prefix cache here as soon as it is full (write-through) and asks
here for what its own cache lacks. The pages are in a file that is mapped by this process and by the
worker; which page is where, the worker knows. Whatever goes wrong here is a miss, and is logged:
a request is then computed.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import socket
import threading
from typing import Any, NoReturn

import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheStorage, HiCacheStorageConfig, PoolName
from sglang.srt.runtime_context import get_model

from workers.engines.sglang import page_wire

log = logging.getLogger(__name__)

MAX_KEYS = 512
"""Page keys in a question: sglang asks for all of a context's at once."""


class SessileStorage(HiCacheStorage):  # type: ignore[misc]
    """One rank's storage. Its ``extra_config`` names the worker's socket."""

    def __init__(self, storage_config: HiCacheStorageConfig, kwargs: dict[str, Any]) -> None:
        del kwargs
        self._config = storage_config
        self._socket_path = str(storage_config.extra_config["socket"])
        self._local = threading.local()
        self._connections: dict[socket.socket, None] = {}
        """Every thread's."""
        self._memory: memoryview | None = None

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """Called once, before anything else: now it is known how large a page is. Raises
        RuntimeError for pages that cannot be told from others by their keys, or be had as bytes;
        sglang does not start then, and the worker says why."""
        super().register_mem_pool_host(mem_pool_host)
        config = self._config
        for name in ("attn_cp_size", "dcp_size"):
            if getattr(config, name) > 1:
                self._refuse(f"with {name} over 1 the ranks have slices of every page")
        if config.dp_rank > 0:
            self._refuse("with attention data parallelism the ranks have different sessions' pages")
        try:
            page = mem_pool_host.get_dummy_flat_data_page()
            if page.nbytes == 0:
                raise ValueError("its pages are empty")  # an index of other pools
        except Exception as error:  # noqa: BLE001 - whatever the pool says of what it cannot do
            self._refuse(f"{type(mem_pool_host).__name__} has no pages as bytes ({error!r})")
        shards = 1 if config.is_mla_model else config.tp_size
        self._part_bytes = page.nbytes
        self._parts = shards * config.pp_size
        self._part = config.pp_rank * shards + (0 if config.is_mla_model else config.tp_rank)
        # The dtype that the bytes are meant in: all of the 8-bit ones are kept as uint8.
        dtype = f"{page.dtype} for {get_model().kv_cache_dtype}"
        tag = mem_pool_host.storage_format_tag
        layout = (
            f"{type(mem_pool_host).__name__} {mem_pool_host.layout} {tag} {dtype} "
            f"{tuple(page.shape)}"
        )
        answer = self._ask(
            {
                "op": "hello",
                "part_bytes": self._part_bytes,
                "parts": self._parts,
                "layout": layout,
                "device_pages": mem_pool_host.device_capacity_tokens // mem_pool_host.page_size,
            },
            page_wire.HELLO_TIMEOUT_S,
        )
        descriptor = page_wire.receive_file(self._local.connection)
        try:
            size = answer["pages"] * self._part_bytes * self._parts
            self._memory = memoryview(mmap.mmap(descriptor, size))
        finally:
            os.close(descriptor)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        """Called for every pool of the model, some of them late."""
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        if host_pool_name != PoolName.KV:
            self._refuse(f"this model keeps more than KV pages ({host_pool_name})")

    # -- what sglang calls, in threads of its own ---------------------------------------------

    def batch_exists(self, keys: list[str], extra_info: Any = None) -> int:
        del extra_info
        found = 0
        try:
            while found < len(keys):
                asked = keys[found : found + MAX_KEYS]
                there = int(self._ask({"op": "count", "keys": asked})["pages"])
                found += there
                if there < len(asked):
                    break
        except (OSError, ValueError, RuntimeError) as error:
            log.warning("the worker does not tell which pages it has: %s", error)
        return found

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
            answer = self._ask({"op": "allocate", "keys": keys, "part": self._part})
            for index, page in answer["pages"]:
                self._bytes(page).copy_(values[index].contiguous().view(torch.uint8).flatten())
            if answer["pages"]:
                self._ask({"op": "seal", "fill": answer["fill"], "part": self._part})
        except Exception as error:  # noqa: BLE001 - whatever it is, the pages are given back
            log.warning("pages could not be written for the worker: %s", error)
            self._hang_up()
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

    def close(self) -> None:
        """What other threads are asking meanwhile is a miss. Idempotent."""
        for connection in list(self._connections):
            self._connections.pop(connection, None)
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    # -- the worker ---------------------------------------------------------------------------

    def _bytes(self, page: int) -> torch.Tensor:
        """This rank's part of a page, in place."""
        assert self._memory is not None
        start = (page * self._parts + self._part) * self._part_bytes
        return torch.frombuffer(
            self._memory, dtype=torch.uint8, offset=start, count=self._part_bytes
        )

    def _refuse(self, reason: str) -> NoReturn:
        reason += ": Sessile cannot move it. Give storage=own"
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # it is in sglang's log, too
            self._ask({"op": "refuse", "reason": reason})
        raise RuntimeError(reason)

    def _ask(
        self, message: dict[str, Any], timeout_s: float = page_wire.ANSWER_TIMEOUT_S
    ) -> dict[str, Any]:
        """One question to the worker, on this thread's connection. Raises OSError, ValueError, or
        RuntimeError with what the worker finds wrong."""
        try:
            connection = getattr(self._local, "connection", None)
            if connection is None:
                connection = self._local.connection = socket.socket(socket.AF_UNIX)
                self._connections[connection] = None
                connection.settimeout(page_wire.ANSWER_TIMEOUT_S)
                connection.connect(self._socket_path)
            connection.settimeout(timeout_s)
            page_wire.send(connection, message)
            answer = page_wire.receive(connection)
            if answer is None:
                raise ConnectionError("the worker has closed the connection")
        except (OSError, ValueError):
            self._hang_up()  # what was asked may still be answered there
            raise
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def _hang_up(self) -> None:
        """Ends this thread's connection, and with it whatever is open for it at the worker."""
        connection, self._local.connection = getattr(self._local, "connection", None), None
        if connection is not None:
            self._connections.pop(connection, None)
            connection.close()
