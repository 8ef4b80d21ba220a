"""The memory of the systems before PagedAttention: one contiguous reservation per sequence (§3.1, §6.1), to compare.

`ContiguousSpaceManager` stands in for a `BlockSpaceManager`, so that the same scheduler drives both; `usage`
says what the slots of either hold.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

from ..errors import DoubleFree, InvalidConfig, OutOfBlocks, RequestTooLarge
from ..trace import NO_TRACE

if TYPE_CHECKING:
    from ..sequence import Sequence, SequenceGroup


def next_power_of_two(number: int) -> int:
    """The smallest power of two that is at least ``number`` (1 or more)."""
    return 1 << (number - 1).bit_length()


class BuddyAllocator:
    """Hands out chunks of neighbouring blocks; their sizes are powers of two.

    A chunk too big is halved until it fits; the halves are *buddies*, and one chunk again as soon as both are free.
    A chunk begins at a multiple of its size, so one XOR finds its buddy.

    Parameters
    ----------
    num_blocks : int
        Blocks in the pool. It is cut into chunks of ``max_chunk``, what remains into smaller powers of two.
    max_chunk : int
        Blocks of the largest chunk, a power of two.

    Source: §6.1 names the algorithm; the first cut and the free lists, last in first out, are the authors' artifact's.
    """

    def __init__(self, num_blocks: int, max_chunk: int) -> None:
        if num_blocks < 1 or max_chunk < 1 or max_chunk != next_power_of_two(max_chunk):
            raise InvalidConfig(f"{num_blocks} blocks, chunks up to {max_chunk}; give 1 or more, and a power of two")
        self.num_blocks, self.max_chunk = num_blocks, max_chunk
        self.free_lists: dict[int, list[int]] = {1 << i: [] for i in range(max_chunk.bit_length())}
        self.allocated: dict[int, int] = {}  # first block of a chunk in use: its size
        start = 0
        for size in reversed(self.free_lists):
            while start + size <= num_blocks:
                self.free_lists[size].append(start)
                start += size

    @property
    def num_free(self) -> int:
        """Blocks in free chunks, of whatever size."""
        return sum(size * len(starts) for size, starts in self.free_lists.items())

    def can_allocate(self, *sizes: int) -> bool:
        """Whether chunks of so many blocks are free at once, found out by trying; afterwards all is as it was."""
        starts: list[int] = []
        try:
            for size in sizes:
                starts.append(self.allocate(size))
        except OutOfBlocks:
            return False
        finally:
            for start in reversed(starts):
                self.free(start)
        return True

    def allocate(self, num_blocks: int) -> int:
        """First block of a free chunk of so many blocks, rounded up to a power of two.

        Raises
        ------
        OutOfBlocks
            No chunk is large enough, though the free blocks together may be.
        """
        wanted = next_power_of_two(num_blocks)
        size = next((size for size, starts in self.free_lists.items() if size >= wanted and starts), None)
        if size is None:
            raise OutOfBlocks(f"{self.num_free} of {self.num_blocks} blocks are free, but no chunk of {wanted}; "
                              "ask can_allocate first")
        start = self.free_lists[size].pop()
        while size > wanted:
            size //= 2
            self.free_lists[size].append(start + size)
        self.allocated[start] = wanted
        return start

    def free(self, start: int) -> None:
        """Give a chunk back; it merges with its buddy, and so on, while that is free. Else `DoubleFree`."""
        if start not in self.allocated:
            raise DoubleFree(f"no chunk in use begins at block {start}; some reservation was kept too long")
        size = self.allocated.pop(start)
        while size < self.max_chunk and start ^ size in self.free_lists[size]:
            self.free_lists[size].remove(start ^ size)
            start, size = min(start, start ^ size), 2 * size
        self.free_lists[size].append(start)


class Piece(NamedTuple):
    """Neighbouring slots that one sequence holds, in this order (§3.1, Figure 3): ``tokens`` with keys and values,
    ``reserved`` for later tokens, ``internal``: asked for and never used, ``rounding``: never asked for, but allocators
    give whole chunks or blocks."""

    owner: int
    start: int
    tokens: int
    reserved: int
    internal: int
    rounding: int


class ContiguousSpaceManager:
    """One chunk per sequence, from its admission to its end; stands in for a `BlockSpaceManager` in `Scheduler`.

    Nothing is shared, and nobody is preempted: there is always room for the next token.

    Parameters
    ----------
    estimate : "max", "pow2" or "oracle"
        Output tokens to reserve for: the most that the model takes; the next power of two of the true number, less
        than twice too many; or the true number, prompt included ``group.max_len``, which no real system knows.
    block_size, num_blocks : int
        Slots per block, and blocks in the pool.
    max_len : int
        Slots of the longest sequence that the model takes, 2048 for OPT.

    Source: §6.1 "Baseline 2: Orca", and the authors' artifact: ceil(min(prompt + estimate, max_len) / block_size)
    blocks, rounded up by the buddy allocator.
    """

    def __init__(self, estimate: Literal["max", "pow2", "oracle"], block_size: int, num_blocks: int,
                 max_len: int = 2048) -> None:
        if estimate not in ("max", "pow2", "oracle"):
            raise InvalidConfig(f"the estimate is {estimate!r}; give 'max', 'pow2' or 'oracle'")
        self.estimate, self.block_size, self.max_len, self.trace = estimate, block_size, max_len, NO_TRACE
        self.device = BuddyAllocator(num_blocks, next_power_of_two(-(-max_len // block_size)))
        self.tokens: dict[int, int] = {}  # slots that each sequence has filled
        self.held: dict[int, list[Piece]] = {}  # by sequence: its own piece, as yet empty, and those for its forks

    @property
    def pieces(self) -> list[Piece]:
        """All reservations, as they are filled now."""
        found = []
        for seq, (own, *spare) in self.held.items():
            tokens = self.tokens[seq]
            found += [own._replace(tokens=tokens, reserved=own.reserved - tokens), *spare]
        return found

    def claim(self, prompt: int, output: int) -> int:
        """Slots to ask for: min(prompt + estimate, ``max_len``).

        Raises
        ------
        RequestTooLarge
            The model takes no such length.
        """
        if prompt + output > self.max_len:
            raise RequestTooLarge(f"{prompt} prompt and {output} output tokens are more than max_len = {self.max_len}")
        guess = {"max": self.max_len, "pow2": next_power_of_two(output), "oracle": output}[self.estimate]
        return min(prompt + guess, self.max_len)

    def _claim(self, group: SequenceGroup) -> tuple[Sequence, int, int]:
        """The group's first sequence, the slots to ask for, and the blocks that hold them."""
        seq = group.seqs[0]
        slots = self.claim(seq.prompt_len, group.max_len - seq.prompt_len)
        return seq, slots, -(-slots // self.block_size)

    def can_allocate(self, group: SequenceGroup, beside_others: bool = False) -> bool:
        """Whether a chunk for each sequence of the group is free; `RequestTooLarge` if not even in an empty pool."""
        (_, _, blocks), pool = self._claim(group), self.device
        if pool.can_allocate(*[blocks] * group.width):
            return True
        if not pool.allocated:
            raise RequestTooLarge(f"request {group.request_id} reserves {group.width} times {blocks} blocks, and the "
                                  f"empty pool of {pool.num_blocks} has no such chunks; give a larger pool, or a "
                                  "smaller max_len")
        return False

    def allocate(self, group: SequenceGroup) -> list[tuple[int, int]]:
        """Reserve a chunk for each sequence that the group will have, or for none and raise `OutOfBlocks`; there is
        never a block to copy."""
        if not self.can_allocate(group):
            raise OutOfBlocks(f"no chunks for request {group.request_id} are free; ask can_allocate first")
        seq, slots, blocks = self._claim(group)
        starts = [self.device.allocate(blocks) for _ in range(group.width)]
        self.tokens[seq.seq_id] = len(seq.token_ids)
        self.held[seq.seq_id] = [
            Piece(seq.seq_id, start * self.block_size, 0, group.max_len, slots - group.max_len,
                  self.device.allocated[start] * self.block_size - slots) for start in starts]
        return []

    def can_append_slots(self, groups: list[SequenceGroup]) -> bool:
        """Always: this is what the reservation is for."""
        return True

    def append_slot(self, seq: Sequence) -> list[tuple[int, int]]:
        """Use the next slot of the reservation; there is never a block to copy."""
        self.tokens[seq.seq_id] += 1
        return []

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Give a child one of the chunks that were reserved with its parent's, for a copy of what that holds (§6.3)."""
        self.held[child.seq_id] = [self.held[parent.seq_id].pop()._replace(owner=child.seq_id)]
        self.tokens[child.seq_id] = self.tokens[parent.seq_id]

    def free(self, seq: Sequence) -> None:
        """Give the chunks of a sequence back; without any, nothing."""
        self.tokens.pop(seq.seq_id, None)
        for piece in self.held.pop(seq.seq_id, ()):
            self.device.free(piece.start // self.block_size)
