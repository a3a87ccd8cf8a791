"""Frames that the real engines sent, and what must become of them.

Captured from SGLang 0.5.21 and vLLM 0.32.0 with a cache of a few blocks: prompts that begin
alike, prompts that push others out, a cleared cache, then one block again. vLLM was asked for
hashes as integers and as bytes, and ran two equal requests at once, which makes copies.
"""

import base64
import json
from pathlib import Path

from common.engines.event_translation import EventTranslation
from common.kv import AllBlocksCleared, BlockRemoved, BlockStored, KvEvent
from tests.common.engines.engine_helpers import replay

import msgspec
import pytest

CAPTURED: dict[str, list[str]] = json.loads(
    Path(__file__).with_name("captured_events.json").read_text()
)
BLOCK_SIZES = {"sglang": 16, "vllm": 32, "vllm_bytes": 32, "vllm_copies": 32}


def events_of(name: str) -> list[KvEvent]:
    translation = EventTranslation(BLOCK_SIZES[name], has_copies=name != "sglang")
    payloads = [base64.b64decode(payload) for payload in CAPTURED[name]]
    return [event for payload in payloads for event in translation.translate(payload)]


@pytest.mark.parametrize("name", BLOCK_SIZES)
def test_captured_events_make_sense(name: str) -> None:
    """Parents come first, nothing is stored or removed twice, and one block is left."""
    events = events_of(name)
    kinds = {type(event) for event in events}
    assert kinds == {BlockStored, BlockRemoved, AllBlocksCleared}
    *before, last = events
    assert isinstance(before[-1], AllBlocksCleared)
    assert isinstance(last, BlockStored)
    assert replay(events) == set(last.block_hashes)
    assert last.token_ids == [100] * BLOCK_SIZES[name]
    first = next(event for event in events if isinstance(event, BlockStored))
    assert first.block_hashes[0] == last.block_hashes[0]


def test_a_branch_of_a_prefix_follows_its_first_block() -> None:
    first, second, *_ = (event for event in events_of("sglang") if isinstance(event, BlockStored))
    assert first.block_hashes == [3499557902356746492, -4532492777461440419]
    assert second == BlockStored([-6235815148779423811], first.block_hashes[0], [300] * 16, 16)


def test_hashes_as_bytes_are_the_same_blocks() -> None:
    assert events_of("vllm_bytes") == events_of("vllm")


def test_copies_are_stored_once_and_removed_with_the_last_of_them() -> None:
    """Without counting, a block would be forgotten while the engine still has it."""
    payloads = [base64.b64decode(payload) for payload in CAPTURED["vllm_copies"]]
    stored = [
        block
        for payload in payloads
        for event in msgspec.msgpack.decode(payload)[1]
        for block in event.get("block_hashes", [])
        if event["type"] == "BlockStored"
    ]
    assert len(stored) > len(set(stored))
    replay(events_of("vllm_copies"))
