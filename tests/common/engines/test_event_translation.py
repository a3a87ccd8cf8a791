"""Events of SGLang and vLLM become ours, whatever else they tell."""

from typing import Any

from common.engines.event_translation import EventTranslation, hash_64
from common.kv import AllBlocksCleared, BlockRemoved, BlockStored, KvEvent
from tests.common.engines.engine_helpers import replay

import msgspec
import pytest


def translation(*, has_copies: bool = True) -> EventTranslation:
    return EventTranslation(2, has_copies=has_copies)


def batch(*events: Any) -> bytes:
    return msgspec.msgpack.encode([1.5, list(events), 0])


def stored(hashes: list[int | bytes], parent: int | bytes | None = None, **more: Any) -> Any:
    event = {"type": "BlockStored", "block_hashes": hashes, "parent_block_hash": parent}
    token_ids = [token for block in hashes for token in (hash_64(block) % 1000, 7)]
    return {**event, "token_ids": token_ids, "block_size": 2, "lora_id": None, **more}


def removed(*hashes: int, **more: Any) -> Any:
    return {"type": "BlockRemoved", "block_hashes": list(hashes), **more}


def test_older_releases_send_arrays() -> None:
    """The fields stand in a fixed order there, and those at the end may be missing."""
    events = translation().translate(
        batch(
            ["BlockStored", [1, 2], None, [1, 7, 2, 7], 2, None, "GPU"],
            ["BlockStored", [3], 2, [3, 7], 2],
            ["BlockRemoved", [3]],
            ["AllBlocksCleared"],
        )
    )
    assert events == [
        BlockStored([1, 2], None, [1, 7, 2, 7], 2),
        BlockStored([3], 2, [3, 7], 2),
        BlockRemoved([3]),
        AllBlocksCleared(),
    ]


@pytest.mark.parametrize(
    ("block", "number"),
    [
        (5, 5),
        (-5, -5),
        (2**63, -(2**63)),
        (2**64 - 1, -1),
        (b"\xff" * 8, -1),
        (bytes(24) + (2**64 - 2).to_bytes(8, "big"), -2),
    ],
)
def test_hashes_become_signed_64_bit_integers(block: int | bytes, number: int) -> None:
    assert hash_64(block) == number


def test_a_block_is_there_until_its_last_copy_is_gone() -> None:
    """vLLM computes a prompt twice that comes twice at once, and keeps both."""
    follow = translation()
    events = follow.translate(batch(stored([1, 2]), stored([1, 2, 3])))
    assert events == [BlockStored([1, 2], None, [1, 7, 2, 7], 2), BlockStored([3], 2, [3, 7], 2)]
    assert follow.translate(batch(removed(3), removed(2), removed(1))) == [BlockRemoved([3])]
    assert follow.translate(batch(removed(2, 1))) == [BlockRemoved([2, 1])]
    assert follow.translate(batch(removed(2), removed(9))) == []


def test_without_copies_a_repeated_event_means_nothing() -> None:
    follow = translation(has_copies=False)
    follow.translate(batch(stored([1]), stored([1])))
    assert follow.translate(batch(removed(1))) == [BlockRemoved([1])]


@pytest.mark.parametrize(
    "more",
    [
        {"medium": "CPU"},
        {"medium": "DISK"},
        {"lora_id": 3},
        {"lora_name": "poet"},
        {"cache_salt": "tenant"},
        {"extra_keys": [None, ["image"]]},
        {"block_size": 4},
        {"token_ids": [1]},
    ],
)
def test_what_a_prefix_of_tokens_cannot_use_is_left_out(more: dict[str, Any]) -> None:
    """Nor can what follows such a block be used."""
    follow = translation()
    assert follow.translate(batch(stored([1, 2], **more), stored([3], 2), removed(2))) == []
    assert follow.translate(batch(stored([1, 2], extra_keys=[None, None], medium="GPU")))


def test_another_medium_removes_nothing_from_the_gpu() -> None:
    follow = translation()
    follow.translate(batch(stored([1], medium="GPU")))
    assert follow.translate(batch(removed(1, medium="CPU"))) == []
    assert follow.translate(batch(removed(1, medium="GPU"))) == [BlockRemoved([1])]


def test_one_kind_of_attention_stands_for_all() -> None:
    follow = translation()
    events = follow.translate(batch(stored([1], group_idx=1), stored([1], group_idx=0)))
    assert events == [BlockStored([1], None, [1, 7], 2)]
    assert follow.translate(batch(removed(1, group_idx=0))) == []
    assert follow.translate(batch(removed(1, group_idx=1))) == [BlockRemoved([1])]


def test_after_a_clearing_nothing_can_follow_what_was_there() -> None:
    follow = translation()
    follow.translate(batch(stored([1])))
    assert follow.clear() == [AllBlocksCleared()]
    assert follow.translate(batch(stored([2], 1), removed(1))) == []
    events: list[KvEvent] = follow.translate(batch(stored([1]), stored([2], 1)))
    assert replay(events) == {1, 2}


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        msgspec.msgpack.encode({"ts": 1}),
        msgspec.msgpack.encode(["yesterday", []]),
        batch(7),
        batch([]),
        batch({"block_hashes": [1]}),
        batch({"type": "BlockStored"}),
        batch({"type": "BlockRemoved", "block_hashes": [1.5]}),
        batch(["BlockStored", [1], None, "tokens", 2]),
    ],
)
def test_what_is_no_batch_of_events(payload: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        translation().translate(payload)


def test_events_of_a_later_release_are_no_fault() -> None:
    unknown = {"type": "BlockMoved", "block_hashes": [1]}
    field = stored([1], of_a_later_release=[1, 2])
    assert len(translation().translate(batch(unknown, field))) == 1
