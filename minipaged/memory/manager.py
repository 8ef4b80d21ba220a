"""Gives every sequence its block table; the only operations are allocate, append, fork, free and swap (§4.2-§4.5)."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from .. import trace as ev
from ..display import Shown
from ..errors import OutOfBlocks
from .blocks import BlockAllocator
from .plan import Plan, blocks_needed, make_plans
from .prefix import PrefixCachingAllocator, block_key
from .swap import distinct_blocks, move_tables
from .table import BlockTable

if TYPE_CHECKING:
    from collections.abc import Hashable

    from ..sequence import Sequence, SequenceGroup


class BlockSpaceManager(Shown):
    """Gives every sequence its block table, out of a device and a host pool.

    Parameters
    ----------
    block_size : int
        Tokens per block.
    num_gpu_blocks, num_cpu_blocks : int
        Blocks of the device and of the host pool.
    watermark : float
        Share of the device pool left free when a request is admitted beside others, so that those can still grow.
        The paper has none; vLLM v0.1 leaves 0.01.
    enable_prefix_caching : bool
        Find full blocks again by their contents.
    trace : Trace
        Where what happens is told.

    Source: §4.2 "KV cache manager", Figure 4.
    """

    def __init__(self, block_size: int, num_gpu_blocks: int, num_cpu_blocks: int, watermark: float = 0.01,
                 enable_prefix_caching: bool = False, trace: ev.Trace = ev.NO_TRACE) -> None:
        self.block_size, self.trace, self.caching = block_size, trace, enable_prefix_caching
        self.device = (PrefixCachingAllocator if enable_prefix_caching else BlockAllocator)(num_gpu_blocks, "device")
        self.host = BlockAllocator(num_cpu_blocks, "host")
        self.watermark_blocks = int(watermark * num_gpu_blocks)
        self.block_tables: dict[int, BlockTable] = {}
        self.swapped: set[int] = set()  # sequences whose tables name host blocks
        self.prefixes: dict[int, list[int]] = {}  # pinned by the provider: sequence that reads it, its tokens

    # ---- admission -------------------------------------------------------------------------------------------

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold so many tokens: ceil(tokens / block size)."""
        return -(-num_tokens // self.block_size)

    def can_allocate(self, group: "SequenceGroup", beside_others: bool) -> bool:
        """Whether the group's tokens fit now; beside other requests the watermark stays free."""
        return self._fits(blocks_needed(self._plan(group), self.device), beside_others)

    def _fits(self, blocks: int, beside_others: bool) -> bool:
        return self.device.num_free - blocks >= (self.watermark_blocks if beside_others else 0)

    def allocate(self, group: "SequenceGroup") -> list[tuple[int, int]]:
        """Give each sequence blocks for its tokens and no more (§4.3: "as tokens need them").

        Leading blocks whose keys and values are there already are shared: those of a registered prefix, those found
        by the hash chain, and those that two sequences of the group have in common when both are computed anew.
        ``seq.num_computed`` then says how many tokens need not go through the model; the last one always does, since
        its logits are wanted.

        Returns
        -------
        list[(src, dst)]
            Copies to make before the model runs, as in `append_slot`.

        Raises
        ------
        OutOfBlocks
            They do not fit; nothing is allocated then.
        """
        plans, made, copies = self._plan(group), {}, []
        if not self._fits(blocks_needed(plans, self.device), beside_others=False):
            raise OutOfBlocks(f"request {group.request_id} does not fit in {self.device.num_free} free blocks; "
                              "ask can_allocate first")
        for plan in plans:  # all that is found, before anything is handed out: it might be what was found
            table = self.block_tables[plan.seq.seq_id] = BlockTable(self.block_size, [], 0)
            for block in plan.reused:
                self._share(plan.seq, table, block)
        for plan in plans:
            copies += self._fill(plan, made)
        return copies

    def _plan(self, group: "SequenceGroup") -> list[Plan]:
        prefixes = [(tokens, self.block_tables[seq_id].blocks) for seq_id, tokens in self.prefixes.items()]
        return make_plans(group, self.device, self.block_size, prefixes)

    def _fill(self, plan: Plan, made: dict["Hashable", int]) -> list[tuple[int, int]]:
        """Complete a table behind its reused blocks; ``made`` are the blocks of the group made so far, by key."""
        seq, table, copies = plan.seq, self.block_tables[plan.seq.seq_id], []
        table.num_shared = plan.covered
        for logical in range(plan.first_own, len(plan.keys)):
            key = plan.keys[logical]
            if logical < len(table.blocks):
                copies += self._copy_on_write(seq, table, made.get(key))
            elif key in made:
                self._share(seq, table, made[key])
            else:
                self._extend(seq, table)
            if key in made:
                table.num_shared = min((logical + 1) * self.block_size, len(seq.token_ids))
            made[key] = table.blocks[logical]
        table.num_tokens = len(seq.token_ids)
        table.keys = list(plan.keys[:table.num_tokens // self.block_size]) if self.caching else []
        seq.num_computed = min(table.num_shared, len(seq.token_ids) - 1)
        self.trace.emit(ev.Write, seq=seq.seq_id, start=table.num_shared, end=table.num_tokens)
        return copies

    # ---- the three ways to get a block -----------------------------------------------------------------------

    def _extend(self, seq: "Sequence", table: BlockTable) -> None:
        table.blocks.append(self.device.allocate())
        self.trace.emit(ev.Allocate, seq=seq.seq_id, logical=len(table.blocks) - 1, block=table.blocks[-1])

    def _share(self, seq: "Sequence", table: BlockTable, block: int) -> None:
        self.device.share(block)
        table.blocks.append(block)
        self.trace.emit(ev.Share, seq=seq.seq_id, logical=len(table.blocks) - 1, block=block)

    def _copy_on_write(self, seq: "Sequence", table: BlockTable, copied: int | None = None) -> list[tuple[int, int]]:
        """Move the last entry of a table from a shared block to a copy of its own, or to one that exists (§4.4)."""
        source = table.blocks[-1]
        if copied is None:
            target = self.device.allocate()
        else:
            target = copied
            self.device.share(target)
        table.blocks[-1] = target
        self.device.free(source)
        self.trace.emit(ev.Copy, seq=seq.seq_id, logical=len(table.blocks) - 1, src=source, dst=target)
        return [(source, target)] if copied is None else []

    # ---- decoding --------------------------------------------------------------------------------------------

    def can_append_slots(self, groups: list["SequenceGroup"]) -> bool:
        """Whether each sequence of these groups can take one more token now."""
        if sum(len(group.seqs) for group in groups) <= self.device.num_free:
            return True  # a token takes one block at most
        tables = [self._tables(group) for group in groups]
        return sum(self._blocks_to_append(each, self.device) for each in tables) <= self.device.num_free

    def _blocks_to_append(self, tables: list[BlockTable], pool: BlockAllocator) -> int:
        """Blocks that one more token for each of the sequences of a group takes."""
        if len(tables) == 1:
            return int(tables[0].is_full or pool.ref_counts[tables[0].blocks[-1]] > 1)
        new = sum(table.is_full for table in tables)
        writers = Counter(table.blocks[-1] for table in tables if not table.is_full)
        # Of the writers to one shared block each copies it, but the last reader writes in place.
        return new + sum(min(count, pool.ref_counts[block] - 1) for block, count in writers.items())

    def append_slot(self, seq: "Sequence") -> list[tuple[int, int]]:
        """Give the sequence's newest token a slot: §5.2's ``append``.

        Returns
        -------
        list[(src, dst)]
            Copy-on-write: the contents of block ``src`` must be copied to block ``dst`` before anything is written;
            empty if the sequence writes into a block of its own.

        Raises
        ------
        OutOfBlocks
            A block is needed and none is free; nothing is changed then.
        """
        table, copies = self.block_tables[seq.seq_id], []
        if table.is_full:
            self._extend(seq, table)
        elif self.device.ref_counts[table.blocks[-1]] > 1:
            copies = self._copy_on_write(seq, table)
        table.num_tokens += 1
        if self.trace is not ev.NO_TRACE:  # once for every token: worth a question
            self.trace.emit(ev.Write, seq=seq.seq_id, start=table.num_tokens - 1, end=table.num_tokens)
        return copies

    def mark_computed(self, seq: "Sequence") -> None:
        """Make the full blocks of a sequence findable, now that their keys and values are in the cache."""
        if self.caching:
            table = self.block_tables[seq.seq_id]
            for logical in range(seq.num_computed // self.block_size, table.num_tokens // self.block_size):
                start = logical * self.block_size
                if logical == len(table.keys):
                    table.keys.append(block_key(table.keys[-1] if table.keys else b"",
                                                seq.token_ids[start:start + self.block_size]))
                self.device.remember(table.blocks[logical], table.keys[logical])

    def fork(self, parent: "Sequence", child: "Sequence") -> None:
        """Let ``child`` read all blocks of ``parent`` (§5.2); copies come with the first write (§4.4)."""
        source = self.block_tables[parent.seq_id]
        table = BlockTable(self.block_size, [], source.num_tokens, source.num_shared, list(source.keys))
        self.block_tables[child.seq_id] = table
        for block in source.blocks:
            self._share(child, table, block)

    def free(self, seq: "Sequence") -> None:
        """Give up all blocks of a sequence, in whichever pool they are (§5.2); without a table, nothing."""
        if seq.seq_id in self.block_tables:
            self._free(seq.seq_id)

    def free_all_but(self, seq_ids: set[int]) -> None:
        """Free the tables of all sequences but these and the registered prefixes: forks that nobody got."""
        for seq_id in self.block_tables.keys() - seq_ids - self.prefixes.keys():
            self._free(seq_id)

    def _free(self, seq_id: int) -> None:
        table, on_host = self.block_tables.pop(seq_id), seq_id in self.swapped
        self.swapped.discard(seq_id)
        for block in reversed(table.blocks):  # the first block lands on top: the next request gets them in this order
            (self.host if on_host else self.device).free(block)
        if table.blocks:  # none, if an allocation failed at the first: then the trace knows of no table either
            self.trace.emit(ev.Free, seq=seq_id, blocks=list(table.blocks), host=on_host)

    # ---- swapping --------------------------------------------------------------------------------------------

    def can_swap_out(self, group: "SequenceGroup") -> bool:
        """Whether the host pool has a block for each of the group's device blocks."""
        return len(distinct_blocks(self._tables(group))) <= self.host.num_free

    def swap_out(self, group: "SequenceGroup") -> list[tuple[int, int]]:
        """Move all blocks of a group to the host pool (§4.5); what was shared stays shared.

        Returns
        -------
        list[(device block, host block)]
            The copies to make.

        Raises
        ------
        OutOfBlocks
            The host pool has too few; nothing is changed then.
        """
        pairs = move_tables(self._tables(group), self.device, self.host)
        self.swapped.update(seq.seq_id for seq in group.unfinished)
        self.trace.emit(ev.SwapOut, request=group.request_id, blocks=[list(pair) for pair in pairs])
        return pairs

    def can_swap_in(self, group: "SequenceGroup", beside_others: bool) -> bool:
        """Whether the group fits into the device pool again and each of its sequences can take its next token."""
        tables = self._tables(group)
        needed = len(distinct_blocks(tables)) + self._blocks_to_append(tables, self.host)
        return self._fits(needed, beside_others)

    def swap_in(self, group: "SequenceGroup") -> list[tuple[int, int]]:
        """Move all blocks of a group back to the device pool: (host block, device block); errors as in `swap_out`."""
        pairs = move_tables(self._tables(group), self.host, self.device)
        self.swapped.difference_update(seq.seq_id for seq in group.unfinished)
        self.trace.emit(ev.SwapIn, request=group.request_id, blocks=[list(pair) for pair in pairs])
        return pairs

    def _tables(self, group: "SequenceGroup") -> list[BlockTable]:
        return [self.block_tables[seq.seq_id] for seq in group.unfinished]

    # ---- registered prefixes ---------------------------------------------------------------------------------

    @property
    def num_pinned(self) -> int:
        """Blocks that registered prefixes hold for good."""
        return len({block for seq_id in self.prefixes for block in self.block_tables[seq_id].blocks})

    def num_pinned_full(self, token_ids: list[int]) -> int:
        """Full blocks that a prompt finds in a registered prefix."""
        return max((len(prefix) // self.block_size for prefix in self.prefixes.values()
                    if token_ids[:len(prefix)] == prefix), default=0)

    # ---- reading ---------------------------------------------------------------------------------------------

    def get_block_table(self, seq: "Sequence") -> BlockTable:
        """The table of a sequence that is running or swapped out."""
        return self.block_tables[seq.seq_id]

    def _rows(self) -> tuple[list[str], list[tuple[object, ...]], str]:
        rows = [(seq, len(t.blocks), t.num_tokens, " ".join(map(str, t.blocks)))
                for seq, t in self.block_tables.items()]
        used = self.device.num_blocks - self.device.num_free
        return ["sequence", "blocks", "tokens", "physical blocks"], rows, (
            f"{used} of {self.device.num_blocks} device blocks of {self.block_size} tokens in use, "
            f"{self.host.num_blocks - self.host.num_free} of {self.host.num_blocks} host blocks")
