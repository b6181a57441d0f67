"""sglang's side of the pages against a real desk; of sglang itself only the base is a fake."""

from __future__ import annotations

import enum
import importlib
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, TypeVar

import anyio
import pytest
import torch

from tests.unit.test_sglang_pages import PAGES, SIZE, hash_pages, until
from workers.engines.sglang.host_pages import HostPages
from workers.engines.sglang.keys import ContextNames, PageNames
from workers.engines.sglang.page_desk import PageDesk, PageFormat
from workers.kv.prefix_cache import PrefixCache

pytestmark = pytest.mark.anyio

T = TypeVar("T")
FLOATS = 24
MODULE = "workers.engines.sglang.storage"


class Base:
    """``HiCacheStorage``, as far as it is used."""

    def register_mem_pool_host(self, mem_pool_host: Any) -> None: ...
    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None: ...


class PoolName(enum.StrEnum):
    KV = "kv"
    MAMBA = "mamba"


@pytest.fixture
def storage_module(monkeypatch: pytest.MonkeyPatch) -> Any:
    modules: dict[str, dict[str, Any]] = {
        "sglang": {},
        "sglang.srt": {},
        "sglang.srt.mem_cache": {},
        "sglang.srt.mem_cache.hicache_storage": {
            "HiCacheStorage": Base,
            "HiCacheStorageConfig": SimpleNamespace,
            "PoolName": PoolName,
        },
        "sglang.srt.runtime_context": {
            "get_model": lambda: SimpleNamespace(kv_cache_dtype="fp8_e5m2")
        },
    }
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    yield importlib.import_module(MODULE)
    sys.modules.pop(MODULE, None)


class Pool:
    """A host pool of sglang's."""

    layout = "page_first"
    storage_format_tag: str | None = None
    page_size = SIZE
    device_capacity_tokens = SIZE * PAGES

    def __init__(self, floats: int = FLOATS) -> None:
        self.floats = floats

    def get_dummy_flat_data_page(self) -> torch.Tensor:
        return torch.zeros(self.floats)


class Server:
    """The worker's end."""

    def __init__(self, folder: Path) -> None:
        self.names = PageNames(1000)
        self.cache = PrefixCache(PAGES, lambda: 0.0)
        self.formats: list[PageFormat] = []
        self.ranks: list[Any] = []
        self._folder = folder
        self.desk = PageDesk(folder / "socket", self._equip)

    def _equip(self, pages: PageFormat) -> HostPages:
        self.formats.append(pages)
        self.memory = HostPages(self._folder, PAGES, pages.page_bytes)
        return self.memory

    def context(self, pages: int) -> list[str]:
        tokens = list(range(pages * SIZE))
        context = ContextNames(
            self.names, hash_pages, kv_fingerprint=b"", namespace=b"", seed=None, page_size=SIZE
        )
        context.extend(tokens)
        return hash_pages(tokens, None, SIZE)


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    server = Server(tmp_path)
    yield server
    for storage in server.ranks:
        storage.close()
    server.desk.close()
    server.cache.check_integrity(server.desk.holders())


def config(server: Server, **changes: Any) -> SimpleNamespace:
    values = {
        "tp_rank": 0,
        "tp_size": 1,
        "pp_rank": 0,
        "pp_size": 1,
        "attn_cp_size": 1,
        "dcp_size": 1,
        "dp_rank": 0,
        "is_mla_model": False,
        "extra_config": {"socket": str(server.desk.path)},
    }
    return SimpleNamespace(**values | changes)


async def off_loop(work: Callable[..., T], *arguments: Any) -> T:
    return await anyio.to_thread.run_sync(work, *arguments)


async def rank(module: Any, server: Server, pool: Any = None, **changes: Any) -> Any:
    storage = module.SessileStorage(config(server, **changes), {})
    server.ranks.append(storage)
    await off_loop(storage.register_mem_pool_host, pool or Pool())
    return storage


def values(keys: list[str], first: float = 1.0) -> list[torch.Tensor]:
    return [torch.full((FLOATS,), first + index) for index, _ in enumerate(keys)]


async def test_what_is_written_can_be_read(storage_module: Any, server: Server) -> None:
    storage = await rank(storage_module, server)
    server.desk.open(server.cache, server.names)
    keys = server.context(3)
    assert await off_loop(storage.batch_exists, keys) == 0
    assert await off_loop(storage.batch_set, keys, values(keys))
    assert await off_loop(storage.batch_exists, keys) == 3
    pages = [torch.zeros(FLOATS) for _ in keys]
    found = await off_loop(storage.batch_get, [*keys, "unknown"], [*pages, torch.zeros(FLOATS)])
    assert found[3] is None
    for page, wanted in zip(found, values(keys), strict=False):
        assert torch.equal(page, wanted)
    assert server.cache.free_pages == PAGES


async def test_ranks_write_parts_of_a_page(storage_module: Any, server: Server) -> None:
    ranks = [await rank(storage_module, server, tp_rank=n, tp_size=2) for n in range(2)]
    server.desk.open(server.cache, server.names)
    keys = server.context(4)
    for n, storage in enumerate(ranks):
        for batch in (keys[:2], keys[2:]):  # the first is a batch ahead
            assert await off_loop(storage.batch_set, batch, values(batch, 10.0 * n))
    assert await off_loop(ranks[0].batch_exists, keys) == 4
    page = (await off_loop(ranks[1].batch_get, keys[:1], [torch.zeros(FLOATS)]))[0]
    assert torch.equal(page, values(keys, 10.0)[0])
    assert server.formats[0].page_bytes == 2 * 4 * FLOATS


