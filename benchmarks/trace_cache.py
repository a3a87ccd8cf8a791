"""What an engine in virtual time has cached.

Blocks that no running request holds are evicted least recently used first, a prefix's end before
its beginning.
"""

from collections import OrderedDict


class BlockCache:
    """Which blocks are cached: held by running requests, or evictable."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self.own = 0  # blocks that are held, but cached for nobody else
        self._held: dict[int, int] = {}
        self._evictable: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def used(self) -> int:
        return len(self._held) + self.own

    def match(self, blocks: list[int]) -> int:
        """How many of the first blocks are cached."""
        for count, block in enumerate(blocks):
            if block not in self._held and block not in self._evictable:
                return count
        return len(blocks)

    def has_room(self, matched: list[int], own: int) -> bool:
        """Whether `own` more blocks fit while those that matched are held."""
        newly_held = sum(1 for block in matched if block not in self._held)
        return self.used + newly_held + own <= self.blocks

    def hold(self, blocks: list[int]) -> None:
        for block in blocks:
            self._evictable.pop(block, None)
            self._held[block] = self._held.get(block, 0) + 1

    def release(self, blocks: list[int]) -> None:
        for block in reversed(blocks):  # so that a prefix's end is evicted first
            self._held[block] -= 1
            if not self._held[block]:
                del self._held[block]
                self._evictable[block] = None

    def evict(self) -> list[int]:
        """Make room for what is held, all there is if that is too much; the blocks evicted."""
        over = min(self.used + len(self._evictable) - self.blocks, len(self._evictable))
        return [self._evictable.popitem(last=False)[0] for _ in range(over)]
