"""The compiled loop of the CPU's attention: one query per sequence over its blocks, where they lie (Eq. 4).

It takes at most `LANES` tokens of a head at a time, a register of scores. Meanwhile the processor is told to fetch those
that come after, since which block they are in stands in the table and it does not guess that: in four portions a head,
as it waits where too many lines are asked for at once. Layers of opt-125m one after the other, so that each has to come
from memory, 32 sequences of 512 tokens, ns a token and head on one core of a Zen 4 (bfloat16, float32):

    loops as the compiler makes vectors of them             28    34
    the same loops, and tokens fetched ahead                20    33 to 46
    `dots` and `weigh`, and each head's tokens at once      15    32
    the same, in four portions                              14    30
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from numba import carray
from numba.core.ccallback import CFunc

from .compiled import bits_of, compiled, edition, exp, machine_code, number, numbers_at, pointer
from .products import prefetch
from .vectors import LANES, dots, weigh


@cache
def attending(dtype: torch.dtype) -> CFunc:
    """`decode` in threads, each its share, and then `merge`; the order of the numbers is that of `cpu._attending`."""
    element, sources = {torch.float32: np.float32, torch.bfloat16: np.uint16}[dtype], edition()

    def share(address: int, step: int, part: int, parts: int) -> None:
        """One thread's pieces, or heads."""
        sources  # see `edition`
        n = numbers_at(address)
        tokens, heads, head_dim, blocks, block_size, kv_heads, sequences, longest = n[11:19]
        shares = carray(pointer(n[22]), n[21] + 1 + 4 * n[20], np.int64)
        pieces = shares[n[21] + 1:].reshape(n[20], 4)
        partials = carray(pointer(n[10]), (n[20], heads * (head_dim + 2)), np.float32)
        # A single row may say anything of where the next one begins.
        query = carray(pointer(n[4]), (tokens, max(n[8], heads * head_dim)), element)
        keys = carray(pointer(n[6]), (blocks * block_size, kv_heads, head_dim), element)
        values = carray(pointer(n[7]), (blocks * block_size, kv_heads, head_dim), element)
        block_tables = carray(pointer(n[9]), (sequences, longest), np.int64)
        if step:
            merge(pieces, partials, carray(pointer(n[5]), (tokens, heads, head_dim), element), part, parts)
        else:
            for one in range(part, n[21], parts):
                mine = slice(shares[one], shares[one + 1])
                decode(query, keys, values, block_size, pieces[mine], block_tables,
                       np.float32(n[19:20].view(np.float64)[0]), partials[mine])

    return machine_code(share)


