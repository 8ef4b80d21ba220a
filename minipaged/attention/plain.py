"""Attention in plain PyTorch, on any device: the blocks of each sequence gathered, then PyTorch's own attention."""

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
    for i in range(len(batch.query_lens)):
        rows = slice(*batch.starts[i:i + 2])
        output[rows] = attend_one(query[rows], keys, values, batch.slots_of(i), scale)
    return output


def attend_one(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor,
               scale: float) -> torch.Tensor:
    """The last tokens of one sequence, over copies of its keys and values that lie together.

    Parameters
    ----------
    query : Tensor [queries, heads, head_dim]
        Queries of the last ``queries`` positions of the sequence.
    keys, values : Tensor [blocks, block_size, kv_heads, head_dim]
        One layer of the cache.
    slots : Tensor [context] int64
        Of all its tokens, in order of position.
    scale : float
        1/sqrt(d) in Eq. 4.

    Returns
    -------
    Tensor [queries, heads, head_dim]
    """
    k, v = (x.flatten(0, 1)[slots].transpose(0, 1) for x in (keys, values))  # [kv_heads, context, head_dim]
    queries, context = len(query), len(slots)
    mask = None  # one query, at the last position, sees every key
    if 1 < queries < context:
        mask = torch.ones(queries, context, dtype=torch.bool, device=query.device).tril(context - queries)
    o = scaled_dot_product_attention(query.transpose(0, 1)[None], k[None], v[None], mask,
                                     is_causal=queries == context, scale=scale, enable_gqa=True)
    return o[0].transpose(0, 1)
