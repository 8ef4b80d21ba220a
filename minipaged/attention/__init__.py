"""The one function that transformers calls in the place of attention (§4.1, §4.3).

Every backend has the same contract: ``write(key, value, keys, values, slots, rows)`` puts new keys and values into their
slots, and ``attend(query, keys, values, batch, scale) -> output`` reads them, with

- query, output : Tensor [tokens, heads, head_dim], the packed tokens of all sequences;
- key, value : Tensor [tokens, kv_heads, head_dim], of the same tokens;
- keys, values : Tensor [blocks, block_size, kv_heads, head_dim], one layer of the cache;
- slots, rows : `PagedBatch.write_slots` and `PagedBatch.write_rows`;
- batch : `PagedBatch`, where each sequence's tokens and blocks are;
- scale : float, the factor on the dot products, 1/sqrt(d) in Eq. 4.

All tensors of numbers are of one type, on one device. Those of the new tokens hold what they hold for this call alone:
the next layer's may lie in the same place.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from ..memory.table import translate

if TYPE_CHECKING:
    from ..backends import Backend
    from ..memory.cache import KVCache


def write(key: torch.Tensor, value: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor,
          rows: torch.Tensor | None) -> None:
    """New keys and values into their slots, in plain PyTorch; the contract is this module's."""
    for new, blocks in ((key, keys), (value, values)):
        chosen = new if rows is None else new[rows]
        blocks.flatten(0, 1).index_copy_(0, slots, chosen)  # [slots, kv_heads, head_dim]


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
    backend: "Backend"
    _slots: dict[int, torch.Tensor] = field(default_factory=dict)

    @cached_property
    def starts(self) -> list[int]:
        """Of each sequence the row of its first token among the packed ones, and the number of all rows."""
        return list(accumulate(self.query_lens, initial=0))

    @cached_property
    def decodes(self) -> list[int]:
        """The sequences with one new token."""
        return [i for i, queries in enumerate(self.query_lens) if queries == 1]

    @cached_property
    def prompts(self) -> list[int]:
        """The sequences with several new tokens."""
        return [i for i, queries in enumerate(self.query_lens) if queries > 1]

    def slots_of(self, i: int) -> torch.Tensor:
        """The slots of a sequence's tokens in order of position, Tensor [context]; the same in all layers."""
        if i not in self._slots:
            position = torch.arange(self.context_lens[i], device=self.block_tables.device)
            block, offset = translate(self.block_tables[i], position, self.cache.block_size)
            self._slots[i] = block * self.cache.block_size + offset
        return self._slots[i]


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
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    return write_and_attend(module.layer_idx, query, key, value, paged_batch, scaling).unsqueeze(0), None


def write_and_attend(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, batch: PagedBatch,
                     scale: float) -> torch.Tensor:
    """Attention of one layer of the cache: this module's contract, both halves of it."""
    keys, values = batch.cache.layers[layer]
    batch.backend.write(key, value, keys, values, batch.write_slots, batch.write_rows)
    return batch.backend.attend(query, keys, values, batch, scale)
