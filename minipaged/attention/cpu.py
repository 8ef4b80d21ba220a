"""Attention on a CPU: new tokens over the blocks where they lie, prompts by PyTorch's own attention.

`minipaged.decoding.decode` is `eager.attend_one` for one query, compiled by numba: it reads each key and value once, in
place, and no sequence is padded to the length of another. A prompt is arithmetic more than memory, so its keys and
values are gathered once and PyTorch multiplies them.

Each thread reads as many tokens as the others. Where its share ends, a sequence is cut along its context, and a second
step puts the pieces together, as in the split Triton kernel; without it one sequence would be one thread's, and with a
quarter of the KV blocks (`minipaged bench`, where mostly 1 to 9 requests run) tokens/s were 5 % fewer in float32. Half
the heads of all sequences each would be half of every row, which wastes what the processor fetches ahead: for 32
sequences of 512 tokens of one layer of opt-125m, float32, on two cores of a Zen 4, plain loops took 10.4 ms with half the
heads each, 5.0 ms with half the sequences each, and 7.4 ms with one thread.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import accumulate, chain
from typing import TYPE_CHECKING

import numpy as np
import torch
from numba import carray

from ..compiled import edition, numbers_at, on_every_thread, pointer
from ..decoding import decode, merge
from ..vectors import LANES
from . import plain

if TYPE_CHECKING:
    from . import PagedBatch

WORTH_A_THREAD = 1 << 19  # bytes of keys and values, read in the time that it takes to wake another thread


def write(key: torch.Tensor, value: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor,
          rows: torch.Tensor | None) -> None:
    """New keys and values into their slots; the contract is that of `minipaged.attention`."""
    assert key.dtype == value.dtype == keys.dtype, "the cache has the model's type"
    arrays = [_in_rows(key), _in_rows(value), keys, values]
    _place()(np.array([1, 14, 0, 1, *(x.data_ptr() for x in arrays), slots.data_ptr(),
                       0 if rows is None else rows.data_ptr(), len(slots),
                       *(x.stride(-3) * x.itemsize for x in arrays[:3])]))


def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: "PagedBatch",
           scale: float) -> torch.Tensor:
    """Attention of every sequence over its own block table; the contract is that of `minipaged.attention`."""
    assert query.dtype == keys.dtype, "the cache has the model's type"
    query = _in_rows(query)
    output = torch.empty_like(query)
    for i in batch.prompts:
        rows = slice(*batch.starts[i:i + 2])
        output[rows] = plain.attend_one(query[rows], keys, values, batch.slots_of(i), scale)
    if batch.decodes:
        _run(keys.dtype)(_numbers(batch, [query, output, keys, values], scale))
    return output


def _in_rows(x: torch.Tensor) -> torch.Tensor:
    """[tokens, heads, head_dim] with the heads of a token one behind the other, as the compiled code takes it; the next
    token may begin anywhere behind them."""
    together = x.stride()[1:] == (x.shape[2], 1) and (len(x) == 1 or x.stride(0) >= x.shape[1] * x.shape[2])
    return x if together else x.contiguous()


def _numbers(batch: "PagedBatch", arrays: list[torch.Tensor], scale: float) -> np.ndarray:
    """What `_run` takes, made at the first layer of an iteration and used in all; the arrays are a layer's own."""
    if not hasattr(batch, "cpu_numbers"):
        (q, _, keys, _), tables = arrays, batch.block_tables
        shares = _shares(batch, 2 * keys[0, 0].nbytes)
        batch.cpu_partials = torch.empty(sum(map(len, shares)), q.shape[1] * (q.shape[2] + 2), dtype=torch.float32)
        numbers = batch.cpu_numbers = np.array(
            [len(shares), 0, 0, 2, 0, 0, 0, 0, 0, tables.data_ptr(), batch.cpu_partials.data_ptr(), *q.shape,
             *keys.shape[:3], *tables.shape, np.float64(scale).view(np.int64), len(batch.cpu_partials), 0,
             *accumulate(map(len, shares)), *chain(*sum(shares, []))])
        numbers[1] = len(numbers)
    batch.cpu_numbers[4:9] = [*(array.data_ptr() for array in arrays), arrays[0].stride(0)]
    return batch.cpu_numbers


def _shares(batch: "PagedBatch", token_bytes: int) -> list[list[tuple[int, int, int, int]]]:
    """What each thread reads, about as many tokens as the others: pieces of sequences, as `decode` takes them. Where a
    share ends, the sequence is cut."""
    lengths = [batch.context_lens[i] for i in batch.decodes]
    count = min(torch.get_num_threads(), 1 + sum(lengths) * token_bytes // WORTH_A_THREAD)
    size = -(-sum(lengths) // count)  # tokens of a share; where it ends is rounded up to a register of scores
    shares: list[list[tuple[int, int, int, int]]] = [[] for _ in range(count)]
    for i, length, before in zip(batch.decodes, lengths, accumulate(lengths, initial=0)):
        for share in range(before // size, (before + length) // size + 1):
            first, end = (-(-max(0, turn * size - before) // LANES) * LANES for turn in (share, share + 1))
            if first < min(length, end):
                shares[share].append((i, batch.starts[i], first, min(length, end)))
    return shares


@cache
def _run(dtype: torch.dtype) -> Callable[[np.ndarray], None]:
    """`decode` in threads, each its share, and then `merge`; takes an iteration's numbers."""
    element, sources = {torch.float32: np.float32, torch.bfloat16: np.uint16}[dtype], edition()

    def share(address: int, step: int, part: int, parts: int) -> None:
        """One thread's pieces, or heads; the order of the numbers is that of `_numbers`."""
        sources  # see `edition`
        n = numbers_at(address)
        tokens, heads, head_dim, blocks, block_size, kv_heads, sequences, longest = n[11:19]
        pieces, cuts = n[22 + n[0]:].reshape(n[20], 4), n[21:]
        partials = carray(pointer(n[10]), (n[20], heads * (head_dim + 2)), np.float32)
        # A single row may say anything of where the next one begins.
        query = carray(pointer(n[4]), (tokens, max(n[8], heads * head_dim)), element)
        keys = carray(pointer(n[6]), (blocks * block_size, kv_heads, head_dim), element)
        values = carray(pointer(n[7]), (blocks * block_size, kv_heads, head_dim), element)
        block_tables = carray(pointer(n[9]), (sequences, longest), np.int64)
        if step:
            merge(pieces, partials, carray(pointer(n[5]), (tokens, heads, head_dim), element), part, parts)
        else:
            for one in range(part, n[0], parts):
                mine = slice(cuts[one], cuts[one + 1])
                decode(query, keys, values, block_size, pieces[mine], block_tables,
                       np.float32(n[19:20].view(np.float64)[0]), partials[mine])

    return on_every_thread(share)


@cache
def _place() -> Callable[[np.ndarray], None]:
    """What copies the rows of which `write` made the numbers."""
    sources = edition()

    def copy(address: int, step: int, part: int, parts: int) -> None:
        """All of them, in one thread: of a token there is far less to write than to read of the weights."""
        sources  # see `edition`
        n = numbers_at(address)
        slots, rows = carray(pointer(n[8]), n[10], np.int64), carray(pointer(n[9]), n[10], np.int64)
        for i in range(n[10]):
            for k in range(2):
                source = carray(pointer(n[4 + k] + (rows[i] if n[9] else i) * n[11 + k]), n[13], np.uint8)
                target = carray(pointer(n[6 + k] + slots[i] * n[13]), n[13], np.uint8)
                for byte in range(n[13]):
                    target[byte] = source[byte]

    return on_every_thread(copy)
