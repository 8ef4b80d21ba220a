"""Attention in plain PyTorch: the blocks of each sequence gathered, then PyTorch's own attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from . import PagedBatch


def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: "PagedBatch",
           scale: float) -> torch.Tensor:
    """Attention of every sequence over its own block table; the contract is that of `minipaged.attention`."""
    output = torch.empty_like(query)
    start = 0
    keys_of_slot, values_of_slot = keys.flatten(0, 1), values.flatten(0, 1)  # [slots, kv_heads, head_dim]
    for slots, queries in zip(batch.context_slots, batch.query_lens):
        q = query[start:start + queries].transpose(0, 1)  # [heads, queries, head_dim]
        k, v = keys_of_slot[slots].transpose(0, 1), values_of_slot[slots].transpose(0, 1)
        whole_prompt = queries == len(slots)
        mask = None  # one query, at the last position, sees every key
        if queries > 1 and not whole_prompt:
            mask = torch.ones(queries, len(slots), dtype=torch.bool, device=q.device).tril(len(slots) - queries)
        o = scaled_dot_product_attention(q[None], k[None], v[None], mask, is_causal=whole_prompt, scale=scale,
                                         enable_gqa=True)
        output[start:start + queries] = o[0].transpose(0, 1)
        start += queries
    return output
