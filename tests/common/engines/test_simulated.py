import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

from common.engines.llama_capi import Vocab
from common.engines.simulated import SimulatedEngine, SimulatedSettings
from common.kv import AllBlocksCleared, KvEvent, block_hashes
from common.model_files import DEFAULT_MODEL, find_model
from common.protocol import EngineOutput, GenerateRequest, PipelineError, SamplingParams
from tests.common.engines.engine_helpers import FakeContext, collect, replay

import pytest


@asynccontextmanager
async def simulated(**settings: Any) -> AsyncIterator[SimulatedEngine]:
    fast = {"prefill_tokens_per_s": 1e6, "decode_base_ms": 0.1, "decode_ms_per_request": 0.01}
    engine = await SimulatedEngine.start(SimulatedSettings(**{**fast, **settings}))
    try:
        yield engine
    finally:
        await engine.close()


both_modes = pytest.mark.parametrize("zero_delay", [False, True])


@both_modes
async def test_equal_prompts_give_equal_outputs(zero_delay: bool) -> None:
    async with simulated(zero_delay=zero_delay) as engine:
        outputs = [await collect(engine, [1, 2, 3], max_tokens=50) for _ in range(2)]
        other = await collect(engine, [1, 2, 4], max_tokens=50)
    assert outputs[0].token_ids == outputs[1].token_ids != other.token_ids
    assert len(outputs[0].token_ids) == 50
    assert outputs[0].finish_reason == "length"


@both_modes
async def test_an_output_can_be_continued_elsewhere(zero_delay: bool) -> None:
    """Migration of a broken stream relies on it."""
    async with simulated(zero_delay=zero_delay) as engine:
        whole = await collect(engine, [7, 8, 9], max_tokens=None, min_tokens=20)
        first = whole.token_ids[:15]
        rest = await collect(engine, [7, 8, 9, *first], max_tokens=None, min_tokens=5)
    assert first + rest.token_ids == whole.token_ids
    assert whole.finish_reason == rest.finish_reason == "stop"


@both_modes
async def test_stop_token_ids_end_the_output_but_not_before_min_tokens(zero_delay: bool) -> None:
    async with simulated(zero_delay=zero_delay) as engine:
        tokens = (await collect(engine, [5], max_tokens=20)).token_ids
        stopped = await collect(engine, [5], max_tokens=20, stop_token_ids=[tokens[8]])
        late = await collect(engine, [5], max_tokens=20, stop_token_ids=[tokens[8]], min_tokens=12)
    assert (stopped.token_ids, stopped.finish_reason) == (tokens[:8], "stop")
    assert (late.token_ids, late.finish_reason) == (tokens, "length")


async def test_without_max_tokens_outputs_end_by_themselves_unless_eos_is_ignored() -> None:
    async with simulated(zero_delay=True, mean_output_tokens=20, context_length=600) as engine:
        results = [await collect(engine, [n], max_tokens=None) for n in range(200)]
        endless = await collect(engine, [1], max_tokens=None, ignore_eos=True)
    lengths = [len(result.token_ids) for result in results]
    assert 12 < sum(lengths) / len(lengths) < 30
    assert len(endless.token_ids) == 599
    assert endless.finish_reason == "length"


@both_modes
async def test_items_have_tokens_per_item(zero_delay: bool) -> None:
    async with simulated(zero_delay=zero_delay, tokens_per_item=8) as engine:
        items = (await collect(engine, [1], max_tokens=20)).items
    assert [len(item.token_ids) for item in items] == [8, 8, 4]


@both_modes
async def test_first_and_last_items_carry_the_metadata(zero_delay: bool) -> None:
    async with simulated(zero_delay=zero_delay, worker_id=7) as engine:
        await collect(engine, list(range(40)), max_tokens=3)
        items = (await collect(engine, list(range(40)), max_tokens=3)).items
    assert [item.worker_id for item in items] == [7, None, None]
    assert [item.cached_tokens for item in items] == [32, None, None]
    assert [item.finish_reason for item in items] == [None, None, "length"]
    assert items[0].timings is None
    assert items[2].timings is not None
    assert items[2].timings.prefill_ms >= 0


