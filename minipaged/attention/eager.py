"""Eq. 4 written out, block by block: slow, obvious, the specification that every kernel is compared with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from . import PagedBatch


def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: "PagedBatch",
           scale: float) -> torch.Tensor:
    """Attention of every sequence over its own block table; the contract is that of `minipaged.attention`."""
    outputs = []
    queries = query.split(batch.query_lens)
    for q, context_len, block_table in zip(queries, batch.context_lens, batch.block_tables.tolist()):
        outputs.append(attend_one(q, keys, values, block_table, context_len, scale))
    return torch.cat(outputs)  # [tokens, heads, head_dim]


class Walked(NamedTuple):
    """Where Eq. 4 stands once one more block is read; heads are [kv_heads, group], the group sharing a key head.

    Attributes
    ----------
    score : Tensor [queries, kv_heads, group, filled]
        q·k/sqrt(d) of this block's slots; -inf where the slot lies after the query's position.
    largest : Tensor [queries, kv_heads, group, 1]
        The largest score so far.
    shrink : Tensor [queries, kv_heads, group, 1]
        What the sums so far were multiplied with, as they are kept relative to the largest score.
    total : Tensor [queries, kv_heads, group, 1]
        Sum of the exponentials so far: the denominator, relative to exp(largest).
    weighted : Tensor [queries, kv_heads, group, head_dim]
        Sum of the values so far, weighted with the exponentials: the numerator.
    """

    score: torch.Tensor
    largest: torch.Tensor
    shrink: torch.Tensor
    total: torch.Tensor
    weighted: torch.Tensor


def attend_one(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, block_table: list[int],
               context_len: int, scale: float) -> torch.Tensor:
    """Eq. 4 for the last tokens of one sequence: what `walk` holds at the end of the block table, divided.

    Returns
    -------
    Tensor [queries, heads, head_dim], of the queries' type; computed in float32.
    """
    for end in walk(query, keys, values, block_table, context_len, scale):
        pass
    return (end.weighted / end.total).view(query.shape).to(query.dtype)


def walk(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, block_table: list[int], context_len: int,
         scale: float) -> Iterator[Walked]:
    """Eq. 4 for the last tokens of one sequence, block by block.

    The sum of exponentials in Eq. 4's denominator runs over all blocks; here it is gathered while walking through
    them, beside the weighted sum of the values. Both are kept relative to the largest score so far, which leaves
    their ratio as it is and keeps the exponentials from overflowing.

    Parameters
    ----------
    query : Tensor [queries, heads, head_dim]
        Queries of the last ``queries`` positions of the sequence.
    keys, values : Tensor [blocks, block_size, kv_heads, head_dim]
        One layer of the cache.
    block_table : list[int]
        Physical block of each logical block.
    context_len : int
        Tokens of the sequence, these included.
    scale : float
        1/sqrt(d) in Eq. 4.

    Yields
    ------
    Walked, once for each block that holds some of the context.
    """
    num_queries, heads, head_dim = query.shape
    block_size, kv_heads = keys.shape[1:3]
    q = query.float().view(num_queries, kv_heads, heads // kv_heads, head_dim)  # queries that share a key head
    position = torch.arange(context_len - num_queries, context_len, device=query.device)[:, None, None, None]
    largest = torch.full((*q.shape[:3], 1), float("-inf"), device=query.device)
    total, weighted = torch.zeros_like(largest), torch.zeros_like(q)

    for j in range(-(-context_len // block_size)):
        filled = min(block_size, context_len - j * block_size)
        K_j = keys[block_table[j], :filled].float()  # [filled, kv_heads, head_dim]
        V_j = values[block_table[j], :filled].float()
        score = torch.einsum("qkgd,skd->qkgs", q, K_j) * scale
        slot = j * block_size + torch.arange(filled, device=query.device)
        score = score.masked_fill(slot > position, float("-inf"))  # a token does not see those after it

        new_largest = torch.maximum(largest, score.amax(-1, keepdim=True))
        shrink = torch.exp(largest - new_largest)
        A_j = torch.exp(score - new_largest)
        total = total * shrink + A_j.sum(-1, keepdim=True)
        weighted = weighted * shrink + torch.einsum("qkgs,skd->qkgd", A_j, V_j)
        largest = new_largest
        yield Walked(score, largest, shrink, total, weighted)
