"""The real engine on the real model."""

import asyncio
import math
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

from common.engines.llama_capi import LlamaCppError, Vocab
from common.engines.llamacpp import LlamaCppEngine, LlamaCppSettings
from common.kv import AllBlocksCleared, BlockRemoved, BlockStored, KvEvent, block_hashes
from common.model_files import DEFAULT_MODEL, find_model
from common.protocol import EngineOutput, GenerateRequest, PipelineError, SamplingParams
from tests.common.engines.engine_helpers import ONE_THREAD, FakeContext, Result, collect, replay

import pytest
import pytest_asyncio

pytestmark = pytest.mark.asyncio(loop_scope="module")

IM_END = 2


@asynccontextmanager
async def running(**settings: Any) -> AsyncIterator[LlamaCppEngine]:
    small = {"cache_tokens": 256, "max_sequences": 8, "max_running": 4}
    engine = await LlamaCppEngine.start(LlamaCppSettings(**{**ONE_THREAD, **small, **settings}))
    try:
        yield engine
    finally:
        await engine.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[LlamaCppEngine]:
    async with running(cache_tokens=2048, max_sequences=64, max_running=16) as engine:
        yield engine


@pytest.fixture(scope="module")
def vocab() -> Iterator[Vocab]:
    vocab = Vocab(find_model(DEFAULT_MODEL))
    yield vocab
    vocab.close()


@pytest.fixture(scope="module")
def chat(vocab: Vocab) -> Callable[[str], list[int]]:
    def encode(question: str) -> list[int]:
        return vocab.encode(
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        )

    return encode


@pytest.fixture(scope="module")
def text(vocab: Vocab) -> Callable[[Result], str]:
    return lambda result: b"".join(map(vocab.token_bytes, result.token_ids)).decode()


Chat = Callable[[str], list[int]]
Text = Callable[[Result], str]
PARIS = "What is the capital of France?"


async def test_the_model_answers_and_its_end_token_is_not_part_of_the_answer(
    engine: LlamaCppEngine, chat: Chat, text: Text
) -> None:
    result = await collect(engine, chat(PARIS), temperature=0)
    assert text(result) == "The capital of France is Paris."
    assert result.finish_reason == "stop"
    assert IM_END not in result.token_ids


async def test_first_and_last_items_carry_the_metadata(engine: LlamaCppEngine, chat: Chat) -> None:
    await engine.clear_cache()
    prompt = chat(PARIS)
    cold = (await collect(engine, prompt, max_tokens=3, ignore_eos=True)).items
    warm = (await collect(engine, prompt, max_tokens=3, ignore_eos=True)).items
    assert (cold[0].worker_id, cold[0].cached_tokens) == (0, 0)
    assert warm[0].cached_tokens == (len(prompt) - 1) // 16 * 16 > 0
    assert cold[-1].finish_reason == "length"
    timings = cold[-1].timings
    assert timings is not None
    assert timings.prefill_ms > 0
    assert timings.decode_ms > 0
    for item in cold[1:]:
        assert item.worker_id is None
        assert item.cached_tokens is None
    assert all(item.timings is None for item in cold[:-1])


async def test_a_cached_prefix_does_not_change_the_answer(
    engine: LlamaCppEngine, chat: Chat
) -> None:
    await engine.clear_cache()
    prompt = chat("Name three colours. " * 8)
    cold, warm = [
        await collect(engine, prompt, temperature=0, max_tokens=1, logprobs=5) for _ in range(2)
    ]
    assert warm.items[0].cached_tokens
    assert cold.logprobs[0].logprob == pytest.approx(warm.logprobs[0].logprob, abs=0.1)


async def test_requests_in_one_batch_do_not_mix(engine: LlamaCppEngine, chat: Chat) -> None:
    """Each answer begins as it does alone, up to what the shape of the batch changes."""
    prompts = [chat(f"What is the capital of {name}?") for name in ("France", "Japan", "Peru")]
    sampling = {"temperature": 0, "max_tokens": 4, "logprobs": 0, "ignore_eos": True}
    alone = [await collect(engine, prompt, **sampling) for prompt in prompts]
    together = await asyncio.gather(*(collect(engine, prompt, **sampling) for prompt in prompts))
    for one, other in zip(alone, together, strict=True):
        assert one.token_ids[0] == other.token_ids[0]
        assert one.logprobs[0].logprob == pytest.approx(other.logprobs[0].logprob, abs=0.2)
    assert len({tuple(result.token_ids) for result in together}) == 3


