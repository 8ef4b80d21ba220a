"""The one function that transformers calls in the place of attention (§4.1, §4.3).

Every backend has the same contract: ``attend(query, keys, values, batch, scale) -> output`` with

- query, output : Tensor [tokens, heads, head_dim], the packed tokens of all sequences;
- keys, values : Tensor [blocks, block_size, kv_heads, head_dim], one layer of the cache, written already;
- batch : `PagedBatch`, where each sequence's tokens and blocks are;
- scale : float, the factor on the dot products, 1/sqrt(d) in Eq. 4.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from ..memory.table import translate
from . import cpu, eager

if TYPE_CHECKING:
    from ..memory.cache import KVCache

BACKENDS: dict[str, Callable[..., torch.Tensor]] = {"eager": eager.attend, "cpu": cpu.attend}


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
    attend : Callable
        The backend.
    """

    query_lens: list[int]
    context_lens: list[int]
    block_tables: torch.Tensor
    write_rows: torch.Tensor | None
    write_slots: torch.Tensor
    cache: "KVCache"
    attend: Callable[..., torch.Tensor]

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
    _write(keys, key, paged_batch)
    _write(values, value, paged_batch)
    out = paged_batch.attend(query[0].transpose(0, 1), keys, values, paged_batch, scaling)
    return out.unsqueeze(0), None


def _write(blocks: torch.Tensor, new: torch.Tensor, batch: PagedBatch) -> None:
    rows = new[0].transpose(0, 1)  # [tokens, kv_heads, head_dim]
    if batch.write_rows is not None:
        rows = rows[batch.write_rows]
    blocks.flatten(0, 1).index_copy_(0, batch.write_slots, rows)  # [slots, kv_heads, head_dim]
