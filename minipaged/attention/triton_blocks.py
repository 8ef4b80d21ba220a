"""The paper's other two fused GPU kernels in Triton (§5.1), which move keys and values without computing anything.

- "Fused reshape and block write": `reshape_and_cache`;
- "Fused block copy": `copy_blocks`, all copies of an iteration in one launch. The same kernel gathers scattered blocks
  into one piece, so that swapping (§4.5) crosses the bus in one large copy, not in many of a block each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..memory.cache import BlockMoves


@triton.jit
def write_kernel(key, value, keys, values, slots, rows, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """One program copies the keys and values of one token, [kv_heads, head_dim] = WIDTH elements, to its slot."""
    i = tl.program_id(0).to(tl.int64)
    slot, token = tl.load(slots + i).to(tl.int64), tl.load(rows + i).to(tl.int64) if rows is not None else i
    if slot >= 0:
        for start in range(0, WIDTH, CHUNK):
            element = start + tl.arange(0, CHUNK)
            inside = element < WIDTH
            tl.store(keys + slot * WIDTH + element, tl.load(key + token * WIDTH + element, inside), inside)
            tl.store(values + slot * WIDTH + element, tl.load(value + token * WIDTH + element, inside), inside)


@triton.jit
def move_kernel(source, target, pairs, source_stride, target_stride, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """One program copies CHUNK elements of a block, [layers * 2, blocks, WIDTH] with the given stride of the planes."""
    pair, plane = tl.program_id(0), tl.program_id(1).to(tl.int64)
    read = tl.load(pairs + 2 * pair).to(tl.int64)
    write = tl.load(pairs + 2 * pair + 1).to(tl.int64)
    element = tl.program_id(2) * CHUNK + tl.arange(0, CHUNK)
    data = tl.load(source + plane * source_stride + read * WIDTH + element, element < WIDTH)
    tl.store(target + plane * target_stride + write * WIDTH + element, data, element < WIDTH)


def copy_constants(width: int) -> dict[str, int]:
    """What ``write_kernel`` and ``move_kernel`` are compiled with for rows of ``width`` elements."""
    return dict(WIDTH=width, CHUNK=min(2048, triton.next_power_of_2(width)))


def reshape_and_cache(key: torch.Tensor, value: torch.Tensor, keys: torch.Tensor, values: torch.Tensor,
                      slots: torch.Tensor, rows: torch.Tensor | None = None) -> None:
    """Write new keys and values to their slots in one launch (§5.1 "fused reshape and block write").

    key, value : Tensor [tokens, kv_heads, head_dim] of the packed tokens; keys, values : one layer of the cache.
    slots : Tensor [writes], physical block * block_size + offset, -1 for none; rows : Tensor [writes], which tokens
    these are, or None for all of them in order.
    """
    if len(slots):
        write_kernel[len(slots),](key.contiguous(), value.contiguous(), keys, values, slots, rows,
                                  **copy_constants(key.shape[1] * key.shape[2]))


def copy_blocks(data: torch.Tensor, pairs: list[tuple[int, int]]) -> None:
    """All copy-on-write copies of an iteration, in all layers, in one launch (§5.1 "fused block copy").

    data : Tensor [layers, 2, blocks, ...], the pool; pairs : (source, destination), each. A source may be a destination
    too: all are read before any is written, which takes a second launch, since programs run in any order.
    """
    sources, destinations = zip(*pairs) if pairs else ((), ())
    if set(sources) & set(destinations):
        scatter_blocks(gather_blocks(data, sources), data, destinations)
    else:
        _move(data, data, pairs)


def gather_blocks(data: torch.Tensor, blocks: Sequence[int]) -> torch.Tensor:
    """Scattered blocks of all layers in one piece, Tensor [layers, 2, len(blocks), ...], to swap out in one copy."""
    staging = data.new_empty(*data.shape[:2], len(blocks), *data.shape[3:])
    _move(data, staging, [(block, i) for i, block in enumerate(blocks)])
    return staging


def scatter_blocks(staging: torch.Tensor, data: torch.Tensor, blocks: Sequence[int]) -> None:
    """The way back of `gather_blocks`, for swapping in."""
    _move(staging, data, list(enumerate(blocks)))


def _move(source: torch.Tensor, target: torch.Tensor, pairs: list[tuple[int, int]]) -> None:
    if pairs:
        constants = copy_constants(source[0, 0, 0].numel())
        grid = len(pairs), 2 * len(source), triton.cdiv(constants["WIDTH"], constants["CHUNK"])
        move_kernel[grid](source, target, torch.tensor(pairs, device=source.device), source.stride(1),
                          target.stride(1), **constants)


def swap_out(data: torch.Tensor, host: torch.Tensor, pairs: list[tuple[int, int]]) -> None:
    """Device blocks to host blocks: gathered on the GPU, then one copy. ``pairs`` are (device, host)."""
    if pairs:
        blocks, host_blocks = map(list, zip(*pairs))
        host[:, :, host_blocks] = gather_blocks(data, blocks).to(host.device)


def swap_in(host: torch.Tensor, data: torch.Tensor, pairs: list[tuple[int, int]]) -> None:
    """Host blocks to device blocks, the way back of `swap_out`. ``pairs`` are (host, device)."""
    if pairs:
        host_blocks, blocks = map(list, zip(*pairs))
        scatter_blocks(host[:, :, host_blocks].to(data.device), data, blocks)


MOVES = BlockMoves(copy_blocks, swap_out, swap_in)