async def test_a_seed_makes_an_answer_reproducible(engine: LlamaCppEngine, chat: Chat) -> None:
    async def sample(seed: int | None) -> list[int]:
        return (await collect(engine, chat("Tell me a story."), seed=seed, max_tokens=12)).token_ids

    await sample(0)  # the prompt is cached from here on, for all alike
    assert await sample(7) == await sample(7) != await sample(8)
    others = {tuple(await sample(None))}
    for _ in range(8):  # two stories may well begin alike
        if len(others) == 1:
            others.add(tuple(await sample(None)))
    assert len(others) == 2


@pytest.mark.parametrize("sampling", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
async def test_a_filter_that_leaves_one_token_is_greedy(
    engine: LlamaCppEngine, chat: Chat, sampling: dict[str, Any]
) -> None:
    prompt = chat("Tell me a story.")
    greedy = await collect(engine, prompt, temperature=0, max_tokens=8)
    filtered = await collect(engine, prompt, temperature=2.0, max_tokens=8, **sampling)
    assert filtered.token_ids == greedy.token_ids


async def test_max_tokens_ends_with_length(engine: LlamaCppEngine, chat: Chat) -> None:
    result = await collect(engine, chat(PARIS), temperature=0, max_tokens=3)
    assert (len(result.token_ids), result.finish_reason) == (3, "length")


async def test_min_tokens_holds_back_the_end(engine: LlamaCppEngine, chat: Chat) -> None:
    result = await collect(engine, chat(PARIS), temperature=0, min_tokens=20, max_tokens=40)
    assert len(result.token_ids) >= 20
    assert IM_END not in result.token_ids


async def test_ignore_eos_goes_on_past_the_end(engine: LlamaCppEngine, chat: Chat) -> None:
    result = await collect(engine, chat(PARIS), temperature=0, ignore_eos=True, max_tokens=20)
    assert (len(result.token_ids), result.finish_reason) == (20, "length")
    assert IM_END in result.token_ids


async def test_a_stop_token_ends_the_answer_and_is_not_part_of_it(
    engine: LlamaCppEngine, chat: Chat
) -> None:
    whole = (await collect(engine, chat(PARIS), temperature=0)).token_ids
    result = await collect(engine, chat(PARIS), temperature=0, stop_token_ids=[whole[4]])
    assert (result.token_ids, result.finish_reason) == (whole[:4], "stop")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_logit_bias_bans_and_forces(
    engine: LlamaCppEngine, chat: Chat, temperature: float
) -> None:
    best = (await collect(engine, chat(PARIS), temperature=0, max_tokens=1)).token_ids[0]
    banned = [
        await collect(
            engine, chat(PARIS), temperature=temperature, max_tokens=1, logit_bias=[(best, -100)]
        )
        for _ in range(3)
    ]
    assert best not in {result.token_ids[0] for result in banned}
    forced = await collect(
        engine, chat(PARIS), temperature=temperature, max_tokens=4, logit_bias=[(1234, 100)]
    )
    assert forced.token_ids == [1234] * 4


async def test_logprobs_are_of_the_models_own_distribution(
    engine: LlamaCppEngine, chat: Chat
) -> None:
    prompt = chat(PARIS)
    plain = await collect(engine, prompt, temperature=0, max_tokens=3, logprobs=4)
    assert len(plain.logprobs) == 3
    for token, entry in zip(plain.token_ids, plain.logprobs, strict=True):
        assert entry.top[0] == (token, entry.logprob)
        assert [p for _, p in entry.top] == sorted((p for _, p in entry.top), reverse=True)
        assert len(entry.top) == 4
    biased = await collect(
        engine, prompt, temperature=0.7, max_tokens=1, logprobs=4, logit_bias=[(1234, 100)]
    )
    assert biased.logprobs[0].logprob < -5
    assert dict(biased.logprobs[0].top).keys() == dict(plain.logprobs[0].top).keys()
    chosen_only = await collect(engine, prompt, temperature=0, max_tokens=1, logprobs=0)
    assert chosen_only.logprobs[0].top == []
    everything = await collect(engine, prompt, temperature=0, max_tokens=1, logprobs=49152)
    assert sum(math.exp(p) for _, p in everything.logprobs[0].top) == pytest.approx(1, abs=1e-3)


async def test_a_slow_reader_gets_all_that_is_ready_as_one_item(
    engine: LlamaCppEngine, chat: Chat
) -> None:
    request = GenerateRequest(
        chat("Tell me a story."), SamplingParams(max_tokens=20, logprobs=0, ignore_eos=True)
    )
    items: list[EngineOutput] = []
    async for item in engine.generate(request, FakeContext()):
        items.append(item)
        await until(lambda: engine.metrics().running == 0)
    # More than one token may be ready at first, on a machine that is slow to read it, and the
    # last one just after the figures say that it is made.
    assert len(items) <= 3
    answer = Result(items)
    assert len(answer.token_ids) == len(answer.logprobs) == 20
    assert (answer.finish_reason, items[0].worker_id) == ("length", 0)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def stop_by_context(engine: LlamaCppEngine, request: GenerateRequest) -> None:
    context = FakeContext()
    async for item in engine.generate(request, context):
        last = item
        context.stop()
    assert last.finish_reason == "cancelled"


class StopsAfter(FakeContext):
    """Stopped, for the engine's thread, when it has made so many more tokens."""

    def __init__(self, engine: LlamaCppEngine, tokens: int) -> None:
        super().__init__()
        self._inference = engine._inference
        self._limit = self._inference.metrics.output_tokens + tokens

    def is_stopped(self) -> bool:
        return self._inference.metrics.output_tokens >= self._limit


async def test_a_stopped_request_makes_no_other_token(engine: LlamaCppEngine, chat: Chat) -> None:
    request = GenerateRequest(chat("Count to 1000."), SamplingParams(ignore_eos=True))
    result = Result([item async for item in engine.generate(request, StopsAfter(engine, 3))])
    assert (len(result.token_ids), result.finish_reason) == (3, "cancelled")


async def stop_by_closing(engine: LlamaCppEngine, request: GenerateRequest) -> None:
    async with aclosing(engine.generate(request, FakeContext())) as items:
        await anext(items)


async def stop_by_cancelling_the_task(engine: LlamaCppEngine, request: GenerateRequest) -> None:
    async def read() -> None:
        async for _ in engine.generate(request, FakeContext()):
            started.set()

    started = asyncio.Event()
    task = asyncio.create_task(read())
    await started.wait()
    task.cancel()
    await asyncio.wait([task])


@pytest.mark.parametrize("stop", [stop_by_context, stop_by_closing, stop_by_cancelling_the_task])
async def test_cancelling_frees_the_blocks(
    engine: LlamaCppEngine,
    chat: Chat,
    stop: Callable[[LlamaCppEngine, GenerateRequest], Awaitable[None]],
) -> None:
    before = engine.metrics().output_tokens
    await stop(engine, GenerateRequest(chat("Count to 1000."), SamplingParams(ignore_eos=True)))
    await until(lambda: engine.metrics().running == 0)
    assert engine.metrics().used_blocks == 0
    assert engine.metrics().output_tokens - before < 1000, "it would make 2000"


async def test_a_waiting_request_can_be_cancelled() -> None:
    async with running(max_running=1) as engine:
        first = asyncio.create_task(collect(engine, [1000] * 8, max_tokens=100, ignore_eos=True))
        await until(lambda: engine.metrics().running == 1 or first.done())
        context = FakeContext()
        context.stop()
        items = [item async for item in engine.generate(GenerateRequest([5]), context)]
        assert [item.finish_reason for item in items] == ["cancelled"]
        assert len((await first).token_ids) == 100


async def test_too_small_a_pool_loses_nothing_and_answers_nothing_twice() -> None:
    """Six requests of 100 tokens on 256 cells, with equal prefixes and preemption."""
    events: list[KvEvent] = []
    async with running() as engine:
        engine.subscribe(events.extend)
        prompts = [[1000 + n % 2] * 40 + [2000 + n] * 10 for n in range(6)]
        results = await asyncio.gather(
            *(
                collect(engine, prompt, max_tokens=50, ignore_eos=True, temperature=0)
                for prompt in prompts
            )
        )
        assert [len(result.token_ids) for result in results] == [50] * 6
        assert {result.finish_reason for result in results} == {"length"}
        for result in results:
            assert sum(item.worker_id is not None for item in result.items) == 1
        metrics = engine.metrics()
        assert (metrics.running, metrics.waiting, metrics.used_blocks) == (0, 0, 0)
        assert metrics.output_tokens == 300
        assert replay(events) == set(engine._cache.index)
        assert any(isinstance(event, BlockRemoved) for event in events)
        await engine.clear_cache()
        assert isinstance(events[-1], AllBlocksCleared)
        whole = await collect(engine, [3000 + i for i in range(255)], max_tokens=1)
        assert whole.finish_reason == "length"


async def test_events_name_the_blocks_of_the_prompt(engine: LlamaCppEngine) -> None:
    events: list[KvEvent] = []
    engine.subscribe(events.extend)
    prompt = [4000 + i for i in range(40)]
    await collect(engine, prompt, max_tokens=1)
    assert events == [BlockStored(block_hashes(prompt, 16), None, prompt[:32], 16)]


async def test_the_queue_is_bounded() -> None:
    async with running(max_running=1, max_waiting=1) as engine:
        go = threading.Event()

        def wait() -> None:
            """Else the first may be done before the last one comes."""
            go.wait(60)

        engine._inference.call(wait)
        tasks = [
            asyncio.create_task(collect(engine, [1000 + n], max_tokens=5, ignore_eos=True))
            for n in range(4)
        ]
        await until(lambda: len(engine._open) == 4)
        go.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    kinds = [r.info.kind if isinstance(r, PipelineError) else "answered" for r in results]
    assert kinds == ["answered", "answered", "overloaded", "overloaded"]


async def test_what_does_not_fit_is_refused_with_both_numbers(engine: LlamaCppEngine) -> None:
    with pytest.raises(PipelineError, match=r"2048 tokens.*context length is 2048"):
        engine.generate(GenerateRequest([1] * 2048), FakeContext())
    with pytest.raises(PipelineError, match=r"token_ids has 49152.*0 to 49151"):
        engine.generate(GenerateRequest([49152]), FakeContext())


async def test_a_failure_reaches_every_caller_and_completes_failed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Running and waiting callers all get the cause; nobody hangs."""
    async with running(max_running=2) as engine:
        tasks = [
            asyncio.create_task(collect(engine, [1000 + n], max_tokens=200, ignore_eos=True))
            for n in range(4)
        ]
        await until(lambda: engine.metrics().running == 2)

        def broken() -> None:
            raise LlamaCppError("llama_decode returned -3")

        engine._inference._context.decode = broken  # type: ignore[method-assign]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for result in results:
            assert isinstance(result, PipelineError)
            assert result.info.kind == "internal"
            assert "llama_decode returned -3" in str(result)
            assert isinstance(result.__cause__, LlamaCppError)
        assert isinstance(await engine.failed, LlamaCppError)
        with pytest.raises(PipelineError, match="llama_decode returned -3"):
            engine.generate(GenerateRequest([1]), FakeContext())
        with pytest.raises(PipelineError, match="llama_decode returned -3"):
            await engine.clear_cache()
    assert "the engine failed" in caplog.text


async def test_closing_ends_running_requests_as_cancelled() -> None:
    async with running(max_running=2) as engine:
        tasks = [
            asyncio.create_task(collect(engine, [1000 + n], max_tokens=200, ignore_eos=True))
            for n in range(4)
        ]
        await until(lambda: engine.metrics().running == 2)
        await engine.close()
        results = await asyncio.gather(*tasks)
        assert {result.finish_reason for result in results} == {"cancelled"}
        assert not engine._inference.is_alive()
        with pytest.raises(PipelineError, match="closed"):
            engine.generate(GenerateRequest([1]), FakeContext())


async def test_the_event_loop_is_never_blocked() -> None:
    """It goes on while the engine loads, while it computes a prompt and while it closes.

    What is counted is turns and not time, of which other programs may take as much as they like.
    """
    turns = 0
    turned = threading.Semaphore(0)

    async def tick() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0.001)
            turns += 1
            turned.release()

    ticking = asyncio.create_task(tick())
    async with running(cache_tokens=1024) as engine:
        loading = turns
        await collect(engine, [1000 + i for i in range(300)], max_tokens=2)
        computing = turns - loading
        close, went_on = engine._inference._context.close, []

        def close_slowly() -> None:
            while turned.acquire(blocking=False):
                pass
            went_on.append(turned.acquire(timeout=30))
            close()

        engine._inference._context.close = close_slowly  # type: ignore[method-assign]
    ticking.cancel()
    assert loading > 10
    assert computing > 20
    assert went_on == [True]


async def test_a_model_that_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no/such\.gguf"):
        await LlamaCppEngine.start(LlamaCppSettings(model="no/such.gguf"))
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(LlamaCppError, match=r"broken\.gguf"):
        await LlamaCppEngine.start(LlamaCppSettings(model=str(broken)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_size": 0}, "block_size is 0; it must be from 1 to 8192"),
        ({"max_sequences": 257}, "max_sequences is 257; it must be from 1 to 255"),
        ({"max_running": 129}, "max_running is 129; it must be from 1 to 128"),
        ({"max_waiting": -1}, "max_waiting is -1; it must be at least 0"),
        ({"threads": 0}, "threads is 0; it must be at least 1"),
    ],
)
async def test_a_setting_out_of_range_is_named(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LlamaCppSettings(**settings)  # type: ignore[arg-type]
