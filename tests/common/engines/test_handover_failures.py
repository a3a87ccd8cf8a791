"""Handovers that go wrong: the decode engine computes the prompt, and nothing is left over."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

from common.engines.kv_handover import MAX_RECEIVED
from common.engines.llamacpp import LlamaCppEngine, LlamaCppSettings
from common.kv_transfer.pieces import KvPieces
from common.protocol import EngineOutput, GenerateRequest, PipelineError, SamplingParams
from common.protocol_transfer import KvDescriptor
from tests.chapter1.helpers import eventually
from tests.common.engines.engine_helpers import ONE_THREAD, FakeContext, Result, collect
from tests.common.engines.handover_helpers import (
    BLOCK,
    MODEL_FILE,
    Peer,
    a_loan,
    a_prompt,
    compute,
    decode_request,
    hand_over,
    held,
    prefill_request,
    start,
    two_engines,
)

import numpy as np
import pytest
import pytest_asyncio

pytestmark = pytest.mark.asyncio(loop_scope="module")

GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True, "max_tokens": 5}
LENGTH = 2 * BLOCK + 3
Engines = tuple[Peer, Peer]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared() -> AsyncIterator[Engines]:
    """The decode engine takes a block over in a step, runs two requests and lets two wait."""
    small = {"import_blocks": 1, "max_running": 2, "max_waiting": MAX_RECEIVED + 1}
    async with two_engines({}, small) as engines:
        yield engines


@pytest_asyncio.fixture(loop_scope="module")
async def engines(shared: Engines) -> AsyncIterator[Engines]:
    """They have nothing cached, and lose nothing in the test."""
    for peer in shared:
        await peer.engine.clear_cache()
    yield shared
    for peer in shared:
        await peer.check_at_rest()


def failures(peer: Peer) -> int:
    return peer.engine.metrics().failed_transfers


async def computed_all_the_same(
    engines: Engines, kv: KvDescriptor | None, seed: int, received: int = 0
) -> None:
    """The decode engine's answer is right although its KV does not come as it should."""
    prefill, decode = engines
    prompt = a_prompt(seed, LENGTH)
    failed, tokens = failures(decode), decode.engine.metrics().received_tokens
    local = await collect(prefill.engine, prompt, **GREEDY)
    first = EngineOutput(local.token_ids[:1])
    rest = await decode.run(decode_request(prompt, first, kv, **GREEDY))
    assert rest.token_ids == local.token_ids[1:]
    assert rest.finish_reason == "length"
    assert failures(decode) == failed + 1
    assert decode.engine.metrics().received_tokens == tokens + received


def corrupted(
    monkeypatch: pytest.MonkeyPatch, peer: Peer, change: Callable[[KvPieces], KvPieces]
) -> None:
    """What the engine fetches from now on is changed on its way."""
    fetch = peer.transfer.borrower.fetch

    async def fetch_and_change(descriptor: KvDescriptor, first_block: int) -> KvPieces:
        pieces = await fetch(descriptor, first_block)
        copy = KvPieces(pieces.buffer.copy(), pieces.first, pieces.tokens, pieces.piece_bytes)
        return change(copy)

    monkeypatch.setattr(peer.transfer.borrower, "fetch", fetch_and_change)


def zeros(pieces: KvPieces) -> KvPieces:
    pieces.buffer[:] = 0
    return pieces


def another_position(pieces: KvPieces) -> KvPieces:
    """llama.cpp would take it, and could not free the cell again."""
    np.frombuffer(pieces.piece(1), np.int32)[4] = -7
    return pieces


def another_length(pieces: KvPieces) -> KvPieces:
    np.frombuffer(pieces.piece(1), np.int32)[3] = 2**30
    return pieces


def another_geometry(pieces: KvPieces) -> KvPieces:
    """The number of layers, which follows the cells."""
    np.frombuffer(pieces.piece(1), np.int32)[4 + 3 * BLOCK + 1] += 1
    return pieces


def cut_off(pieces: KvPieces) -> KvPieces:
    return KvPieces(pieces.buffer[:-4], pieces.first, pieces.tokens, pieces.piece_bytes)


@pytest.mark.parametrize(
    ("change", "received"),
    [
        (zeros, 0),
        (another_position, BLOCK),
        (another_length, BLOCK),
        (another_geometry, BLOCK),
        (cut_off, 2 * BLOCK),
    ],
)
async def test_what_cannot_be_taken_over_is_computed(
    engines: Engines,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[KvPieces], KvPieces],
    received: int,
) -> None:
    """From the first bad block on."""
    prefill, decode = engines
    item = await compute(prefill, a_prompt(1, LENGTH), **GREEDY)
    corrupted(monkeypatch, decode, change)
    await computed_all_the_same(engines, item.kv, 1, received)


