"""Which parts of a block of memory are taken."""

import bisect

ALIGNMENT = 4096  # bytes, a page


class Regions:
    """Gives out regions of `size` bytes in all, always the first free one that is large enough."""

    def __init__(self, size: int) -> None:
        self._free = [(0, size)]  # begin and end, in order, never adjacent

    def take(self, size: int) -> int | None:
        """The offset of a region, or None if none of them is large enough."""
        size = aligned(size)
        for i, (begin, end) in enumerate(self._free):
            if end - begin >= size:
                self._free[i : i + 1] = [(begin + size, end)] if end - begin > size else []
                return begin
        return None

    def give_back(self, offset: int, size: int) -> None:
        begin, end = offset, offset + aligned(size)
        i = bisect.bisect(self._free, (begin, end))
        if i < len(self._free) and self._free[i][0] == end:
            end = self._free.pop(i)[1]
        if i > 0 and self._free[i - 1][1] == begin:
            i -= 1
            begin = self._free.pop(i)[0]
        self._free.insert(i, (begin, end))


def aligned(size: int) -> int:
    """The size of the region that is taken for so many bytes."""
    return -(-size // ALIGNMENT) * ALIGNMENT
