"""What an admitted request finds in the pool already, and how many blocks it needs besides (§4.4)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence as Items
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .blocks import BlockAllocator
from .prefix import PrefixCachingAllocator, block_keys

if TYPE_CHECKING:
    from ..sequence import Sequence, SequenceGroup


@dataclass
class Plan:
    """How one sequence is to get its blocks.

    Attributes
    ----------
    reused : list[int]
        Physical blocks that hold its first tokens already.
    covered : int
        How many tokens that is.
    keys : sequence of hashables
        One per logical block; blocks with equal keys hold the same keys and values.
    """

    seq: "Sequence"
    reused: list[int]
    covered: int
    keys: Items[Hashable]
    block_size: int

    @property
    def first_own(self) -> int:
        """The first logical block that the sequence writes to: the one behind the reused ones, or the last of these
        if it has room and there are tokens to go into it (§4.4: "with the last block marked copy-on-write")."""
        return len(self.reused) if self.covered == len(self.seq.token_ids) else self.covered // self.block_size


def make_plans(group: "SequenceGroup", device: BlockAllocator, block_size: int,
               prefixes: list[tuple[list[int], list[int]]]) -> list[Plan]:
    """A plan for each unfinished sequence of a group.

    Parameters
    ----------
    device : BlockAllocator
        Where to look; a `PrefixCachingAllocator` finds full blocks by their keys.
    prefixes : list of (token ids, physical blocks)
        What the provider registered.
    """
    seqs, plans = group.unfinished, []
    for seq in seqs:
        # One sequence without a cache to look into needs no digests: its blocks differ from each other anyway.
        if isinstance(device, PrefixCachingAllocator) or len(seqs) > 1:
            keys: Items[Hashable] = block_keys(seq.token_ids, block_size)
        else:
            keys = range(-(-len(seq.token_ids) // block_size))
        reused = device.find_all(keys) if isinstance(device, PrefixCachingAllocator) else []
        covered = len(reused) * block_size
        for prefix, blocks in prefixes:
            if len(prefix) > covered and seq.token_ids[:len(prefix)] == prefix:
                reused, covered = blocks, len(prefix)
        plans.append(Plan(seq, reused, covered, keys, block_size))
    return plans


def blocks_needed(plans: list[Plan], device: BlockAllocator) -> int:
    """Free blocks that the plans take: new ones, and reused ones that nobody reads now."""
    new = {key for plan in plans for key in plan.keys[plan.first_own:]}
    revived = {block for plan in plans for block in plan.reused if device.ref_counts[block] == 0}
    return len(new) + len(revived)
