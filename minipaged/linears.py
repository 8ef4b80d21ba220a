"""A model's linear layers on a CPU, with weights laid out once as `minipaged.products` multiplies them.

Around them OPT's decoder is reduced to its arithmetic: for a few rows, a call of PyTorch costs as much as its work.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from . import attention
from .chains import Chain, Step
from .compiled import run
from .products import ADD, NORM, RELU, STORE, pack

if TYPE_CHECKING:
    from transformers.modeling_outputs import BaseModelOutputWithPast
    from transformers.models.opt.modeling_opt import OPTDecoder

    from .attention import PagedBatch


HIDDEN, NORMED, QKV, INNER, ATTENDED = range(5)  # the buffers of a decoder's chains


def product(source: int, target: int, *linears: nn.Linear, then: int = STORE) -> Step:
    """What linear layers of one input compute, their outputs one behind the other, with a copy of their weights."""
    weight = torch.cat([linear.weight.detach() for linear in linears])
    biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
    return Step(source, target, pack(weight), torch.cat(biases) if biases else None, len(weight), then)


def buffer(like: torch.Tensor, width: int) -> torch.Tensor:
    """A new Tensor [rows, width].

    Rows that lie a multiple of 4 KiB apart share a few lines of the processor's cache and drive each other out; the next
    product would wait for them. So each is followed by an unused line.
    """
    unused = 64 // like.itemsize if width * like.itemsize % 4096 == 0 else 0
    return like.new_empty(len(like), width + unused)[:, :width]


class PackedLinear(nn.Module):
    """`torch.nn.Linear` for inference, [..., in_features] to [..., out_features].

    Parameters
    ----------
    linear : Linear
        The layer that it stands for. The weight is copied into panels, and the layer's own is not kept.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.chain, self.out_features = Chain([product(0, 1, linear)]), linear.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x times the weight, plus the bias."""
        rows = x.reshape(-1, x.shape[-1])
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        out = buffer(rows, self.out_features)
        run(self.chain.works(rows, out))
        return out.view(*x.shape[:-1], -1)


class PackedDecoder(nn.Module):
    """Takes the place of transformers' `OPTDecoder`, which asks at each call about masks, caches and training.

    Between the attention of one layer and that of the next lies a section of products and norms: queries, keys and values
    are one product of three times the width, and ReLU and the residual are applied while a product is at hand. An
    iteration without prompts is one call for all layers, where the backend's attention can be a part of it.

    Parameters
    ----------
    decoder : OPTDecoder
        What it stands for; one that `fits`.
    """

    def __init__(self, decoder: "OPTDecoder") -> None:
        super().__init__()
        self.embed_tokens, self.embed_positions = decoder.embed_tokens, decoder.embed_positions
        sections, steps = [], []
        for index, layer in enumerate(decoder.layers):
            of = layer.self_attn
            steps += [norm(layer.self_attn_layer_norm), product(NORMED, QKV, of.q_proj, of.k_proj, of.v_proj)]
            sections.append(steps)
            steps = [product(ATTENDED, HIDDEN, of.out_proj, then=ADD), norm(layer.final_layer_norm),
                     product(NORMED, INNER, layer.fc1, then=RELU), product(INNER, HIDDEN, layer.fc2, then=ADD)]
            decoder.layers[index] = nn.Identity()  # its weights are given back
        self.chain = Chain(*sections, [*steps, norm(decoder.final_layer_norm)])
        self.heads, self.scale, self.inner = (3, of.num_heads, of.head_dim), of.scaling, layer.fc1.out_features

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether a module is OPT's decoder with its norms before attention and ReLU, as in all sizes but 350M."""
        from transformers.models.opt.modeling_opt import OPTDecoder

        return type(module) is OPTDecoder and module.config.activation_function == "relu" and (
            module.project_in is None and module.final_layer_norm is not None
            and module.final_layer_norm.elementwise_affine)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, paged_batch: "PagedBatch",
                **_: object) -> "BaseModelOutputWithPast":
        """Token ids and positions [1, tokens] to hidden states [1, tokens, hidden]; the batch is the runner's."""
        from transformers.modeling_outputs import BaseModelOutputWithPast

        hidden = (self.embed_tokens(input_ids) + self.embed_positions(None, position_ids=position_ids))[0]
        width = hidden.shape[1]
        buffers = [hidden, *(buffer(hidden, numbers) for numbers in (width, 3 * width, self.inner))]
        buffers.append(torch.empty_like(hidden))
        query, key, value = buffers[QKV].unflatten(1, self.heads).unbind(1)
        attended, works = buffers[ATTENDED].view(query.shape), self.chain.works(*buffers)
        if not paged_batch.prompts and paged_batch.backend.works:
            between = paged_batch.backend.works(query, key, value, attended, paged_batch, self.scale)
            run(np.concatenate([*np.concatenate([works[:-1, None], between], axis=1), works[-1:]]))
        else:
            for layer in range(len(works) - 1):
                run(works[layer:layer + 1])
                attended.copy_(attention.write_and_attend(layer, query, key, value, paged_batch, self.scale))
            run(works[-1:])
        return BaseModelOutputWithPast(buffers[NORMED][None])


def norm(layer: nn.LayerNorm) -> Step:
    """What a layer norm computes of the hidden states."""
    return Step(HIDDEN, NORMED, layer.weight.detach(), layer.bias.detach(), len(layer.weight), NORM, layer.eps)


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
