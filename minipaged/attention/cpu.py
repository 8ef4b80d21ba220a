"""Attention on a CPU: new tokens over the blocks where they lie, prompts by PyTorch's own attention.

`decode` is `eager.attend_one` for one query, compiled by numba: it reads each key and value once, in place, with all
heads of a token together as they lie in memory, and no sequence is padded to the length of another. A prompt is
arithmetic more than memory, so its keys and values are gathered once and PyTorch multiplies them.

Threads are Python's, each with sequences of its own: what numba compiles needs no interpreter lock. numba's own pools
spin while they wait, as PyTorch's does, and two such pools take the cores from each other. A thread that took half the
heads of all sequences would read half of every row, which wastes what the processor fetches ahead. One layer of
opt-125m for 32 sequences of 512 tokens, float32, on two cores of a Zen 4 that read 29 GB/s:

    one thread                                  7.4 ms    13.6 GB/s
    two threads, half the heads each           10.4 ms     9.7 GB/s
    numba's OpenMP pool, half the heads each    9.3 ms    10.8 GB/s
    two threads, half the sequences each        5.0 ms    20.3 GB/s, 70 % of what the cores can read
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from numba import njit, types
from numba.extending import overload

from . import plain

if TYPE_CHECKING:
    from . import PagedBatch

WORTH_A_THREAD = 1 << 19  # bytes of keys and values, read in the time that it takes to wake another thread


def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: "PagedBatch",
           scale: float) -> torch.Tensor:
    """Attention of every sequence over its own block table; the contract is that of `minipaged.attention`."""
    q, output = query.float().contiguous(), torch.empty(query.shape)  # sums are float32, whatever the cache holds
    for i in batch.prompts:
        rows = slice(*batch.starts[i:i + 2])
        output[rows] = plain.attend_one(query[rows], keys, values, batch.slots_of(i), scale)
    if batch.decodes:
        if keys.dtype == torch.bfloat16:  # numpy has none: its bits
            keys, values = keys.view(torch.uint16), values.view(torch.uint16)
        arrays, shares = _plan(batch, 2 * keys[0, 0].nbytes)
        decode = compiled()
        _together(lambda share: decode(q.numpy(), keys.numpy(), values.numpy(), share, *arrays, np.float32(scale),
                                       output.numpy()), shares)
    return output.to(query.dtype)


def _plan(batch: "PagedBatch", token_bytes: int) -> tuple[tuple[np.ndarray, ...], list[np.ndarray]]:
    """What the calls in all layers of an iteration share, made at the first: where sequences and their blocks are, and
    which sequences each thread takes, so that all have about the same number of tokens to read."""
    if "cpu_plan" not in vars(batch):
        context, tokens = batch.context_lens, sum(batch.context_lens[i] for i in batch.decodes)
        count = min(torch.get_num_threads(), len(batch.decodes), 1 + tokens * token_bytes // WORTH_A_THREAD)
        order, turn = sorted(batch.decodes, key=lambda i: -context[i]), 2 * count
        shares = [order[k::turn] + order[turn - 1 - k::turn] for k in range(count)]  # there and back: 0 1 2 2 1 0 0 …
        arrays = np.array(batch.starts), batch.block_tables.numpy(), np.array(context)
        vars(batch)["cpu_plan"] = arrays, [np.array(share) for share in shares]
    return vars(batch)["cpu_plan"]


def _together(run: Callable[[np.ndarray], None], shares: list[np.ndarray]) -> None:
    """Run every share in a thread, the first in this one."""
    others = [_threads(len(shares) - 1).submit(run, share) for share in shares[1:]]
    run(shares[0])
    for other in others:
        other.result()


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, "minipaged-attention")


def _number(bits: float) -> float:
    """An element of the cache as a number: a bfloat16 is the upper half of a float32."""


@overload(_number)
def _number_of_type(bits):
    if bits == types.uint16:
        return lambda bits: np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)
    return lambda bits: bits


def decode(query: np.ndarray, keys: np.ndarray, values: np.ndarray, sequences: np.ndarray, starts: np.ndarray,
           block_tables: np.ndarray, context_lens: np.ndarray, scale: float, output: np.ndarray) -> None:
    """One query per sequence over its blocks (Eq. 4), as `compiled` turns it into machine code.

    Parameters
    ----------
    query, output : float32 array [tokens, heads, head_dim]
        The packed tokens; the rows of these sequences are written to the output.
    keys, values : float32 array, or uint16 array of the bits of bfloat16, [blocks, block_size, kv_heads, head_dim]
        One layer of the cache.
    sequences : int64 array
        Which of the batch's sequences.
    starts, context_lens : int64 array
        Row of the first token, and tokens, of each sequence of the batch.
    block_tables : int64 array [sequences of the batch, logical blocks]
        Physical block numbers.
    scale : float32
        The factor on the dot products.
    """
    block_size, heads, head_dim = keys.shape[1], query.shape[1], query.shape[2]
    group = heads // keys.shape[2]
    a = np.empty((heads, block_size), np.float32)  # a block's scores, then their exponentials
    largest, total = np.empty(heads, np.float32), np.empty(heads, np.float32)
    for i in sequences:
        q, o = query[starts[i]], output[starts[i]]
        largest[:], total[:], o[:] = -np.inf, 0, 0
        for j in range((context_lens[i] + block_size - 1) // block_size):
            block, filled = block_tables[i, j], min(block_size, context_lens[i] - j * block_size)
            for t in range(filled):
                for h in range(heads):
                    score = np.float32(0)
                    for d in range(head_dim):
                        score += q[h, d] * _number(keys[block, t, h // group, d])
                    a[h, t] = score * scale
            for h in range(heads):
                new_largest = max(largest[h], a[h, :filled].max())
                shrink = math.exp(largest[h] - new_largest)
                largest[h] = new_largest
                total[h] *= shrink
                o[h] *= shrink
                for t in range(filled):
                    a[h, t] = math.exp(a[h, t] - new_largest)
                    total[h] += a[h, t]
            for t in range(filled):
                for h in range(heads):
                    for d in range(head_dim):
                        o[h, d] += a[h, t] * _number(values[block, t, h // group, d])
        for h in range(heads):
            o[h] /= total[h]


@cache
def compiled() -> Callable[..., None]:
    """`decode`, compiled once for each type that it meets, and kept on disk for the next process where that is allowed.

    Sums may be taken in any order, which lets the compiler take them eight or sixteen at a time; infinities stay.
    """
    options = dict(nogil=True, fastmath={"reassoc", "contract"})
    try:
        return njit(cache=True, **options)(decode)
    except RuntimeError:  # neither the package's folder nor the user's takes files
        return njit(**options)(decode)
