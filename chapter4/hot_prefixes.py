"""The prefixes that many recent prompts share: where the radix tree's branches part.

Each block of a prompt is a node; its weight is how many recent prompts went through it, where a
prompt counts half after `HALF_LIFE_S`. Where all prompts go on the same way, only the end of that
way is of interest. Counted when somebody watches, from the last decisions, and only so many
blocks of them that it never takes long.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

from chapter4.decision_log import Logged
from chapter4.index import ROOT, KvIndex, prefix_name
from common.protocol_watch import WatchedPrefix

HALF_LIFE_S = 60.0
MAX_NODES = 10_000
MAX_PROMPT_BLOCKS = 1024  # what follows in a prompt is not counted
BLOCKS_AT_ONCE = 2_000
SHOWN = 12
MIN_WEIGHT = 1.5  # more than one prompt, some time ago
SAME_WAY = 0.8  # share of a node's prompts that go on to the same block


@dataclass(slots=True)
class Node:
    """A block and the way to it."""

    parent: int
    tokens_hash: int
    blocks: int
    block_size: int
    weight: float = 0.0
    strongest_child: float = 0.0


@dataclass
class HotPrefixes:
    """Counts prompts by prefix; times are of any clock that only goes forward."""

    nodes: dict[int, Node] = field(default_factory=dict)
    prompts: float = 0.0  # weight of all of them
    _counted: int = 0  # number of the last decision
    _decayed: float = 0.0

    def count(self, logged: Sequence[Logged], now: float) -> None:
        """Count the prompts of these decisions that were not counted before."""
        self._decay(now)
        new = [one for one in logged if one.number > self._counted]
        if not new:
            return
        self._counted = new[-1].number
        budget = BLOCKS_AT_ONCE
        for one in reversed(new):
            budget -= self._add(one.decision.tokens_hashes, one.decision.worker.block_size)
            if budget < 0:
                break
        if len(self.nodes) > MAX_NODES:
            self._prune()

    def hottest(self, index: KvIndex, worker_ids: dict[int, int]) -> list[WatchedPrefix]:
        """The prefixes that save the most prefill where they are cached, as a tree.

        `worker_ids` are those of the engines, by instance.
        """
        ends = [
            (node.weight * node.blocks * node.block_size, name)
            for name, node in self.nodes.items()
            if node.weight >= MIN_WEIGHT and node.strongest_child < SAME_WAY * node.weight
        ]
        shown = {name for _, name in heapq.nlargest(SHOWN, ends)}
        ways = {name: self._way(name) for name in shown}
        above = {name: [node for node in ways[name][:-1] if node in shown] for name in shown}
        # Each below the one that it continues, the weightiest branch first.
        order = sorted(
            shown,
            key=lambda name: [(-self.nodes[node].weight, node) for node in [*above[name], name]],
        )
        return [
            self._watched(name, ways[name], len(above[name]), index, worker_ids) for name in order
        ]

    def _watched(
        self, name: int, way: list[int], level: int, index: KvIndex, worker_ids: dict[int, int]
    ) -> WatchedPrefix:
        node = self.nodes[name]
        overlaps = index.overlaps([self.nodes[step].tokens_hash for step in way])
        holders = [worker_ids.get(key) for key, blocks in overlaps.items() if blocks == len(way)]
        return WatchedPrefix(
            name=f"{name:x}",
            blocks=node.blocks,
            tokens=node.blocks * node.block_size,
            share=node.weight / self.prompts,
            workers=sorted(holder for holder in holders if holder is not None),
            level=level,
        )

    def _way(self, name: int) -> list[int]:
        """The names from the first block to this one."""
        way = []
        while name != ROOT:
            way.append(name)
            name = self.nodes[name].parent
        return way[::-1]

    def _add(self, hashes: Sequence[int], block_size: int) -> int:
        """Count a prompt; the number of blocks that were counted."""
        self.prompts += 1
        nodes = self.nodes
        parent = ROOT
        above: Node | None = None
        counted = hashes[:MAX_PROMPT_BLOCKS]
        for position, tokens_hash in enumerate(counted):
            name = prefix_name(parent, tokens_hash)
            node = nodes.get(name)
            if node is None:
                node = nodes[name] = Node(parent, tokens_hash, position + 1, block_size)
            node.weight += 1
            if above is not None and node.weight > above.strongest_child:
                above.strongest_child = node.weight
            parent, above = name, node
        return len(counted)

    def _decay(self, now: float) -> None:
        """Let time pass, but not in tiny steps: each of them goes through all nodes."""
        elapsed = now - self._decayed
        if elapsed < HALF_LIFE_S / 30:
            return
        factor = 0.5 ** (elapsed / HALF_LIFE_S)
        self._decayed = now
        self.prompts *= factor
        for node in self.nodes.values():
            node.weight *= factor
            node.strongest_child *= factor

    def _prune(self) -> None:
        """Drop the lighter half, and what hangs on it."""
        kept = heapq.nlargest(
            MAX_NODES // 2, self.nodes.items(), key=lambda item: (item[1].weight, -item[1].blocks)
        )
        self.nodes = {}
        for name, node in sorted(kept, key=lambda item: item[1].blocks):
            if node.parent == ROOT or node.parent in self.nodes:
                self.nodes[name] = node
