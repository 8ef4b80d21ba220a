"""Block tables: from the logical blocks of a sequence to physical ones (§4.2)."""

from __future__ import annotations

from typing import TypeVar

from ..display import Shown

Position = TypeVar("Position")


def translate(block_table: "list[int]", position: Position, block_size: int) -> tuple[int, Position]:
    """The address of a token's keys and values: ``(physical block, offset)``.

    Parameters
    ----------
    block_table : list[int] or Tensor [logical blocks]
        Physical block numbers in logical order.
    position : int or Tensor
        Position of the token in its sequence, from 0.
    block_size : int
        Tokens per block.

    Source: §4.2; what a page table does to a virtual address.
    """
    return block_table[position // block_size], position % block_size


class BlockTable(Shown):
    """Maps the logical blocks of one sequence to physical ones.

    Attributes
    ----------
    blocks : list[int]
        Physical block of each logical block.
    num_tokens : int
        Slots given to tokens; they fill from the left, so that only the last block has room (§4.3).
    num_shared : int
        Leading tokens whose keys and values others had computed when the table was made: not this sequence's to write.
    keys : list[bytes]
        Keys of the full blocks, as far as they were needed (`memory.prefix`).

    Source: §4.2, Figure 6.
    """

    __slots__ = ("block_size", "blocks", "num_tokens", "num_shared", "keys")

    def __init__(self, block_size: int, blocks: list[int], num_tokens: int, num_shared: int = 0,
                 keys: list[bytes] | None = None) -> None:
        self.block_size, self.blocks, self.num_tokens, self.num_shared = block_size, blocks, num_tokens, num_shared
        self.keys = keys or []

    @property
    def is_full(self) -> bool:
        """Whether the next token needs a new block: the table's capacity is reached."""
        return self.num_tokens == len(self.blocks) * self.block_size

    def filled(self, logical: int) -> int:
        """Slots of a logical block given to tokens: the paper's "# filled"."""
        return min(self.num_tokens - logical * self.block_size, self.block_size)

    def copy(self) -> "BlockTable":
        """A table of its own over the same blocks."""
        return BlockTable(self.block_size, list(self.blocks), self.num_tokens, self.num_shared, list(self.keys))

    def _rows(self) -> tuple[list[str], list[tuple[int, int, str]]]:
        rows = [(i, block, f"{self.filled(i)}/{self.block_size}") for i, block in enumerate(self.blocks)]
        return ["logical block", "physical block", "filled"], rows