async def test_zero_delay_streams_interleave() -> None:
    order: list[int] = []

    async def read(engine: SimulatedEngine, n: int) -> None:
        request = GenerateRequest([n], SamplingParams(max_tokens=5))
        async for _ in engine.generate(request, FakeContext()):
            order.append(n)

    async with simulated(zero_delay=True) as engine:
        await asyncio.gather(*(read(engine, n) for n in range(3)))
    assert order == [0, 1, 2] * 5


@both_modes
async def test_a_stopped_context_ends_the_stream_and_frees_the_blocks(zero_delay: bool) -> None:
    async with simulated(zero_delay=zero_delay) as engine:
        context = FakeContext()
        items: list[EngineOutput] = []
        request = GenerateRequest([1, 2, 3], SamplingParams(max_tokens=8000))
        async for item in engine.generate(request, context):
            items.append(item)
            context.stop()
        assert items[-1].finish_reason == "cancelled"
        assert sum(len(item.token_ids) for item in items) < 10
        assert (engine.metrics().running, engine.metrics().used_blocks) == (0, 0)


@both_modes
async def test_closing_the_stream_cancels(zero_delay: bool) -> None:
    async with simulated(zero_delay=zero_delay) as engine:
        stream = engine.generate(
            GenerateRequest([1], SamplingParams(max_tokens=8000)), FakeContext()
        )
        async with aclosing(stream) as items:
            await anext(items)
        await collect(engine, [2], max_tokens=2)
        assert (engine.metrics().running, engine.metrics().used_blocks) == (0, 0)


async def test_the_queue_is_bounded() -> None:
    async with simulated(max_running=1, max_waiting=2, decode_base_ms=5) as engine:
        tasks = [asyncio.create_task(collect(engine, [n], max_tokens=10)) for n in range(4)]
        results = await asyncio.gather(*tasks, return_exceptions=True)
    refused = [result for result in results if isinstance(result, PipelineError)]
    assert [error.info.kind for error in refused] == ["overloaded"]
    assert isinstance(results[3], PipelineError)


@pytest.mark.parametrize(
    ("sampling", "name"),
    [
        (SamplingParams(json_schema="{}"), "json_schema"),
        (SamplingParams(logprobs=0), "logprobs"),
        (SamplingParams(logit_bias=[(1, 2.0)]), "logit_bias"),
    ],
)
async def test_what_it_cannot_do_is_refused_by_name(sampling: SamplingParams, name: str) -> None:
    async with simulated() as engine:
        with pytest.raises(PipelineError, match=name) as caught:
            engine.generate(GenerateRequest([1], sampling), FakeContext())
    assert (caught.value.info.kind, caught.value.info.param) == ("invalid_request", name)


async def test_events_tell_what_is_cached_also_under_eviction_and_preemption() -> None:
    """The pool is far too small for the load: everything is answered once and completely."""
    events: list[KvEvent] = []
    async with simulated(
        cache_tokens=256, context_length=256, max_running=8, decode_base_ms=0.01
    ) as engine:
        engine.subscribe(events.extend)
        prompts = [[n % 3] * 40 + [n] * 20 for n in range(20)]
        results = await asyncio.gather(*(collect(engine, p, max_tokens=60) for p in prompts))
        alone = [await collect(engine, prompt, max_tokens=60) for prompt in prompts]
        assert [r.token_ids for r in results] == [r.token_ids for r in alone]
        assert {r.finish_reason for r in results} == {"length"}
        assert replay(events) == set(engine._scheduler.cache.index)
        assert engine.metrics().running == engine.metrics().waiting == 0


@both_modes
async def test_a_reader_that_leaves_at_the_last_item_leaves_nothing_running(
    zero_delay: bool,
) -> None:
    async with simulated(zero_delay=zero_delay) as engine:
        stream = engine.generate(GenerateRequest([1], SamplingParams(max_tokens=2)), FakeContext())
        item = await anext(stream)
        while item.finish_reason is None:
            item = await anext(stream)
        assert (engine.metrics().running, engine.metrics().used_blocks) == (0, 0)
        await stream.aclose()


