"""What sglang's hierarchical cache lacks on the CPU, in torch, by sglang's own plug-in hooks."""

from __future__ import annotations

from typing import Any

import torch


def register() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(
        "sglang.srt.mem_cache.pool_host.base.HostKVCache.__init__", _unpinned, HookType.BEFORE
    )
    from sglang.srt.mem_cache.pool_host import mha

    mha.transfer_kv_direct = transfer_kv_direct


def _unpinned(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {**kwargs, "pin_memory": False}


def transfer_kv_direct(
    *,
    src_layers: list[torch.Tensor],
    dst_layers: list[torch.Tensor],
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    page_size: int,
) -> None:
    """Copies rows ``src_indices`` of every layer to rows ``dst_indices``."""
    del page_size
    for source, target in zip(src_layers, dst_layers, strict=True):
        target[dst_indices] = source[src_indices].to(target.device)
