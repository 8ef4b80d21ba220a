"""A model's linear layers on a CPU, with weights laid out once as oneDNN multiplies them.

`torch.nn.Linear` keeps a weight as it was loaded, and lets the product rearrange it at every call; for the few rows of
an iteration that decodes, this takes longer than the product. Of the ways in which PyTorch multiplies weights laid out
beforehand, `torch.compile` needs a C++ compiler, and two others were measured (ms a layer, on two cores of a Zen 4):

    rows, layer               float32                                bfloat16
                              Linear   utils.mkldnn   here           Linear   utils.mkldnn   here
    1     3072 to 768         0.56     0.37           0.36           0.31     fails          0.13
    32    3072 to 768         2.23     1.55           1.00           0.63     fails          0.43
    1     768 to 50272        12.8     6.1            5.3            5.7      fails          2.8
    32    768 to 50272        42.6     20.3           13.8           12.3     fails          7.7
"""

from __future__ import annotations

import torch
from torch import nn


class PackedLinear(nn.Module):
    """`torch.nn.Linear` for inference, [..., in_features] to [..., out_features].

    Parameters
    ----------
    linear : Linear
        The layer that it stands for; its weight is copied into oneDNN's own layout, which cannot be read back.
    after : str
        "none", or "relu" to apply that as well, while the product is at hand.
    """

    def __init__(self, linear: nn.Linear, after: str = "none") -> None:
        super().__init__()
        self.after = after
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 32)  # laid out for about 32 rows
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x times the weight, plus the bias."""
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, self.after, [], "")


def pack_linears(model: nn.Module) -> str:
    """Put a `PackedLinear` in the place of each linear layer, if this PyTorch and this machine can.

    A weight's memory is given back as its copy is made. One that the model uses elsewhere too, as the embedding that is
    the output layer's weight as well, stays beside the copy.

    Returns
    -------
    str
        How linear layers are computed, and why, for the trace.
    """
    from transformers.models.opt.modeling_opt import OPTDecoderLayer

    parameter = next(model.parameters())
    if problem := _problem(parameter.device, parameter.dtype):
        return f"linear layers as PyTorch has them, since {problem}"
    for parent in list(model.modules()):
        if type(parent) is OPTDecoderLayer and type(parent.activation_fn) is nn.ReLU:
            parent.fc1, parent.activation_fn = PackedLinear(parent.fc1, "relu"), nn.Identity()
        for name, child in parent.named_children():
            if type(child) is nn.Linear:
                setattr(parent, name, PackedLinear(child))
    return "linear layers packed by oneDNN"


def _problem(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why they cannot be packed, or None; a layer is tried, since the operators are PyTorch's private ones."""
    if device.type != "cpu":
        return f"the device is no CPU but {device.type}"
    try:
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return "this processor has no products of bfloat16"
        with torch.inference_mode():
            PackedLinear(nn.Linear(8, 8, dtype=dtype))(torch.zeros(1, 8, dtype=dtype))
    except (AttributeError, RuntimeError) as error:
        return f"this PyTorch does not pack {str(dtype).removeprefix('torch.')} ({str(error).splitlines()[0]})"
    return None
