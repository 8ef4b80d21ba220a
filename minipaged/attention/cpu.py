"""Attention on a CPU: new tokens over the blocks where they lie, prompts by PyTorch's own attention.

`decode` is `eager.attend_one` for one query, compiled by numba: it reads each key and value once, in place, with all
heads of a token together as they lie in memory, and no sequence is padded to the length of another. A prompt is
arithmetic more than memory, so its keys and values are gathered once and PyTorch multiplies them.

Each thread has sequences of its own. One that took half the heads of all sequences would read half of every row, which
wastes what the processor fetches ahead: for 32 sequences of 512 tokens of one layer of opt-125m, float32, on two cores
of a Zen 4, two threads took 10.4 ms with half the heads each, 5.0 ms with half the sequences each, and one thread 7.4.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
import torch
from numba import carray

from ..compiled import array_of, compiled, exp, number, numbers_at, on_every_thread, pointer
from . import plain

if TYPE_CHECKING:
    from . import PagedBatch

WORTH_A_THREAD = 1 << 19  # bytes of keys and values, read in the time that it takes to wake another thread


def write(key: torch.Tensor, value: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor,
          rows: torch.Tensor | None) -> None:
    """New keys and values into their slots; the contract is that of `minipaged.attention`."""
    place(*map(array_of, (key, value, keys, values)), slots.numpy(), None if rows is None else rows.numpy())


def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: "PagedBatch",
           scale: float) -> torch.Tensor:
    """Attention of every sequence over its own block table; the contract is that of `minipaged.attention`."""
    q, output = query.float().contiguous(), torch.empty(query.shape)  # sums are float32, whatever the cache holds
    for i in batch.prompts:
        rows = slice(*batch.starts[i:i + 2])
        output[rows] = plain.attend_one(query[rows], keys, values, batch.slots_of(i), scale)
    if batch.decodes:
        _run(keys.dtype)(_numbers(batch, [q, output, keys, values], scale))
    return output.to(query.dtype)


def _numbers(batch: "PagedBatch", arrays: list[torch.Tensor], scale: float) -> np.ndarray:
    """What `_run` takes, made at the first layer of an iteration and used in all; the arrays are a layer's own."""
    if "cpu_numbers" not in vars(batch):
        (q, _, keys, _), tables = arrays, batch.block_tables
        shares = _shares(batch, 2 * keys[0, 0].nbytes)
        numbers = vars(batch)["cpu_numbers"] = np.array(
            [len(shares), 0, 0, 0, 0, 0, 0, tables.data_ptr(), *q.shape, *keys.shape[:3], *tables.shape,
             np.float64(scale).view(np.int64), *batch.starts, *batch.context_lens, 0, *accumulate(map(len, shares)),
             *sum(shares, [])])
        numbers[1] = len(numbers)
    vars(batch)["cpu_numbers"][3:7] = [array.data_ptr() for array in arrays]
    return vars(batch)["cpu_numbers"]


def _shares(batch: "PagedBatch", token_bytes: int) -> list[list[int]]:
    """Which sequences each thread takes, so that all have about the same number of tokens to read."""
    context, tokens = batch.context_lens, sum(batch.context_lens[i] for i in batch.decodes)
    count = min(torch.get_num_threads(), len(batch.decodes), 1 + tokens * token_bytes // WORTH_A_THREAD)
    order, turn = sorted(batch.decodes, key=lambda i: -context[i]), 2 * count
    return [order[k::turn] + order[turn - 1 - k::turn] for k in range(count)]  # there and back: 0 1 2 2 1 0 0 …


@cache
def _run(dtype: torch.dtype) -> Callable[[np.ndarray], None]:
    """`decode` in threads, for a cache of this type: what takes an iteration's numbers, each thread its share."""
    element = {torch.float32: np.float32, torch.bfloat16: np.uint16}[dtype]

    def share(address: int, part: int) -> None:
        """One thread's sequences; the order of the numbers is that of `_numbers`."""
        n = numbers_at(address)
        tokens, heads, head_dim, blocks, block_size, kv_heads, sequences, longest = n[8:16]
        query = carray(pointer(n[3]), (tokens, heads, head_dim), np.float32)
        output = carray(pointer(n[4]), (tokens, heads, head_dim), np.float32)
        keys = carray(pointer(n[5]), (blocks, block_size, kv_heads, head_dim), element)
        values = carray(pointer(n[6]), (blocks, block_size, kv_heads, head_dim), element)
        block_tables = carray(pointer(n[7]), (sequences, longest), np.int64)
        starts, context_lens, cuts = n[17:], n[18 + sequences:], n[18 + 2 * sequences:]
        decode(query, keys, values, cuts[n[0] + 1:][cuts[part]:cuts[part + 1]], starts, block_tables,
               context_lens, np.float32(n[16:17].view(np.float64)[0]), output)

    return on_every_thread(share)


@compiled
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
                        score += q[h, d] * number(keys[block, t, h // group, d])
                    a[h, t] = score * scale
            for h in range(heads):
                new_largest, added = largest[h], np.float32(0)
                for t in range(filled):
                    new_largest = max(new_largest, a[h, t])
                for t in range(filled):
                    a[h, t] = exp(a[h, t] - new_largest)
                    added += a[h, t]
                shrink = exp(largest[h] - new_largest)
                largest[h], total[h] = new_largest, total[h] * shrink + added
                o[h] *= shrink
            for t in range(filled):
                for h in range(heads):
                    for d in range(head_dim):
                        o[h, d] += a[h, t] * number(values[block, t, h // group, d])
        o /= total.reshape(heads, 1)


@compiled
def place(key: np.ndarray, value: np.ndarray, keys: np.ndarray, values: np.ndarray, slots: np.ndarray,
          rows: np.ndarray | None) -> None:
    """New keys, values [tokens, kv_heads, head_dim] into slots of the blocks [blocks, block_size, kv_heads, head_dim];
    the first token, or that of the first row, goes to the first slot."""
    for i in range(len(slots)):
        row, (block, offset) = i if rows is None else rows[i], divmod(slots[i], keys.shape[1])
        keys[block, offset], values[block, offset] = key[row], value[row]
