"""The one function that transformers calls in the place of attention (§4.1, §4.3).

Every backend has the same contract: ``write(key, value, keys, values, slots, rows)`` puts new keys and values into their
slots, and ``attend(query, keys, values, batch, scale) -> output`` reads them, with

- query, output : Tensor [tokens, heads, head_dim], the packed tokens of all sequences;
- key, value : Tensor [tokens, kv_heads, head_dim], of the same tokens;
- keys, values : Tensor [blocks, block_size, kv_heads, head_dim], one layer of the cache;
- slots, rows : `PagedBatch.write_slots` and `PagedBatch.write_rows`;
- batch : `PagedBatch`, where each sequence's tokens and blocks are;
- scale : float, the factor on the dot products, 1/sqrt(d) in Eq. 4.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from ..errors import InvalidConfig
from ..memory.cache import PLAIN, BlockMoves
from ..memory.table import translate
from . import cpu, eager

if TYPE_CHECKING:
    from ..memory.cache import KVCache

def write(key: torch.Tensor, value: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor,
          rows: torch.Tensor | None) -> None:
    """New keys and values into their slots, in plain PyTorch; the contract is this module's."""
    for new, blocks in ((key, keys), (value, values)):
        chosen = new if rows is None else new[rows]
        blocks.flatten(0, 1).index_copy_(0, slots, chosen)  # [slots, kv_heads, head_dim]


@dataclass(frozen=True)
class Backend:
    """What computes attention, and why it was chosen.

    Attributes
    ----------
    name : str
        "eager", "cpu" or "triton".
    reason : str
        For the trace.
    write, attend : Callable
        The contract of this module.
    moves : BlockMoves
        What copies and swaps blocks.
    """

    name: str
    reason: str
    write: Callable[..., None]
    attend: Callable[..., torch.Tensor]
    moves: BlockMoves = PLAIN


def choose_backend(name: str, device: torch.device, head_dim: int, dtype: torch.dtype, block_size: int) -> Backend:
    """The backend asked for; with "auto" Triton on a GPU, if its kernels take this model, else plain PyTorch.

    Raises
    ------
    InvalidConfig
        "triton" was asked for and cannot run here; with the reason.
    """
    if name in ("auto", "triton"):
        problem = _triton_problem(device, head_dim, dtype, block_size)
        if problem is None and (name == "triton" or device.type == "cuda"):
            from . import triton_blocks, triton_kernels  # only where they are used: not every platform has Triton

            return Backend("triton", f"triton: {'asked for' if name == 'triton' else 'the device is a GPU'}",
                           triton_blocks.reshape_and_cache, triton_kernels.attend, triton_blocks.MOVES)
        if name == "triton":
            raise InvalidConfig(f"attention is 'triton', but {problem}; give auto, cpu or eager")
        why = "the device is a CPU" if device.type == "cpu" else problem
        return Backend("cpu", f"cpu: plain PyTorch, since {why}", write, cpu.attend)
    return Backend(name, f"{name}: asked for", write, {"eager": eager.attend, "cpu": cpu.attend}[name])


def _triton_problem(device: torch.device, head_dim: int, dtype: torch.dtype, block_size: int) -> str | None:
    if find_spec("triton") is None:
        return "Triton is not to be had on this platform"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"Triton runs on {device.type} under its interpreter alone, with TRITON_INTERPRET=1"
    from .triton_kernels import supported

    return supported(head_dim, dtype, block_size)


@dataclass
class PagedBatch:
    """One iteration's sequences, packed in one row of tokens (§4.3).

    Attributes
    ----------
    query_lens : list[int]
        New tokens of each sequence: a prompt's length, or 1.
    context_lens : list[int]
        Tokens of each sequence in the cache once the new ones are written.
    block_tables : Tensor [sequences, logical blocks] int64
        Physical block numbers, padded on the right with 0.
    write_rows : Tensor [writes] int64 or None
        Which tokens are written; None: all. One that lies in a block shared with others is there already.
    write_slots : Tensor [writes] int64
        Where: physical block * block_size + offset.
    cache : KVCache
        The blocks.
    backend : Backend
        What computes.
    """

    query_lens: list[int]
    context_lens: list[int]
    block_tables: torch.Tensor
    write_rows: torch.Tensor | None
    write_slots: torch.Tensor
    cache: "KVCache"
    backend: Backend

    @cached_property
    def context_slots(self) -> list[torch.Tensor]:
        """The slots of each sequence's tokens in order of position, Tensor [context] each; the same in all layers."""
        block_size = self.cache.block_size
        slots = []
        for block_table, context_len in zip(self.block_tables, self.context_lens):
            position = torch.arange(context_len, device=block_table.device)
            block, offset = translate(block_table, position, block_size)
            slots.append(block * block_size + offset)
        return slots


def paged_attention(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                    attention_mask: None, scaling: float, paged_batch: PagedBatch, **_: object,
                    ) -> tuple[torch.Tensor, None]:
    """Write the new keys and values to their slots, then attend over the block tables.

    Parameters
    ----------
    module : Module
        The attention layer; its ``layer_idx`` names the layer of the cache.
    query : Tensor [1, heads, tokens, head_dim]
        Queries of the packed tokens.
    key, value : Tensor [1, kv_heads, tokens, head_dim]
        Keys and values of the packed tokens.
    scaling : float
        The factor on the dot products.
    paged_batch : PagedBatch
        What the runner passed to the model; transformers hands it through to every layer.

    Returns
    -------
    Tensor [1, tokens, heads, head_dim], and None for the weights.
    """
    keys, values = paged_batch.cache.layer(module.layer_idx)
    paged_batch.backend.write(key[0].transpose(0, 1), value[0].transpose(0, 1), keys, values,
                              paged_batch.write_slots, paged_batch.write_rows)
    out = paged_batch.backend.attend(query[0].transpose(0, 1), keys, values, paged_batch, scaling)
    return out.unsqueeze(0), None
