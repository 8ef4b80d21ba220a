"""Random batches for the attention kernels, as the engine packs them."""

from __future__ import annotations

import random
from math import ceil
from types import SimpleNamespace

import torch

from minipaged.attention import PagedBatch

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}
# Contexts of one token, of one block, one less and one more (for block sizes 8 to 64), and past one tile of a kernel.
UGLY = [1, 7, 8, 9, 16, 17, 31, 33, 63, 64, 65, 130]


def make_batch(queries: list[int], contexts: list[int], block_size: int, group: int, kv_heads: int, head_dim: int,
               dtype: torch.dtype, seed: int, table_dtype: torch.dtype = torch.int64,
               ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, PagedBatch, list[list[int]]]:
    """Random sequences in scattered blocks; every slot that no sequence has written is NaN, block 0 wholly."""
    random.seed(seed)
    generator = torch.Generator().manual_seed(seed)
    needed = [ceil(context / block_size) for context in contexts]
    free = random.sample(range(1, sum(needed) + 4), sum(needed) + 3)
    keys = torch.full((sum(needed) + 4, block_size, kv_heads, head_dim), float("nan"), dtype=dtype)
    values = keys.clone()
    tables = [[free.pop() for _ in range(n)] for n in needed]
    for table, context in zip(tables, contexts):
        for position in range(context):
            at = table[position // block_size], position % block_size
            keys[at] = torch.randn(kv_heads, head_dim, generator=generator).to(dtype)
            values[at] = torch.randn(kv_heads, head_dim, generator=generator).to(dtype)
    padded = torch.tensor([table + [0] * (max(needed) - len(table)) for table in tables], dtype=table_dtype)
    batch = PagedBatch(queries, contexts, padded, None, torch.empty(0),
                       cache=SimpleNamespace(block_size=block_size), backend=None)
    query = 2 * torch.randn(sum(queries), group * kv_heads, head_dim, generator=generator)
    return query.to(dtype), keys, values, batch, tables
