"""The blocks of a prompt as engines of different block sizes see them."""

from collections.abc import Callable, Sequence

from chapter4.index import KvIndex, prefix_names
from chapter4.workers import Worker


def known_blocks(
    index: KvIndex, workers: Sequence[Worker], block_hashes: Callable[[int], list[int]]
) -> tuple[dict[int, list[int]], dict[int, list[int]], dict[int, int]]:
    """A prompt's hashes and names by block size, and how many are cached by instance id."""
    sizes = {worker.source.info.block_size for worker in workers}
    hashes = {size: block_hashes(size) for size in sizes}
    names = {size: prefix_names(known) for size, known in hashes.items()}
    overlaps = [index.overlaps(known) for known in hashes.values()]
    return hashes, names, {key: blocks for each in overlaps for key, blocks in each.items()}
