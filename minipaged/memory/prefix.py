"""Shared prefixes: full blocks are found again by what is in them and all that came before (§4.4)."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable
from hashlib import sha256
from itertools import takewhile

from .blocks import BlockAllocator


def block_key(previous: bytes, token_ids: list[int]) -> bytes:
    """The key of a block: a digest of its own tokens and of the key of the block before it.

    Keys and values of a token depend on all tokens before it (§2.2), so equal keys must mean equal tokens from the
    start of the sequence on; never a block's own tokens alone.

    Parameters
    ----------
    previous : bytes
        Key of the logical block before; empty for the first.
    token_ids : list[int]
        The tokens in the block.
    """
    return sha256(previous + array("q", token_ids).tobytes()).digest()


def block_keys(token_ids: list[int], block_size: int) -> list[bytes]:
    """The key of each block of a sequence, the last, partly filled one included."""
    keys: list[bytes] = []
    for start in range(0, len(token_ids), block_size):
        keys.append(block_key(keys[-1] if keys else b"", token_ids[start:start + block_size]))
    return keys


class PrefixCachingAllocator(BlockAllocator):
    """A pool whose full blocks stay findable after their last reader has left, until the space is needed.

    A block without readers but with known contents is free: it is handed out when the free list is empty, the one
    left longest ago first. Until then `find_all` and `share` bring it back.

    Attributes
    ----------
    kept : OrderedDict[int, None]
        Blocks without readers whose contents are known, the one left longest ago first.
    """

    def __init__(self, num_blocks: int, pool: str = "device") -> None:
        super().__init__(num_blocks, pool)
        self.kept: OrderedDict[int, None] = OrderedDict()
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Blocks without a reader, whether their contents are known or not."""
        return len(self.free_list) + len(self.kept)

    def allocate(self) -> int:
        """As in `BlockAllocator`; contents are forgotten only when no other block is free."""
        if not self.free_list and self.kept:
            block, _ = self.kept.popitem(last=False)
            del self._block_of[self._key_of.pop(block)]
            self.free_list.append(block)
        return super().allocate()

    def find_all(self, keys: Iterable[bytes]) -> list[int]:
        """The blocks with these keys, up to the first whose keys and values are not computed or were forgotten."""
        found = map(self._block_of.get, keys)
        return list(takewhile(lambda block: block is not None, found))

    def share(self, block: int) -> None:
        """As in `BlockAllocator`; a kept block gets its first reader again."""
        if block in self.kept:
            del self.kept[block]
            self.ref_counts[block] = 1
        else:
            super().share(block)

    def remember(self, block: int, key: bytes) -> None:
        """Make a full block findable, once its keys and values are computed; of two with the same key, the first."""
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key], self._key_of[block] = block, key

    def _release(self, block: int) -> None:
        if block in self._key_of:
            self.kept[block] = None
        else:
            super()._release(block)
