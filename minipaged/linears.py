"""A model's linear layers on a CPU, with weights laid out once as `minipaged.products` multiplies them.

Around them OPT's decoder is reduced to its arithmetic: for a few rows, a call of PyTorch costs as much as its work.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from . import attention
from .products import ADD, RELU, STORE, multiply, pack

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
        copied into panels, and the layer's own is not kept.
    relu : bool
        Apply that as well, while the product is at hand.
    """

    def __init__(self, *linears: nn.Linear, relu: bool = False) -> None:
        super().__init__()
        self.then = RELU if relu else STORE
        weight = torch.cat([linear.weight.detach() for linear in linears])
        self.packed, self.out_features = pack(weight), len(weight)
        # Rows that lie a multiple of 4 KiB apart share a few lines of the processor's cache and drive each other out; the
        # next product would wait for them. So each is followed by an unused line.
        self.row = self.out_features + (64 // weight.itemsize if self.out_features * weight.itemsize % 4096 == 0 else 0)
        biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
        self.bias = torch.cat(biases) if biases else None

    def forward(self, x: torch.Tensor, add_to: torch.Tensor | None = None) -> torch.Tensor:
        """x times the weight, plus the bias; added to a contiguous [..., out_features], in place, if one is given."""
        out = x.new_empty(*x.shape[:-1], self.row)[..., :self.out_features] if add_to is None else add_to
        rows = x.reshape(-1, x.shape[-1])
        multiply(rows if rows.stride(1) == 1 else rows.contiguous(), self.packed, self.bias, out.view(len(rows), -1),
                 self.then if add_to is None else ADD)
        return out


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
        self.fc1, self.fc2 = PackedLinear(layer.fc1, relu=True), PackedLinear(layer.fc2)
        self.norm1, self.norm2 = layer.self_attn_layer_norm, layer.final_layer_norm

    def forward(self, hidden_states: torch.Tensor, paged_batch: "PagedBatch") -> torch.Tensor:
        """[1, tokens, hidden] to the same tensor, in which the result takes the place of what was given."""
        query, key, value = self.qkv(self.norm1(hidden_states)).view(-1, 3, *self.heads).unbind(1)
        attended = attention.write_and_attend(self.index, query, key, value, paged_batch, self.scale)
        self.out(attended.view(hidden_states.shape), add_to=hidden_states)
        return self.fc2(self.fc1(self.norm2(hidden_states)), add_to=hidden_states)


def pack_linears(parent: nn.Module) -> None:
    """Put a `PackedLinear` in the place of each linear layer, and a `PackedDecoder` in that of OPT's decoder.

    A weight's memory is given back as its copy is made. One that the model uses elsewhere too, as the embedding that is
    the output layer's weight as well, stays beside the copy.
    """
    for name, child in list(parent.named_children()):
        if type(child) is nn.Linear:
            setattr(parent, name, PackedLinear(child))
        elif PackedDecoder.fits(child):
            setattr(parent, name, PackedDecoder(child))
        else:
            pack_linears(child)
