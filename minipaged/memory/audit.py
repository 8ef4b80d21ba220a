"""The bookkeeper: checks after a step that tables, reference counts and free lists agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..errors import AuditError
from .manager import BlockSpaceManager

if TYPE_CHECKING:
    from ..sequence import Sequence


def audit(manager: BlockSpaceManager) -> None:
    """Check every block of both pools.

    Raises
    ------
    AuditError
        Free and used blocks do not add up to the pool, a reference count differs from the table entries that name
        its block, a table names a free block, or a table has more or fewer blocks than its tokens need.
    """
    for pool, on_host in ((manager.device, False), (manager.host, True)):
        tables = {seq: t for seq, t in manager.block_tables.items() if (seq in manager.swapped) == on_host}
        entries = Counter(block for table in tables.values() for block in table.blocks)
        free = Counter([*pool.free_list, *getattr(pool, "kept", ())])
        used = {block for block, count in enumerate(pool.ref_counts) if count}
        for block in used | entries.keys():
            _require(entries[block] == pool.ref_counts[block],
                     f"{pool.pool} block {block} is in {entries[block]} tables but counts {pool.ref_counts[block]}")
        wrong = [block for block, times in free.items() if times > 1 or block in used]
        for block in wrong or set(range(pool.num_blocks)) - free.keys() - used:
            _require(False, f"{pool.pool} block {block} has {pool.ref_counts[block]} readers "
                            f"and stands {free[block]} times in the free list")
    for seq, table in manager.block_tables.items():
        _require(len(table.blocks) == manager.blocks_for(table.num_tokens),
                 f"sequence {seq} has {table.num_tokens} tokens in {len(table.blocks)} blocks")


def audit_writes(manager: BlockSpaceManager, seqs: Iterable["Sequence"]) -> None:
    """Check the slots that an iteration is about to write, before it runs.

    Several sequences of a request that is recomputed may read what one of them writes in this very iteration; they
    know these tokens as shared, and do not write them.

    Raises
    ------
    AuditError
        Two sequences write to one block, or one writes to a block that others have read.
    """
    writers: dict[int, int] = {}
    for seq in seqs:
        table = manager.get_block_table(seq)
        first = max(seq.num_computed, table.num_shared)
        for logical in range(first // manager.block_size, len(table.blocks)) if first < table.num_tokens else ():
            block, end = table.blocks[logical], logical * manager.block_size + table.filled(logical)
            _require(block not in writers, f"block {block} has two writers: {writers.get(block)} and {seq.seq_id}")
            writers[block] = seq.seq_id
            if manager.device.ref_counts[block] > 1:
                for reader, other in manager.block_tables.items():
                    known = reader == seq.seq_id or reader in manager.swapped or other.num_shared >= end
                    _require(known or block not in other.blocks,
                             f"sequence {seq.seq_id} writes to block {block}, which {reader} reads: copy it first")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise AuditError(f"{message}; this is a fault of minipaged, not of its caller")
