"""PyPI's torchvision does not import beside a CPU build of torch: two operators have no schema.

This gives them one just before torchvision is first imported. A ``.pth`` file imports this when
Python starts, so nothing else is imported here.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

_kept: list[Any] = []
"""A library's operators go with it."""


class _BeforeTorchvision(MetaPathFinder):
    """Finds nothing itself."""

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                library.define(
                    f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                )
            _kept.append(library)
        return None


sys.meta_path.insert(0, _BeforeTorchvision())
