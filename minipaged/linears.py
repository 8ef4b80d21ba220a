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

Around them OPT's decoder is reduced to its arithmetic: for a few rows, a call of PyTorch costs as much as its work.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from . import attention

if TYPE_CHECKING:
    from transformers.modeling_outputs import BaseModelOutputWithPast
    from transformers.models.opt.modeling_opt import OPTDecoder, OPTDecoderLayer

    from .attention import PagedBatch


class PackedLinear(nn.Module):
    """`torch.nn.Linear` for inference, [..., in_features] to [..., out_features].

    Parameters
    ----------
    linears : Linear
        The layer that it stands for, or several of one input, whose outputs come one behind the other. The weight is
        copied into oneDNN's own layout, which cannot be read back.
    after : str
        "none", or "relu" to apply that as well, while the product is at hand.
    """

    def __init__(self, *linears: nn.Linear, after: str = "none") -> None:
        super().__init__()
        self.after = after
        weight = torch.cat([linear.weight.detach() for linear in linears])
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, 32)  # laid out for about 32 rows
        biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
        self.bias = torch.cat(biases) if biases else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x times the weight, plus the bias."""
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, self.after, [], "")


class PackedDecoder(nn.Module):
    """Takes the place of transformers' `OPTDecoder`, which asks at each call about masks, caches and training.

    Parameters
    ----------
    decoder : OPTDecoder
        What it stands for; one that `fits`.
    """

    def __init__(self, decoder: "OPTDecoder") -> None:
        super().__init__()
        self.embed_tokens, self.embed_positions = decoder.embed_tokens, decoder.embed_positions
        self.layers = nn.ModuleList()
        for index, layer in enumerate(decoder.layers):
            self.layers.append(PackedLayer(layer))
            decoder.layers[index] = nn.Identity()  # its weights are given back
        self.final_layer_norm = decoder.final_layer_norm

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether a module is OPT's decoder with its norms before attention and ReLU, as in all sizes but 350M."""
        from transformers.models.opt.modeling_opt import OPTDecoder

        return type(module) is OPTDecoder and module.config.activation_function == "relu" and (
            module.project_in is None and module.final_layer_norm is not None)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, paged_batch: "PagedBatch",
                **_: object) -> "BaseModelOutputWithPast":
        """Token ids and positions [1, tokens] to hidden states [1, tokens, hidden]; the batch is the runner's."""
        from transformers.modeling_outputs import BaseModelOutputWithPast

        hidden_states = self.embed_tokens(input_ids) + self.embed_positions(None, position_ids=position_ids)
        for layer in self.layers:
            hidden_states = layer(hidden_states, paged_batch)
        return BaseModelOutputWithPast(self.final_layer_norm(hidden_states))


class PackedLayer(nn.Module):
    """A decoder layer: queries, keys and values are one product of three times the width, and ReLU is applied while its
    product is at hand.

    Parameters
    ----------
    layer : OPTDecoderLayer
        What it stands for.
    """

    def __init__(self, layer: "OPTDecoderLayer") -> None:
        super().__init__()
        of = layer.self_attn
        self.index, self.heads, self.scale = of.layer_idx, (of.num_heads, of.head_dim), of.scaling
        self.qkv = PackedLinear(of.q_proj, of.k_proj, of.v_proj)
        self.out = PackedLinear(of.out_proj)
        self.fc1, self.fc2 = PackedLinear(layer.fc1, after="relu"), PackedLinear(layer.fc2)
        self.norm1, self.norm2 = layer.self_attn_layer_norm, layer.final_layer_norm

    def forward(self, hidden_states: torch.Tensor, paged_batch: "PagedBatch") -> torch.Tensor:
        """[1, tokens, hidden] to the same shape."""
        query, key, value = self.qkv(self.norm1(hidden_states)).view(-1, 3, *self.heads).unbind(1)
        attended = attention.write_and_attend(self.index, query, key, value, paged_batch, self.scale)
        hidden_states = hidden_states + self.out(attended.view(hidden_states.shape))
        return hidden_states + self.fc2(self.fc1(self.norm2(hidden_states)))


def pack_linears(model: nn.Module) -> str:
    """Put a `PackedLinear` in the place of each linear layer, and a `PackedDecoder` in that of OPT's decoder, if this
    PyTorch and this machine can.

    A weight's memory is given back as its copy is made. One that the model uses elsewhere too, as the embedding that is
    the output layer's weight as well, stays beside the copy.

    Returns
    -------
    str
        How linear layers are computed, and why, for the trace.
    """
    parameter = next(model.parameters())
    if problem := _problem(parameter.device, parameter.dtype):
        return f"linear layers as PyTorch has them, since {problem}"
    _pack(model)
    return "linear layers packed by oneDNN"


def _pack(parent: nn.Module) -> None:
    for name, child in list(parent.named_children()):
        if type(child) is nn.Linear:
            setattr(parent, name, PackedLinear(child))
        elif PackedDecoder.fits(child):
            setattr(parent, name, PackedDecoder(child))
        else:
            _pack(child)


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
