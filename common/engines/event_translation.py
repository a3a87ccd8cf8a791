"""KV events as SGLang and vLLM send them, made into ours.

Both pack a batch as an array `[ts, events, data_parallel_rank]`. An event is a map with its name
under `type`, or, in older releases, an array that begins with its name. Sources:
`vllm/distributed/kv_events.py`, `sglang/srt/disaggregation/kv_events.py`.

They tell more than a router can use: blocks in another medium than the GPU's memory, of a LoRA
adapter, or with more in their hash than token ids (an image, a salt) are left out.
"""

from typing import Any

from common.kv import AllBlocksCleared, BlockRemoved, BlockStored, KvEvent

import msgspec

_FIELDS = {
    "BlockStored": (
        "block_hashes",
        "parent_block_hash",
        "token_ids",
        "block_size",
        "lora_id",
        "medium",
        "lora_name",
        "extra_keys",
        "group_idx",
    ),
    "BlockRemoved": ("block_hashes", "medium", "group_idx"),
    "AllBlocksCleared": (),
}
_OWN_MEDIA = (None, "GPU")  # vLLM calls a CPU's memory so, too, where it computes there


class _Batch(msgspec.Struct, array_like=True):
    ts: float
    events: list[Any]


class _Stored(msgspec.Struct):
    block_hashes: list[int | bytes]
    parent_block_hash: int | bytes | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[Any] | None = None
    cache_salt: str | None = None
    group_idx: int | None = None


class _Removed(msgspec.Struct):
    block_hashes: list[int | bytes]
    medium: str | None = None
    group_idx: int | None = None


class EventTranslation:
    """Follows one engine's events; blocks of another size than `block_size` are left out.

    An engine that `has_copies` may have a block twice, and says of each copy that it is stored
    and that it is removed (vLLM); of another one a repeated event means nothing.
    """

    def __init__(self, block_size: int, *, has_copies: bool) -> None:
        self._block_size = block_size
        self._has_copies = has_copies
        self._copies: dict[int, int] = {}
        # A model with several kinds of attention has a group of blocks for each. The first one
        # that stores blocks as whole as a prefix needs them stands for all.
        self._group: int | None = None

    def clear(self) -> list[KvEvent]:
        """Forget everything; the event that says so."""
        self._copies.clear()
        return [AllBlocksCleared()]

    def translate(self, payload: bytes) -> list[KvEvent]:
        """The events of one batch, as far as they change what can be reused.

        Raises:
            msgspec.DecodeError: the payload is not such a batch.
        """
        events: list[KvEvent] = []
        for event in msgspec.msgpack.decode(payload, type=_Batch).events:
            name, fields = _name_and_fields(event)
            if name == "BlockStored":
                events += self._stored(msgspec.convert(fields, _Stored))
            elif name == "BlockRemoved":
                events += self._removed(msgspec.convert(fields, _Removed))
            elif name == "AllBlocksCleared":
                events += self.clear()
        return events

    def _stored(self, stored: _Stored) -> list[KvEvent]:
        size = self._block_size
        if (
            stored.medium not in _OWN_MEDIA
            or stored.lora_id is not None
            or stored.lora_name is not None
            or stored.cache_salt is not None
            or any(stored.extra_keys or ())
            or stored.block_size != size
            or len(stored.token_ids) != size * len(stored.block_hashes)
            or not self._is_own_group(stored.group_idx, first=True)
        ):
            return []
        parent = None if stored.parent_block_hash is None else hash_64(stored.parent_block_hash)
        if parent is not None and parent not in self._copies:
            return []  # of no use: the prefix it belongs to was left out, or forgotten
        events: list[KvEvent] = []
        run: BlockStored | None = None
        for i, block in enumerate(map(hash_64, stored.block_hashes)):
            copies = self._copies.get(block, 0)
            self._copies[block] = copies + 1 if self._has_copies else 1
            if copies:
                run = None
            else:
                if run is None:
                    run = BlockStored([], parent, [], size)
                    events.append(run)
                run.block_hashes.append(block)
                run.token_ids += stored.token_ids[i * size : (i + 1) * size]
            parent = block
        return events

    def _removed(self, removed: _Removed) -> list[KvEvent]:
        if removed.medium not in _OWN_MEDIA or not self._is_own_group(removed.group_idx):
            return []
        gone: list[int] = []
        for block in map(hash_64, removed.block_hashes):
            copies = self._copies.pop(block, 0)
            if copies > 1:
                self._copies[block] = copies - 1
            elif copies:
                gone.append(block)
        return [BlockRemoved(gone)] if gone else []

    def _is_own_group(self, group: int | None, *, first: bool = False) -> bool:
        if first and self._group is None:
            self._group = group
        return group == self._group


def hash_64(block_hash: int | bytes) -> int:
    """A block's hash as a signed 64-bit integer; of longer ones the last 8 bytes, as in vLLM."""
    number = int.from_bytes(block_hash, "big") if isinstance(block_hash, bytes) else block_hash
    return ((number + 2**63) % 2**64) - 2**63


def _name_and_fields(event: Any) -> tuple[str, dict[str, Any]]:
    if isinstance(event, dict):
        name = event.get("type")
        if isinstance(name, str):
            return name, event
    elif isinstance(event, list) and event and isinstance(event[0], str):
        return event[0], dict(zip(_FIELDS.get(event[0], ()), event[1:], strict=False))
    raise msgspec.ValidationError(f"an event without a name: {event!r:.100}")
