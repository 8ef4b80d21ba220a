"""What the slots of a pool hold: tokens, reservations, fragments (§3.1, Figures 2 and 3)."""

from __future__ import annotations

from typing import NamedTuple

from ..memory.manager import BlockSpaceManager
from .contiguous import ContiguousSpaceManager, Piece


def layout(manager: ContiguousSpaceManager | BlockSpaceManager) -> list[Piece]:
    """What every slot in use is used for: a piece per reservation or, paged, per physical block. A shared block counts
    once, for the reader that has filled most of it."""
    if isinstance(manager, ContiguousSpaceManager):
        return sorted(manager.pieces, key=lambda piece: piece.start)
    size, filled = manager.block_size, {}
    for seq, table in manager.block_tables.items():
        if seq not in manager.swapped:
            for logical, block in enumerate(table.blocks):
                filled[block] = max(filled.get(block, (0, seq)), (table.filled(logical), seq), key=lambda f: f[0])
    return [Piece(seq, block * size, used, 0, 0, size - used) for block, (used, seq) in sorted(filled.items())]


class Usage(NamedTuple):
    """Slots of a pool by what they are used for: the fields of `Piece`, and ``free`` ones in no piece at all."""

    tokens: float
    reserved: float
    internal: float
    rounding: float
    free: float

    def percent(self) -> tuple[float, ...]:
        """Each as a share of the pool in percent."""
        return tuple(100 * slots / sum(self) for slots in self)

    def figure_2(self) -> tuple[float, float, float, float]:
        """Percent of the pool as Figure 2 has it: token states, reservation, internal, external fragmentation & others.

        Free slots belong to the last. But where nothing is reserved, as in vLLM, the artifact's plotting rule gives
        half of them to reservation and half to internal fragmentation; "others" is what the last blocks have left.
        """
        tokens, reserved, internal, rounding, free = self.percent()
        if reserved + internal == 0:
            return tokens, free / 2, free / 2, rounding
        return tokens, reserved, internal, rounding + free


def usage(manager: ContiguousSpaceManager | BlockSpaceManager) -> Usage:
    """The present use of all slots of the pool; they add up to its size."""
    used = [sum(column) for column in list(zip(*layout(manager)))[2:]] or [0] * 4
    return Usage(*used, manager.device.num_blocks * manager.block_size - sum(used))
