"""Two real engines in one process, and the way of a request from the one to the other."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, Self

from common.engines.kv_handover import MAX_RECEIVED
from common.engines.llamacpp import LlamaCppEngine, LlamaCppSettings
from common.kv import KvEvent
from common.kv_transfer.start import KvTransfer, kv_transfer
from common.model_files import DEFAULT_MODEL, find_model
from common.protocol import EngineOutput, GenerateRequest, SamplingParams
from common.protocol_transfer import KvDescriptor
from tests.chapter1.helpers import eventually
from tests.common.engines.engine_helpers import ONE_THREAD, FakeContext, Result, replay

BLOCK = 16

MODEL_FILE = find_model(DEFAULT_MODEL).name  # KV of other weights is of no use


@dataclass
class Peer:
    """An engine with its transfer, and what it has said to have cached."""

    engine: LlamaCppEngine
    transfer: KvTransfer
    events: list[KvEvent]

    @classmethod
    @asynccontextmanager
    async def start(cls, *, max_bytes: int = 2**30, **settings: Any) -> AsyncIterator[Self]:
        known = {**ONE_THREAD, "cache_tokens": 1024, "max_sequences": 16, "max_running": 8}
        async with kv_transfer(
            "zmq", "127.0.0.1", max_bytes=max_bytes, lease_s=60, timeout_s=20
        ) as transfer:
            engine = await LlamaCppEngine.start(LlamaCppSettings(**{**known, **settings}), transfer)
            events: list[KvEvent] = []
            engine.subscribe(events.extend)
            try:
                yield cls(engine, transfer, events)
            finally:
                await engine.close()

    async def run(self, request: GenerateRequest, context: FakeContext | None = None) -> Result:
        items = self.engine.generate(request, context or FakeContext())
        return Result([item async for item in items])

    @property
    def fetched_bytes(self) -> int:
        return self.transfer.borrower.counters.fetched_bytes

    async def check_at_rest(self) -> None:
        """Nothing is lent, received, running or lost: llama.cpp's cells are those of the cache."""
        handover = self.engine._handover
        # Its thread may still compute for someone who has left.
        await eventually(lambda: not self.engine._open)
        await eventually(lambda: self.transfer.lender.lent_bytes == 0)
        assert handover.fetching == 0
        assert (handover._holding, handover._room._value) == (set(), MAX_RECEIVED)
        loop, checked = asyncio.get_running_loop(), asyncio.Event()
        problems: list[BaseException] = []

        def check() -> None:
            try:
                self._check_cells()
            except BaseException as error:
                problems.append(error)
            loop.call_soon_threadsafe(checked.set)

        self.engine._inference.call(check)
        await checked.wait()
        if problems:
            raise problems[0]

    def _check_cells(self) -> None:
        """On the engine's thread."""
        cache, context = self.engine._cache, self.engine._inference._context
        assert cache.running == {}
        assert cache.free_cells + len(cache.index) * cache.block_size == cache.cells
        for id_ in range(self.engine._settings.max_sequences + 1):  # the last is the spare one
            sequence = cache.finished.get(id_)
            ends = (0, len(sequence.tokens) - 1) if sequence else (-1, -1)
            assert context.positions(id_) == ends
        assert replay(self.events) == set(cache.index)


@dataclass
class HandedOver:
    """What came of a request at the prefill engine, and then, unless it was over, at the other."""

    first: EngineOutput
    rest: Result

    @property
    def items(self) -> list[EngineOutput]:
        return [self.first, *self.rest.items]

    @property
    def whole(self) -> Result:
        return Result(self.items)


def prefill_request(prompt: list[int], **sampling: Any) -> GenerateRequest:
    return GenerateRequest(prompt, SamplingParams(**sampling), prefill_only=True)


def decode_request(
    prompt: list[int], first: EngineOutput, kv: KvDescriptor | None, **sampling: Any
) -> GenerateRequest:
    """What another engine is asked after the prefill engine's answer."""
    tokens = [*prompt, *first.token_ids]
    return GenerateRequest(tokens, SamplingParams(**sampling), len(first.token_ids), kv=kv)


async def compute(peer: Peer, prompt: list[int], **sampling: Any) -> EngineOutput:
    """The prefill engine's answer, of one item."""
    (item,) = (await peer.run(prefill_request(prompt, **sampling))).items
    return item


async def hand_over(prefill: Peer, decode: Peer, prompt: list[int], **sampling: Any) -> HandedOver:
    """A request by way of both engines."""
    first = await compute(prefill, prompt, **sampling)
    if first.finish_reason is not None:
        return HandedOver(first, Result())
    assert first.kv is not None
    return HandedOver(first, await decode.run(decode_request(prompt, first, first.kv, **sampling)))


@asynccontextmanager
async def two_engines(
    prefill: dict[str, Any] | None = None, decode: dict[str, Any] | None = None
) -> AsyncIterator[tuple[Peer, Peer]]:
    """A prefill and a decode engine."""
    async with AsyncExitStack() as stack:
        yield (
            await stack.enter_async_context(Peer.start(worker_id=1, **prefill or {})),
            await stack.enter_async_context(Peer.start(worker_id=2, **decode or {})),
        )


def a_prompt(seed: int, length: int) -> list[int]:
    """Token ids that share no block with those of another seed."""
    return [1000 + (seed * 7919 + i * 104_729 + i * i) % 40_000 for i in range(length)]


def a_loan(tokens: int) -> KvDescriptor:
    """A descriptor of KV that nobody has."""
    return KvDescriptor("zmq", tokens, {"address": "tcp://127.0.0.1:1"}, MODEL_FILE)


def start(
    peer: Peer, request: GenerateRequest, context: FakeContext | None = None
) -> asyncio.Task[Result]:
    return asyncio.create_task(peer.run(request, context))


@contextmanager
def held(peer: Peer, then: Callable[[], None] = lambda: None) -> Iterator[threading.Event]:
    """The engine does nothing until the event is set or the block is over; then that first."""
    go = threading.Event()

    def wait() -> None:
        go.wait(60)
        then()

    peer.engine._inference.call(wait)
    try:
        yield go
    finally:
        go.set()