async def test_a_descriptor_of_something_else(engines: Engines) -> None:
    for kv in (
        KvDescriptor("none", 0),
        KvDescriptor("sglang", LENGTH, {"bootstrap_room": 1}, MODEL_FILE),
        KvDescriptor("zmq", LENGTH, {"address": "tcp://127.0.0.1:1"}, MODEL_FILE),
        KvDescriptor("zmq", LENGTH, {}, "another-model"),
        KvDescriptor("zmq", 0, {}, MODEL_FILE),
        KvDescriptor("zmq", LENGTH + 1, {}, MODEL_FILE),
    ):
        await computed_all_the_same(engines, kv, 2)


async def test_a_transfer_that_fails_in_a_way_of_its_own(
    engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fetch(descriptor: KvDescriptor, first_block: int) -> KvPieces:
        raise OSError("too many open files")

    monkeypatch.setattr(engines[1].transfer.borrower, "fetch", fetch)
    await computed_all_the_same(engines, a_loan(LENGTH), 14)


async def test_another_block_size(engines: Engines) -> None:
    async with Peer.start(block_size=8) as other:
        item = await compute(other, a_prompt(3, LENGTH), **GREEDY)
        await computed_all_the_same(engines, item.kv, 3)


async def test_a_prefill_engine_that_is_gone(engines: Engines) -> None:
    async with Peer.start() as other:
        item = await compute(other, a_prompt(4, LENGTH), **GREEDY)
    await computed_all_the_same(engines, item.kv, 4)


async def test_kv_that_was_fetched_before(engines: Engines) -> None:
    prefill, decode = engines
    answer = await hand_over(prefill, decode, a_prompt(5, LENGTH), **GREEDY)
    await decode.engine.clear_cache()
    await computed_all_the_same(engines, answer.first.kv, 5)


async def test_no_room_to_lend(engines: Engines) -> None:
    async with Peer.start(max_bytes=1000) as other:
        item = await compute(other, a_prompt(6, LENGTH), **GREEDY)
        assert item.kv == KvDescriptor("none", 0)
        await other.check_at_rest()
    await computed_all_the_same(engines, item.kv, 6)


async def test_an_engine_without_a_transfer(engines: Engines) -> None:
    """It is an aggregated one, or an old one."""
    prefill, _ = engines
    prompt = a_prompt(7, 20)
    engine = await LlamaCppEngine.start(
        LlamaCppSettings(cache_tokens=256, max_sequences=4, max_running=2, **ONE_THREAD)
    )
    try:
        with pytest.raises(PipelineError, match="gives no KV away; start it with --role prefill"):
            engine.generate(prefill_request(prompt, **GREEDY), FakeContext())
        first = await compute(prefill, prompt, **GREEDY)
        request = decode_request(prompt, first, first.kv, **GREEDY)
        rest = [item async for item in engine.generate(request, FakeContext())]
        assert len(Result(rest).token_ids) == 4
        assert engine.metrics().failed_transfers == 1
        assert first.kv is not None
        prefill.transfer.lender.withdraw(first.kv)  # it would stay until it expires
    finally:
        await engine.close()


async def test_blocks_that_were_evicted_before_the_request_began(engines: Engines) -> None:
    """It fetched what followed them: the gap is computed, the rest taken over."""
    prefill, decode = engines
    prompt = a_prompt(8, 4 * BLOCK)
    await collect(decode.engine, prompt[: 2 * BLOCK + 1], **{**GREEDY, "max_tokens": 1})
    received = decode.engine.metrics().received_tokens
    first = await compute(prefill, prompt, **GREEDY)
    with held(decode, decode.engine._cache.clear) as go:
        running = start(decode, decode_request(prompt, first, first.kv, **GREEDY))
        await eventually(lambda: len(decode.engine._open) == 1)
        go.set()
    rest = await running
    local = await collect(prefill.engine, prompt, **GREEDY)
    assert [*first.token_ids, *rest.token_ids] == local.token_ids
    assert rest.items[0].cached_tokens == 0
    assert decode.engine.metrics().received_tokens == received + 2 * BLOCK


async def test_a_cache_that_is_too_small_for_all(engines: Engines) -> None:
    """Requests give up their place, with what they have received, and lose nothing."""
    prefill, _ = engines
    sampling = {**GREEDY, "max_tokens": 40}
    prompts = [a_prompt(seed, 60) for seed in (20, 21, 22)]
    async with Peer.start(cache_tokens=256, max_sequences=8, max_running=3) as small:
        answers = await asyncio.gather(
            *(hand_over(prefill, small, prompt, **sampling) for prompt in prompts)
        )
        await small.check_at_rest()
        assert failures(small) == 0
    assert [len(answer.whole.token_ids) for answer in answers] == [40] * 3
    assert {answer.whole.finish_reason for answer in answers} == {"length"}


async def test_a_request_that_is_stopped_before_its_kv_is_lent(
    engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill, _ = engines
    context = FakeContext()
    with held(prefill) as go:
        running = start(prefill, prefill_request(a_prompt(9, 20), **GREEDY), context)
        await eventually(lambda: len(prefill.engine._open) == 1)
        sample = prefill.engine._inference._sample

        def stop_and_sample(*arguments: Any) -> None:
            prefill.engine._event_loop.call_soon_threadsafe(context.stop)
            sample(*arguments)

        monkeypatch.setattr(prefill.engine._inference, "_sample", stop_and_sample)
        go.set()
        result = await running
    assert result.items[-1].kv == KvDescriptor("none", 0)


class Endless:
    """A lender that never sends anything."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, peer: Peer) -> None:
        self.fetching = 0
        monkeypatch.setattr(peer.transfer.borrower, "fetch", self._fetch)

    async def _fetch(self, descriptor: KvDescriptor, first_block: int) -> KvPieces:
        self.fetching += 1
        try:
            await asyncio.get_running_loop().create_future()
            raise AssertionError
        finally:
            self.fetching -= 1


async def test_a_request_that_is_stopped_while_its_kv_is_fetched(
    engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its context, by whoever reads it, or with the task that does."""
    _, decode = engines
    lender = Endless(monkeypatch, decode)
    request = GenerateRequest(a_prompt(10, 20), kv=a_loan(19))
    context = FakeContext()
    stopped, cancelled = start(decode, request, context), start(decode, request)
    await eventually(lambda: lender.fetching == 2)
    assert decode.engine.metrics().waiting == 2
    context.stop()
    assert (await stopped).finish_reason == "cancelled"
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    assert lender.fetching == 0
    assert decode.engine.metrics().waiting == 0


async def test_more_requests_than_may_hold_received_kv(
    engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others wait their turn, and give it up when they are stopped; too many are refused."""
    _, decode = engines
    lender = Endless(monkeypatch, decode)
    contexts = [FakeContext() for _ in range(MAX_RECEIVED + 3)]
    requests = [
        start(decode, GenerateRequest(a_prompt(10, 20), kv=a_loan(19)), context)
        for context in contexts
    ]
    await eventually(lambda: decode.engine.metrics().waiting == len(contexts))
    assert lender.fetching == MAX_RECEIVED
    with pytest.raises(PipelineError, match="full: it has 19 of at most 19 requests"):
        await decode.run(GenerateRequest(a_prompt(10, 20), kv=a_loan(19)))
    for position in (MAX_RECEIVED + 1, 0):  # one that waits, one that does not
        contexts[position].stop()
        assert (await requests[position]).finish_reason == "cancelled"
    await eventually(lambda: lender.fetching == MAX_RECEIVED)
    for context in contexts:
        context.stop()
    await asyncio.gather(*requests)


async def test_a_request_that_is_stopped_when_its_kv_has_come(engines: Engines) -> None:
    """It waits for its turn."""
    prefill, decode = engines
    long = {**GREEDY, "max_tokens": 400}
    before = [FakeContext(), FakeContext()]
    running = [
        start(decode, GenerateRequest(a_prompt(30 + n, 4), SamplingParams(**long)), context)
        for n, context in enumerate(before)
    ]
    await eventually(lambda: decode.engine.metrics().running == 2)
    prompt, context = a_prompt(11, LENGTH), FakeContext()
    first = await compute(prefill, prompt, **GREEDY)
    waiting = start(decode, decode_request(prompt, first, first.kv, **GREEDY), context)
    await eventually(lambda: len(decode.engine._handover._holding) == 1)
    await eventually(lambda: decode.engine.metrics().waiting == 1)
    context.stop()
    assert (await waiting).finish_reason == "cancelled"
    for each in before:
        each.stop()
    await asyncio.gather(*running)


async def test_a_request_that_is_stopped_when_a_part_has_been_taken_over(
    engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill, decode = engines
    prompt, context = a_prompt(12, 5 * BLOCK), FakeContext()
    first = await compute(prefill, prompt, **GREEDY)
    llama = decode.engine._inference._context
    import_kv, stopped = llama.import_kv, threading.Event()
    imported = []

    def stop() -> None:
        context.stop()
        stopped.set()

    def import_and_stop(sequence: int, start: int, end: int, data: memoryview) -> bool:
        imported.append(start)
        if len(imported) == 2:
            decode.engine._event_loop.call_soon_threadsafe(stop)
            stopped.wait(60)
        return import_kv(sequence, start, end, data)

    monkeypatch.setattr(llama, "import_kv", import_and_stop)
    result = await decode.run(decode_request(prompt, first, first.kv, **GREEDY), context)
    assert result.finish_reason == "cancelled"
    assert result.token_ids == []
    assert imported == [0, BLOCK]
    again = await collect(decode.engine, prompt, **GREEDY)
    assert again.items[0].cached_tokens == 2 * BLOCK


async def test_an_engine_that_is_closed_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Peer.start() as peer:
        lender = Endless(monkeypatch, peer)
        request = start(peer, GenerateRequest(a_prompt(13, 20), kv=a_loan(19)))
        await eventually(lambda: lender.fetching == 1)
        await peer.engine.close()
        with pytest.raises(PipelineError, match="the engine is closed"):
            await request
        assert lender.fetching == 0
        assert peer.engine._handover._room._value == MAX_RECEIVED
