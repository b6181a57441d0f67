"""Scripts on a Cluster: to the node that serves their slot, and after a slot that moves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import anyio
from redis import exceptions as errors
from redis.asyncio import RedisCluster
from redis.asyncio.cluster import ClusterNode

from statestore import keys
from statestore.eviction import EvictionWatch
from statestore.executor import Reply, ScriptCall
from statestore.ports import StoreError, StoreUnavailable
from statestore.redis_failures import (
    FAILURES,
    ScriptUnknown,
    check_info,
    close_all,
    failure,
    no_answer,
    tell_doubts,
)
from statestore.redis_pipelines import NO_REPLICAS, ReplicaWait, add_calls, meanings

MAX_HOPS = 6
"""Of one call in one attempt (a redirection, a script to be loaded); then it is repeated later."""
FENCE_TRIES = 4096
"""Names that are tried for a key in one of a node's own slots, before one of the call's own is."""


@dataclass(frozen=True, slots=True)
class _Hop:
    """Calls (by index) for one node."""

    node: ClusterNode
    indices: list[int]
    load: bool = False
    """Send the scripts' source: the node does not know them."""
    asking: bool = False
    """The slot is still moving to this node."""


class ClusterExecutor:
    """A Cluster. Calls are grouped by the node that serves their slot, so that a node which does
    not answer fails its own calls only. Owns the client."""

    def __init__(self, client: RedisCluster, wait: ReplicaWait = NO_REPLICAS) -> None:
        self._client = client
        self._wait = wait
        self._eviction = EvictionWatch()
        self._topology_doubtful = False
        self._fences: dict[str, str] = {}
        """Node -> a key in one of its slots."""

    async def execute(
        self, calls: Sequence[ScriptCall], timeout_s: float
    ) -> list[Reply | StoreError]:
        results: list[Reply | StoreError] = [no_answer(timeout_s)] * len(calls)
        with anyio.move_on_after(timeout_s):
            try:
                await self._look()
                hops = self._hops(calls, range(len(calls)))
            except FAILURES as error:
                self._topology_doubtful = True
                return [failure(error)] * len(calls)
            async with anyio.create_task_group() as tasks:
                for hop in hops:
                    tasks.start_soon(self._follow, hop, calls, results)
        if any(isinstance(result, StoreUnavailable) for result in results):
            self._topology_doubtful = True
        return results

    async def _look(self) -> None:
        """Who serves which slot, if that is not known or in doubt."""
        await self._client.initialize()
        if self._topology_doubtful:
            self._fences.clear()
            await self._client.nodes_manager.initialize()
            self._topology_doubtful = False

    def _hops(
        self, calls: Sequence[ScriptCall], indices: Sequence[int], *, load: bool = False
    ) -> list[_Hop]:
        hops: dict[str, _Hop] = {}
        for i in indices:
            node = self._client.nodes_manager.get_node_from_slot(
                self._client.keyslot(calls[i].keys[0])
            )
            hops.setdefault(node.name, _Hop(node, [], load)).indices.append(i)
        return list(hops.values())

    async def _follow(
        self, first: _Hop, calls: Sequence[ScriptCall], results: list[Reply | StoreError]
    ) -> None:
        """Writes the results of these calls, wherever their slots are."""
        pending = [first]
        for _ in range(MAX_HOPS):
            hop = pending.pop(0)
            replies = await self._run(hop, [calls[i] for i in hop.indices])
            moved: list[int] = []
            unknown: list[int] = []
            asked: dict[str, _Hop] = {}
            for i, reply in zip(hop.indices, replies, strict=True):
                if isinstance(reply, errors.MovedError):
                    await self._client.nodes_manager.move_slot(reply)
                    self._fences.pop(hop.node.name, None)
                    moved.append(i)
                elif isinstance(reply, errors.AskError):
                    there = self._client.nodes_manager.get_node(host=reply.host, port=reply.port)
                    if there is not None:  # else it is known after the next look
                        next_hop = _Hop(there, [], hop.load, asking=True)
                        asked.setdefault(there.name, next_hop).indices.append(i)
                elif isinstance(reply, ScriptUnknown) and not hop.load:
                    unknown.append(i)
                results[i] = failure(reply) if isinstance(reply, errors.AskError) else reply
            pending += self._hops(calls, moved, load=hop.load)
            pending += asked.values()
            if unknown:
                pending.append(_Hop(hop.node, unknown, load=True, asking=hop.asking))
            if not pending:
                return

    async def _run(
        self, hop: _Hop, calls: Sequence[ScriptCall]
    ) -> list[Reply | StoreError | errors.AskError]:
        """One pipeline on one connection of the node; redirections are among the replies."""
        pipeline: Any = self._client.pipeline()
        before = ("ASKING",) if hop.asking else ()
        add_calls(pipeline, calls, *before, load=hop.load, target_nodes=hop.node)
        looks = self._eviction.add(pipeline, hop.node.name, target_nodes=hop.node)
        if self._wait.replicas:
            fence = self._fence(hop, calls[0].keys[0])
            self._wait.add(pipeline, fence, *before, target_nodes=hop.node)
        try:
            replies = await pipeline.execute(raise_on_error=False, allow_redirections=False)
        except FAILURES as error:
            replies = [error]
        stride = 1 + len(before)
        own = replies[stride - 1 : stride * len(calls) : stride]
        lost = next((reply for reply in replies if _is_no_reply(reply)), None)
        if lost is not None:
            # Others may know who took the node's place: they are asked before it.
            self._client.nodes_manager.move_node_to_end_of_cached_nodes(hop.node.name)
            return [failure(lost)] * len(calls)
        if looks:
            self._eviction.look(replies[stride * len(calls) :], hop.node.name)
        redirected = {i: reply for i, reply in enumerate(own) if isinstance(reply, errors.AskError)}
        results: list[Any] = self._wait.settled(meanings(calls, own), replies)
        for i, reply in redirected.items():
            results[i] = reply
        return results

    def _fence(self, hop: _Hop, key: str) -> str:
        """A key in one of the node's own slots, else in that of ``key``."""
        own = keys.fence_key(keys.hash_tag(key))
        if hop.asking:
            return own
        name = hop.node.name
        if name not in self._fences:
            manager = self._client.nodes_manager
            self._fences[name] = next(
                (
                    fence
                    for fence in (keys.fence_key(str(i)) for i in range(FENCE_TRIES))
                    if manager.get_node_from_slot(self._client.keyslot(fence)).name == name
                ),
                own,
            )
        return self._fences[name]

    async def check(self) -> None:
        """Raises StoreError, or what the client raises."""
        await self._client.initialize()
        for node in self._client.get_primaries():
            info = await self._client.info(target_nodes=node)
            check_info(info)
            tell_doubts(info, self._wait.replicas, where=f" at {node.name}")

    async def aclose(self) -> None:
        await close_all(self._client)


def _is_no_reply(reply: object) -> bool:
    """A failure of the connection, after which nothing more came."""
    return isinstance(reply, FAILURES) and not isinstance(reply, errors.ResponseError)