@cache
def writing() -> CFunc:
    """Rows of keys and values into their slots; the order of the numbers is that of `cpu._writing`."""
    sources = edition()

    def copy(address: int, step: int, part: int, parts: int) -> None:
        """One thread's rows."""
        sources  # see `edition`
        n = numbers_at(address)
        slots, rows = carray(pointer(n[8]), n[10], np.int64), carray(pointer(n[9]), n[10], np.int64)
        for i in range(part * n[10] // parts, (part + 1) * n[10] // parts):
            for k in range(2):
                source = carray(pointer(n[4 + k] + (rows[i] if n[9] else i) * n[11 + k]), n[13], np.uint8)
                target = carray(pointer(n[6 + k] + slots[i] * n[13]), n[13], np.uint8)
                for byte in range(n[13]):
                    target[byte] = source[byte]

    return machine_code(copy)


@compiled
def decode(query: np.ndarray, keys: np.ndarray, values: np.ndarray, block_size: int, pieces: np.ndarray,
           block_tables: np.ndarray, scale: float, partials: np.ndarray) -> None:
    """Attention of one new token a sequence over pieces of sequences, each by itself.

    Parameters
    ----------
    query : array [tokens, at least heads * head_dim]
        The packed tokens; float32, or uint16 with the bits of bfloat16, as are ``keys`` and ``values``.
    keys, values : array [slots, kv_heads, head_dim]
        One layer of the cache.
    block_size : int
        Slots of a block.
    pieces : int64 array [pieces, 4]
        Of each the sequence of the batch, the row of its new token, and which tokens: the first, and behind the last.
    block_tables : int64 array [sequences of the batch, logical blocks]
        Physical block numbers.
    scale : float32
        The factor on the dot products.
    partials : float32 array [pieces, heads * head_dim + 2 * heads]
        Receives what `merge` takes, of all heads: the sums of `add_tokens`, the largest scores, and the totals.
    """
    head_dim = keys.shape[2]
    heads = partials.shape[1] // (head_dim + 2)
    for n in range(len(pieces)):
        piece, following = pieces[n], pieces[min(n + 1, len(pieces) - 1)]
        table, position, end = block_tables[piece[0]], piece[2], piece[3]
        q = query[piece[1]][:heads * head_dim].reshape(heads, head_dim)
        o, largest, total = _parts(partials[n], heads, head_dim)
        largest[:], total[:], o[:] = -np.inf, 0, 0
        while position < end:
            slots = _slots(table, position, end, block_size)
            position += slots[1] - slots[0]
            ahead = _slots(table, position, end, block_size) if position < end else (
                _slots(block_tables[following[0]], following[2], following[3], block_size))
            add_tokens(q, keys[slots[0]:slots[1]], values[slots[0]:slots[1]], scale, largest, total, o,
                       keys[ahead[0]:ahead[1]], values[ahead[0]:ahead[1]])


@compiled
def merge(pieces: np.ndarray, partials: np.ndarray, output: np.ndarray, part: int, parts: int) -> None:
    """The pieces of each sequence, which `decode` left one behind the other, become its row of the output.

    Parameters
    ----------
    pieces, partials : arrays
        As of `decode`.
    output : array [tokens, heads, head_dim]
        The rows of these sequences are written, of some of the heads: of a part of so many.
    """
    heads, head_dim = output.shape[1:]
    first, row = 0, np.empty(head_dim, np.float32)
    for n in range(len(pieces)):
        if n + 1 < len(pieces) and pieces[n + 1, 0] == pieces[n, 0]:
            continue
        for h in range(part * heads // parts, (part + 1) * heads // parts):
            most, totals, row[:] = -np.float32(np.inf), np.float32(0), 0
            for k in range(first, n + 1):
                most = max(most, _parts(partials[k], heads, head_dim)[1][h])
            for k in range(first, n + 1):
                o, largest, total = _parts(partials[k], heads, head_dim)
                weight = exp(largest[h] - most)
                totals += weight * total[h]
                for d in range(head_dim):
                    row[d] += weight * o[h, d]
            for d in range(head_dim):
                output[pieces[n, 1], h, d] = bits_of(row[d] / totals, output)
        first = n + 1


@compiled
def _parts(partial: np.ndarray, heads: int, head_dim: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of a piece: the sums [heads, head_dim], the largest scores [heads] and the totals [heads]."""
    rest = partial[heads * head_dim:]
    return partial[:heads * head_dim].reshape(heads, head_dim), rest[:heads], rest[heads:]


@compiled
def _slots(table: np.ndarray, position: int, end: int, block_size: int) -> tuple[int, int]:
    """The first slot and the end of those, at most `LANES`, that lie together from a token of a sequence on."""
    offset = position % block_size
    slot = table[position // block_size] * block_size + offset
    return slot, slot + min(LANES, block_size - offset, end - position)


@compiled
def add_tokens(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, largest: np.ndarray, total: np.ndarray,
               o: np.ndarray, k_ahead: np.ndarray, v_ahead: np.ndarray) -> None:
    """Add at most `LANES` tokens to a sequence's sums: in ``o`` [heads, head_dim] that of the values, each times the
    exponential of its score, in ``total`` [heads] that of the exponentials, relative to the ``largest`` score so far.
    What no vector is filled with at the end of a row is added number by number."""
    (heads, head_dim), group = q.shape, len(q) // k.shape[1]
    vectors = head_dim * k.itemsize // (4 * LANES)
    rest = range(vectors * 4 * LANES // k.itemsize, head_dim)
    a = np.empty(LANES, np.float32)  # a head's scores, then their exponentials
    for h in range(heads):
        prefetch(k_ahead, 2 * h, 2 * heads)
        dots(q[h], k[:, h // group], vectors, a)
        prefetch(k_ahead, 2 * h + 1, 2 * heads)
        new_largest, added = largest[h], np.float32(0)
        for t in range(LANES):
            for d in rest:
                a[t] += number(q[h, d]) * number(k[min(t, len(k) - 1), h // group, d])
            a[t] = a[t] * scale if t < len(k) else -np.float32(np.inf)
        for t in range(LANES):
            new_largest = max(new_largest, a[t])
        for t in range(LANES):
            a[t] = exp(a[t] - new_largest)
            added += a[t]
        shrink = exp(largest[h] - new_largest)
        largest[h], total[h] = new_largest, total[h] * shrink + added
        for d in range(head_dim):
            o[h, d] *= shrink
        prefetch(v_ahead, 2 * h, 2 * heads)
        weigh(a, v[:, h // group], vectors, o[h])
        prefetch(v_ahead, 2 * h + 1, 2 * heads)
        for t in range(len(v)):
            for d in rest:
                o[h, d] += a[t] * number(v[t, h // group, d])