async def test_clearing_the_cache_forgets_what_no_request_holds() -> None:
    events: list[KvEvent] = []
    async with simulated() as engine:
        engine.subscribe(events.extend)
        await collect(engine, [1] * 40, max_tokens=2)
        await engine.clear_cache()
    assert isinstance(events[-1], AllBlocksCleared)


async def test_a_cached_prefix_counts_and_is_in_the_index() -> None:
    prompt = list(range(100, 164))
    async with simulated() as engine:
        await collect(engine, prompt, max_tokens=1)
        again = await collect(engine, [*prompt, 1], max_tokens=1)
        assert set(block_hashes(prompt, 16)) <= set(engine._scheduler.cache.index)
        assert engine.metrics().cached_tokens == 64
    assert again.items[0].cached_tokens == 64


async def test_prefill_and_decode_take_the_modelled_time() -> None:
    async with simulated(
        prefill_tokens_per_s=1000, decode_base_ms=10, decode_ms_per_request=0
    ) as engine:
        last = (await collect(engine, list(range(200)), max_tokens=6)).items[-1]
    assert last.timings is not None
    assert last.timings.prefill_ms >= 200
    assert last.timings.decode_ms >= 50


async def test_a_failure_reaches_every_caller_and_completes_failed() -> None:
    async with simulated(max_running=1) as engine:
        tasks = [asyncio.create_task(collect(engine, [n], max_tokens=999)) for n in range(3)]
        await asyncio.sleep(0)

        def broken() -> None:
            raise RuntimeError("broken plan")

        engine._scheduler.plan = broken  # type: ignore[method-assign, assignment]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(result) for result in results] == [PipelineError] * 3
        assert "broken plan" in str(results[0])
        assert str(engine.failed.result()) == "broken plan"
        with pytest.raises(PipelineError, match="broken plan"):
            engine.generate(GenerateRequest([1]), FakeContext())


async def test_closing_the_engine_ends_requests_as_cancelled() -> None:
    async with simulated() as engine:
        request = GenerateRequest([1], SamplingParams(max_tokens=8000))
        streams = [engine.generate(request, FakeContext()) for _ in range(3)]
        await asyncio.gather(*(anext(stream) for stream in streams))
        await engine.close()
        last = [[item async for item in stream][-1] for stream in streams]
        assert {item.finish_reason for item in last} == {"cancelled"}
        with pytest.raises(PipelineError, match="closed"):
            engine.generate(GenerateRequest([1]), FakeContext())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens_per_item": 0}, "tokens_per_item is 0; it must be at least 1"),
        ({"block_size": 0}, "block_size is 0; it must be from 1 to 65536"),
        ({"token_ids": (9, 5)}, r"token_ids\[0\] is 9; it must be from 0 to 5"),
    ],
)
def test_a_setting_out_of_range_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SimulatedSettings(**settings)


@pytest.mark.parametrize(
    ("file", "name"), [("tiny.Q4_1.gguf", "tiny"), ("toy.v1/config.json", "toy.v1"), (None, None)]
)
async def test_it_calls_its_model_what_the_processor_does(
    tmp_path: Path, file: str | None, name: str | None
) -> None:
    """A GGUF file, a Hugging Face folder, the default."""
    model = DEFAULT_MODEL
    if file is not None:
        path = tmp_path / file
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"GGUF")
        model = str(path if path.suffix == ".gguf" else path.parent)
    async with simulated(model=model) as engine:
        assert engine.info.model == (name or DEFAULT_MODEL)


async def test_a_model_that_does_not_exist_is_refused() -> None:
    with pytest.raises(FileNotFoundError, match=r"no/such\.gguf"):
        await SimulatedEngine.start(SimulatedSettings(model="no/such.gguf"))


async def test_it_says_that_it_is_simulated(caplog: pytest.LogCaptureFixture) -> None:
    async with simulated() as engine:
        assert engine.info.simulated
    assert "SIMULATED" in caplog.text


def test_default_token_ids_are_whole_text_in_the_default_model() -> None:
    vocab = Vocab(find_model(DEFAULT_MODEL))
    first, last = SimulatedSettings().token_ids
    try:
        texts = [vocab.token_bytes(token).decode() for token in range(first, last + 1)]
    finally:
        vocab.close()
    assert all(texts)
