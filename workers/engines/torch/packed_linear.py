"""Linear layers with their weights laid out for oneDNN, once, instead of at every product.

A step multiplies few rows (the tokens of a batch) with large weights. There a plain product loses
much of its time to reading the weights in an order that does not suit its kernel: with packed
weights 4 to 16 rows take about two thirds of the time, and the output layer a third. The operators
are those that TorchInductor uses for frozen models; where they are missing the layers stay as they
are. Results do not depend on how many other rows there are (from 4 on), packed or not.
"""

from __future__ import annotations

import torch

PACKED_FOR_ROWS = 16
"""The layout is chosen for this many; it is also good for more."""
MIN_FEATURES = 512
"""Smaller layers gain nothing."""


class PackedLinear(torch.nn.Module):
    """Computes what ``linear`` did, in float32 on the CPU, without gradients."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        # An opaque tensor: neither a parameter nor a buffer, since nothing but the operator can
        # read it.
        self._weight = torch.ops.mkldnn._reorder_linear_weight(
            linear.weight.detach(), PACKED_FOR_ROWS
        )
        self._bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """``[…, in_features]`` to ``[…, out_features]``."""
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            rows, self._weight, self._bias, "none", [], ""
        )
        return result


def pack_linear_layers(model: torch.nn.Module) -> int:
    """Replaces the model's large linear layers (float32, on the CPU). Returns how many."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # a torch built without oneDNN
        return 0
    large = [
        (name, layer)
        for name, layer in model.named_modules()
        if type(layer) is torch.nn.Linear
        and min(layer.in_features, layer.out_features) >= MIN_FEATURES
    ]
    for name, layer in large:
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, PackedLinear(layer))
    return len(large)
