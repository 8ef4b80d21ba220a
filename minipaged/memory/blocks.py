"""Physical blocks of one pool: which are free, and how many readers each of the others has (§4.2, §4.4)."""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import DoubleFree, InvalidConfig, OutOfBlocks


class BlockAllocator:
    """Hands out the blocks of one pool and counts their readers.

    A block is a number; its bytes are row ``number`` of every layer's tensors (`memory.cache.KVCache`).
    The free list is a stack, as in vLLM v0.1: the block freed last is handed out first. A new pool starts with 0.

    Parameters
    ----------
    num_blocks : int
        Blocks in the pool.
    pool : str
        "device" or "host", for messages.

    Source: §4.2 "block engine", §4.4 reference counts, Figure 4 "GPU / CPU Block Allocator".
    """

    def __init__(self, num_blocks: int, pool: str = "device") -> None:
        self.num_blocks, self.pool = num_blocks, pool
        self.free_list = list(reversed(range(num_blocks)))
        self.ref_counts = [0] * num_blocks

    @property
    def num_free(self) -> int:
        """Blocks without a reader."""
        return len(self.free_list)

    def allocate(self) -> int:
        """A free block, now with one reader.

        Raises
        ------
        OutOfBlocks
            All blocks have readers.
        """
        if not self.free_list:
            raise OutOfBlocks(f"all {self.num_blocks} blocks of the {self.pool} pool are in use; "
                              "ask num_free first, or preempt a request")
        block = self.free_list.pop()
        self.ref_counts[block] = 1
        return block

    def share(self, block: int) -> None:
        """Count one more reader of a block that is in use.

        Raises
        ------
        DoubleFree
            The block is free: there is nothing in it to share.
        """
        if self.ref_counts[block] == 0:
            raise DoubleFree(f"block {block} of the {self.pool} pool is free and cannot be shared; allocate it")
        self.ref_counts[block] += 1

    def free(self, block: int) -> None:
        """Count one reader less; without readers the block is free.

        Raises
        ------
        DoubleFree
            The block is free already.
        """
        if self.ref_counts[block] == 0:
            raise DoubleFree(f"block {block} of the {self.pool} pool is free already; some table kept it too long")
        self.ref_counts[block] -= 1
        if self.ref_counts[block] == 0:
            self._release(block)

    def _release(self, block: int) -> None:
        self.free_list.append(block)

    def hand_out_next(self, blocks: Iterable[int]) -> None:
        """Put these free blocks on top of the free list, the first on the very top.

        In a server that has run for a while the free list is in no order; a figure of the paper shows one such
        moment, and this sets it up.

        Raises
        ------
        InvalidConfig
            One of them is not free.
        """
        wanted = list(blocks)
        if not set(wanted) <= set(self.free_list):
            raise InvalidConfig(f"{wanted} are not all free in the {self.pool} pool; free are {sorted(self.free_list)}")
        self.free_list = [block for block in self.free_list if block not in wanted] + wanted[::-1]

    def __repr__(self) -> str:
        return f"BlockAllocator({self.pool}: {self.num_blocks - self.num_free} of {self.num_blocks} blocks in use)"
