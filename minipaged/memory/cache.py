"""The tensors behind the blocks: one chunk of device memory, cut into blocks (§4.2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

Pairs = list[tuple[int, int]]


class BlockMoves(NamedTuple):
    """What moves blocks of all layers; ``pairs`` are (source, destination).

    Attributes
    ----------
    copy : Callable(data, pairs)
        Within the device's pool; all sources are read before any destination is written.
    swap_out, swap_in : Callable(source, target, pairs)
        From the device's pool to the host's, and back (§4.5).
    """

    copy: Callable[[torch.Tensor, Pairs], None]
    swap_out: Callable[[torch.Tensor, torch.Tensor, Pairs], None]
    swap_in: Callable[[torch.Tensor, torch.Tensor, Pairs], None]


class KVCache:
    """Keys and values of all layers, block by block.

    Parameters
    ----------
    num_layers, num_blocks, num_host_blocks, block_size, num_kv_heads, head_dim : int
        The shape. One block number names the same row of every layer's key and value tensor.
    dtype : torch.dtype
        Of the elements.
    device : torch.device
        Where the chunk lies.
    moves : BlockMoves
        Plain PyTorch, or kernels.

    Attributes
    ----------
    data : Tensor [layers, 2 (key, value), blocks, block_size, kv_heads, head_dim]
        The one chunk; ``data.nbytes`` are its bytes.
    layers : list[tuple[Tensor, Tensor]]
        Key and value tensor of each layer, views of the chunk, each [blocks, block_size, kv_heads, head_dim].
    host : Tensor [layers, 2, host blocks, block_size, kv_heads, head_dim]
        The same in main memory, for swapped-out blocks (§4.5); page-locked beside a GPU, which copies from such alone
        at full speed.

    Source: §4.2 "block engine"; §4.1 footnote 1 (one table for all layers and heads).
    """

    def __init__(self, num_layers: int, num_blocks: int, num_host_blocks: int, block_size: int, num_kv_heads: int,
                 head_dim: int, dtype: torch.dtype, device: torch.device, moves: BlockMoves | None = None) -> None:
        self.block_size, self.moves = block_size, moves or PLAIN
        per_block = block_size, num_kv_heads, head_dim
        self.data = torch.empty(num_layers, 2, num_blocks, *per_block, dtype=dtype, device=device)
        self.layers = [tuple(layer) for layer in self.data]
        self.host = torch.empty(num_layers, 2, num_host_blocks, *per_block, dtype=dtype,
                                pin_memory=device.type == "cuda" and num_host_blocks > 0)

    def copy_blocks(self, pairs: Pairs) -> None:
        """All copy-on-write copies of an iteration in one call (§5.1 "fused block copy").

        Parameters
        ----------
        pairs : list[(source, destination)]
            A source may also be a destination: all sources are read before any destination is written.
        """
        self.moves.copy(self.data, pairs)

    def swap_out(self, pairs: Pairs) -> None:
        """Copy device blocks to host blocks; ``pairs`` are (device, host)."""
        self.moves.swap_out(self.data, self.host, pairs)

    def swap_in(self, pairs: Pairs) -> None:
        """Copy host blocks to device blocks; ``pairs`` are (host, device)."""
        self.moves.swap_in(self.host, self.data, pairs)

    def poison(self, blocks: list[int]) -> None:
        """Fill blocks with NaN, so that whoever reads them after their release shows it."""
        if blocks:
            self.data[:, :, torch.tensor(blocks, device=self.data.device)] = float("nan")


def _copy(source: torch.Tensor, target: torch.Tensor, pairs: Pairs) -> None:
    if pairs:
        read, write = torch.tensor(pairs).T
        read, write = read.to(source.device), write.to(target.device)
        for blocks, copies in zip(source.flatten(0, 1), target.flatten(0, 1)):  # layer by layer: less memory in between
            copies[write] = blocks[read].to(copies.device)  # [pairs, block_size, kv_heads, head_dim]


PLAIN = BlockMoves(lambda data, pairs: _copy(data, data, pairs), _copy, _copy)
