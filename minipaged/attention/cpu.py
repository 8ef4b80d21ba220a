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

from itertools import accumulate, chain
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..compiled import run, work
from ..decoding import attending, writing
from ..vectors import LANES
from . import plain

if TYPE_CHECKING:
    from . import PagedBatch

WORTH_A_THREAD = 1 << 19  # bytes of keys and values, read in the time that it takes to wake another thread


def write(key: torch.Tensor, value: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor,
          rows: torch.Tensor | None) -> None:
    """New keys and values into their slots; the contract is that of `minipaged.attention`."""
    key, value = _in_rows(key), _in_rows(value)
    run(_writing(key, value, keys, values, slots, rows))


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
        run(_attending(batch, query, output, keys, values, scale))
    return output


def works(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor, batch: "PagedBatch",
          scale: float) -> np.ndarray:
    """Of a batch without prompts what `minipaged.compiled.run` takes to write and to attend, in all layers.

    Parameters
    ----------
    query, key, value, output, batch, scale
        As in `minipaged.attention`; the same tensors in each layer, which must live until the works are done. The
        heads of a token lie one behind the other.

    Returns
    -------
    int64 array [layers, 2 (write, attend), WORK]
    """
    keys, values = batch.cache.layers[0]
    first = np.concatenate([_writing(key, value, keys, values, batch.write_slots, batch.write_rows),
                            _attending(batch, query, output, keys, values, scale)])
    first[0, 0] = first[1, 0]  # those that attend are awake
    layers = np.arange(len(batch.cache.layers))[:, None, None]
    of_layers = np.repeat(first[None], len(layers), axis=0)
    of_layers[:, :, 6:8] += layers * batch.cache.data[0].nbytes  # where its keys and values are
    return of_layers


def _in_rows(x: torch.Tensor) -> torch.Tensor:
    """[tokens, heads, head_dim] with the heads of a token one behind the other, as the compiled code takes it; the next
    token may begin anywhere behind them."""
    together = x.stride()[1:] == (x.shape[2], 1) and (len(x) == 1 or x.stride(0) >= x.shape[1] * x.shape[2])
    return x if together else x.contiguous()


def _writing(key: torch.Tensor, value: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor,
             rows: torch.Tensor | None) -> np.ndarray:
    """The work of `write`: in one thread, as of a token there is far less to write than to read of the weights."""
    assert key.dtype == value.dtype == keys.dtype, "the cache has the model's type"
    return work(writing(), 1, 1, *(x.data_ptr() for x in (key, value, keys, values, slots)),
                0 if rows is None else rows.data_ptr(), len(slots), *(x.stride(-3) * x.itemsize for x in (key, value, keys)))


def _attending(batch: "PagedBatch", query: torch.Tensor, output: torch.Tensor, keys: torch.Tensor, values: torch.Tensor,
               scale: float) -> np.ndarray:
    """The work of `attend`, made at the first layer of an iteration and used in all; the arrays are a layer's own."""
    if not hasattr(batch, "cpu_work"):
        shares = _shares(batch, 2 * keys[0, 0].nbytes)
        batch.cpu_shares = np.array([*accumulate(map(len, shares), initial=0), *chain(*sum(shares, []))])
        pieces = int(batch.cpu_shares[len(shares)])
        batch.cpu_partials = torch.empty(pieces, query.shape[1] * (query.shape[2] + 2), dtype=torch.float32)
        batch.cpu_work = work(
            attending(keys.dtype), len(shares), 2, 0, 0, 0, 0, 0, batch.block_tables.data_ptr(),
            batch.cpu_partials.data_ptr(), *query.shape, *keys.shape[:3], *batch.block_tables.shape,
            np.float64(scale).view(np.int64), pieces, len(shares), batch.cpu_shares.ctypes.data)
    batch.cpu_work[0, 4:9] = [*(array.data_ptr() for array in (query, output, keys, values)), query.stride(0)]
    return batch.cpu_work


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
