"""What every engine has cached: the runtime's `RadixTree`, fed by the engines' KV events.

A node of the tree is a block of tokens, the path to it is a prefix, and each node knows which
engines have that prefix. Engines hash blocks as they like; the tree wants, for each block, the
runtime's own hash of its tokens (by which prompts are matched) and a name that is the same on
every engine for the same prefix. Both are made here, from the token ids in the events.
"""

import contextlib
from collections.abc import Iterable, Sequence
from typing import cast

from common.kv import AllBlocksCleared, BlockRemoved, BlockStored, KvEvent

import msgspec
from dynamo.llm import RadixTree, compute_block_hash_for_seq

ROOT = 0  # the name of the empty prefix

_encode = msgspec.json.Encoder().encode


class UnknownBlockError(Exception):
    """An event is about a block that never came: events were missed."""


class KvIndex:
    """The blocks of all engines, by prefix."""

    def __init__(self) -> None:
        self._tree = RadixTree()
        # Of each engine: its own hash of a block -> the block's name in the tree.
        self._names: dict[int, dict[int, int]] = {}
        self._event_id = 0

    def apply(self, instance: int, events: Iterable[KvEvent]) -> list[int]:
        """Follow what has happened in an engine's cache; the names of the blocks it was about.

        Raises:
            UnknownBlockError: the index no longer agrees with the engine; a snapshot heals it.
        """
        names = self._names.setdefault(instance, {})
        concerned: list[int] = []
        for event in events:
            if isinstance(event, AllBlocksCleared):
                self._tree.clear_all_blocks(instance)
                concerned += names.values()
                names.clear()
            elif isinstance(event, BlockStored):
                concerned += self._store(instance, names, event)
            else:
                concerned += self._remove(instance, names, event)
        return concerned

    def remove(self, instance: int) -> None:
        """Forget an engine."""
        self._tree.remove_worker(instance)
        self._names.pop(instance, None)

    def overlaps(self, tokens_hashes: list[int]) -> dict[int, int]:
        """How many of the prompt's first blocks each engine has cached, where it has any.

        `tokens_hashes` are the runtime's (`compute_block_hash_for_seq`).
        """
        # The stub says dict[int, int]; the keys are of instance and data-parallel rank, here 0.
        scores = cast(dict[tuple[int, int], int], self._tree.find_matches(tokens_hashes).scores)
        return {instance: blocks for (instance, _), blocks in scores.items()}

    def blocks(self) -> dict[int, list[int]]:
        """Each engine's own hashes of the blocks that it has cached.

        Read from the tree itself, all of it: for those who want to look, not for decisions. A
        block that the tree has by mistake stands there with its name.
        """
        found: dict[int, list[int]] = {instance: [] for instance in self._names}
        hashes = {
            instance: {name: block for block, name in names.items()}
            for instance, names in self._names.items()
        }
        for text in self._tree.dump_tree_as_events():
            event = msgspec.json.decode(text)
            known = hashes.get(event["worker_id"], {})
            found.setdefault(event["worker_id"], []).extend(
                known.get(block["block_hash"], block["block_hash"])
                for block in event["event"]["data"]["stored"]["blocks"]
            )
        return found

    def block_count(self, instance: int) -> int:
        return len(self._names.get(instance, ()))

    def _store(self, instance: int, names: dict[int, int], event: BlockStored) -> list[int]:
        parent = event.parent_block_hash
        if parent is not None and parent not in names:
            raise UnknownBlockError(f"a block follows {parent}, which is not cached")
        name = ROOT if parent is None else names[parent]
        blocks: list[dict[str, int]] = []
        stored = {"parent_hash": None if parent is None else name, "blocks": blocks}
        tokens_hashes = compute_block_hash_for_seq(event.token_ids, event.block_size)
        for block, tokens_hash in zip(event.block_hashes, tokens_hashes, strict=True):
            name = prefix_name(name, tokens_hash)
            names[block] = name
            blocks.append({"block_hash": name, "tokens_hash": tokens_hash})
        self._send(instance, {"stored": stored})
        return [block["block_hash"] for block in blocks]

    def _remove(self, instance: int, names: dict[int, int], event: BlockRemoved) -> list[int]:
        known = [block for block in event.block_hashes if block in names]
        gone = [names.pop(block) for block in known]
        # What follows a removed block goes with it in the tree, which then complains when the
        # event names that, too: SGLang removes a block before those that follow it.
        with contextlib.suppress(UnknownBlockError):
            self._send(instance, {"removed": {"block_hashes": gone}})
        if len(known) < len(event.block_hashes):
            raise UnknownBlockError("a block was removed that was not cached")
        return gone

    def _send(self, instance: int, data: dict[str, object]) -> None:
        self._event_id += 1
        event = {"event_id": self._event_id, "dp_rank": 0, "data": data}
        try:
            self._tree.apply_event(instance, _encode(event))
        except RuntimeError as error:
            raise UnknownBlockError(str(error)) from error


def prefix_name(parent: int, tokens_hash: int) -> int:
    """A name for a block and all before it, from its parent's name and its tokens' hash.

    Python's hash of two integers: 61 random bits, enough to tell the blocks of a fleet apart.
    """
    return hash((parent, tokens_hash)) & 0xFFFF_FFFF_FFFF_FFFF


def prefix_names(tokens_hashes: Sequence[int]) -> list[int]:
    """The names of a prompt's blocks."""
    names: list[int] = []
    name = ROOT
    for tokens_hash in tokens_hashes:
        name = prefix_name(name, tokens_hash)
        names.append(name)
    return names
