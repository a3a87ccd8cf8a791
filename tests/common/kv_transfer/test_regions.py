"""Memory that is given out twice would be KV that is silently wrong."""

from common.kv_transfer.regions import ALIGNMENT, Regions

from hypothesis import given
from hypothesis import strategies as st

PAGES = 16


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 6 * ALIGNMENT)), max_size=60))
def test_no_two_regions_overlap_and_all_can_be_taken_again(steps: list[tuple[bool, int]]) -> None:
    regions, taken = Regions(PAGES * ALIGNMENT), list[tuple[int, int]]()
    for take, size in steps:
        if take and (offset := regions.take(size)) is not None:
            taken.append((offset, size))
            pages = [
                page
                for begin, length in taken
                for page in range(begin // ALIGNMENT, -(-(begin + length) // ALIGNMENT))
            ]
            assert len(pages) == len(set(pages))
            assert 0 <= min(pages) <= max(pages) < PAGES
        elif not take and taken:
            regions.give_back(*taken.pop(size % len(taken)))
    for region in taken:
        regions.give_back(*region)
    assert regions.take(PAGES * ALIGNMENT) == 0
    assert regions.take(1) is None