async def test_the_ranks_of_an_mla_model_share_a_part(storage_module: Any, server: Server) -> None:
    for n in range(2):
        await rank(storage_module, server, tp_rank=n, tp_size=2, is_mla_model=True)
    assert [pages.page_bytes for pages in server.formats] == [4 * FLOATS]


async def test_the_layout_tells_apart_what_has_the_same_size(
    storage_module: Any, server: Server
) -> None:
    pool = Pool()
    pool.storage_format_tag = "interleaved"
    await rank(storage_module, server, pool)
    (pages,) = server.formats
    for part in ("Pool", "page_first", "interleaved", "float32", "fp8_e5m2", str((FLOATS,))):
        assert part in pages.layout
    assert pages.device_pages == PAGES


async def test_a_write_that_fails_gives_its_pages_back(storage_module: Any, server: Server) -> None:
    storage = await rank(storage_module, server)
    server.desk.open(server.cache, server.names)
    keys = server.context(2)
    assert not await off_loop(storage.batch_set, keys, [torch.zeros(FLOATS), torch.zeros(1)])
    await until(lambda: server.cache.free_pages == PAGES)
    assert await off_loop(storage.batch_set, keys, values(keys))
    assert await off_loop(storage.batch_exists, keys) == 2


async def test_a_context_of_any_length_is_looked_up(storage_module: Any, server: Server) -> None:
    storage = await rank(storage_module, server)
    server.desk.open(server.cache, server.names)
    keys = server.context(5)
    assert await off_loop(storage.batch_set, keys, values(keys))
    missing = [f"{n:064d}" for n in range(20_000)]
    assert await off_loop(storage.batch_exists, [*keys, *missing]) == 5
    storage_module.MAX_KEYS = 2
    assert await off_loop(storage.batch_exists, [*keys, *missing]) == 5
    assert await off_loop(storage.batch_exists, keys[:4]) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attn_cp_size": 2}, "attn_cp_size"),
        ({"dcp_size": 2}, "dcp_size"),
        ({"dp_rank": 1}, "data parallelism"),
    ],
)
async def test_ranks_that_have_slices_of_pages_are_refused(
    storage_module: Any, server: Server, changes: dict[str, int], message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        await rank(storage_module, server, **changes)
    assert server.formats == []
    assert server.desk.refusal is not None
    assert message in server.desk.refusal
    assert "storage=own" in server.desk.refusal


async def test_pools_that_have_no_pages_as_bytes_are_refused(
    storage_module: Any, server: Server
) -> None:
    class Unequal(Pool):
        def get_dummy_flat_data_page(self) -> torch.Tensor:
            raise NotImplementedError("K and V differ")

    for pool in (Unequal(), Pool(0), object()):
        with pytest.raises(RuntimeError, match="storage=own"):
            await rank(storage_module, server, pool)
    assert server.desk.refusal is not None
    assert "K and V differ" in server.desk.refusal


async def test_models_that_keep_more_than_pages_are_refused(
    storage_module: Any, server: Server
) -> None:
    storage = await rank(storage_module, server)
    await off_loop(storage.register_mem_host_pool_v2, Pool(), PoolName.KV)
    assert server.desk.refusal is None
    with pytest.raises(RuntimeError, match="more than KV pages"):
        await off_loop(storage.register_mem_host_pool_v2, Pool(), PoolName.MAMBA)
    assert server.desk.refusal is not None


async def test_stages_of_unequal_depth_are_refused(storage_module: Any, server: Server) -> None:
    await rank(storage_module, server, pp_rank=0, pp_size=2)
    with pytest.raises(RuntimeError, match="pp_size must divide the model's layers"):
        await rank(storage_module, server, Pool(FLOATS + 8), pp_rank=1, pp_size=2)


async def test_a_worker_that_is_gone_is_a_miss(storage_module: Any, server: Server) -> None:
    storage = await rank(storage_module, server)
    server.desk.open(server.cache, server.names)
    keys = server.context(1)
    server.desk.close()
    assert await off_loop(storage.batch_exists, keys) == 0
    assert await off_loop(storage.batch_get, keys, [torch.zeros(FLOATS)]) == [None]
    assert not await off_loop(storage.batch_set, keys, values(keys))


def descriptors() -> set[tuple[str, str]]:
    """(number, what it is) of all that this process has open. What other tests have left may be
    closed at any time, so look for what is new."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # that of the listing itself
            found.add((number, os.readlink(f"/proc/self/fd/{number}")))
    return found


async def test_a_rank_keeps_nothing_open_but_its_connections(
    storage_module: Any, server: Server
) -> None:
    before = descriptors()
    storage = await rank(storage_module, server)
    server.memory.close()
    # Both ends of a connection; and every mapping has a descriptor of its own.
    assert len(descriptors() - before) == 4
    storage.close()
    storage.close()
    await until(lambda: len(descriptors() - before) == 2)
