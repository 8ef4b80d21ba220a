"""Moving block tables between the pools, with what they share (§4.5)."""

from __future__ import annotations

from ..errors import OutOfBlocks
from .blocks import BlockAllocator
from .table import BlockTable


def distinct_blocks(tables: list[BlockTable]) -> list[int]:
    """The physical blocks of these tables, each once."""
    return list(dict.fromkeys(block for table in tables for block in table.blocks))


def move_tables(tables: list[BlockTable], source: BlockAllocator, target: BlockAllocator) -> list[tuple[int, int]]:
    """Give each block of these tables a block in the other pool: one for one, however many tables read it.

    Parameters
    ----------
    tables : list[BlockTable]
        All in ``source``; changed in place.

    Returns
    -------
    list[(source block, target block)]
        The copies to make.

    Raises
    ------
    OutOfBlocks
        The target pool has too few; nothing is changed then.
    """
    blocks = distinct_blocks(tables)
    if len(blocks) > target.num_free:
        raise OutOfBlocks(f"{len(blocks)} blocks do not fit in the {target.num_free} free ones of the {target.pool} "
                          "pool; ask can_swap_out or can_swap_in first")
    moved: dict[int, int] = {}
    try:
        for block in blocks:
            moved[block] = target.allocate()
    except BaseException:
        for block in moved.values():
            target.free(block)
        raise
    for table in tables:
        for block in table.blocks:
            target.share(moved[block])
            source.free(block)
        table.blocks = [moved[block] for block in table.blocks]
    for block in moved.values():  # the reader that `allocate` counted; those of the tables remain
        target.free(block)
    return list(moved.items())
