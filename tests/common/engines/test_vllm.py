"""The vLLM engine's own part: handovers of KV, failures, what vLLM says in our words.

What vLLM itself does is checked with the real one: `scripts/test-engines vllm`.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from common.engines.engine_events import EngineEvents
from common.engines.event_translation import EventTranslation
from common.engines.vllm import VllmEngine
from common.engines.vllm_sampling import REMOTE_DECODE
from common.engines.vllm_stats import VllmStats
from common.kv import AllBlocksCleared, KvEvent
from common.protocol import EngineInfo, GenerateRequest, PipelineError, SamplingParams
from common.protocol_transfer import KvDescriptor
from tests.chapter1.helpers import eventually
from tests.common.engines import fake_vllm
from tests.common.engines.engine_helpers import FakeContext, Result
from tests.common.engines.fake_vllm import FakeLLM, GracefulHTTPError, VLLMClientError, output

import pytest

PROMPT = [5, 6, 7]
REMOTE = {"do_remote_prefill": True, "remote_engine_id": "e", "remote_block_ids": [1]}


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_vllm.install(monkeypatch)


@asynccontextmanager
async def engine_of(llm: FakeLLM, folder: Path) -> AsyncIterator[VllmEngine]:
    async with AsyncExitStack() as stack:
        translation = EventTranslation(16, has_copies=True)
        events = EngineEvents(f"ipc://{folder}/events", translation)
        stack.callback(events.close)
        info = EngineInfo("a-model", "vllm", 50, 16, 10, worker_id=4, max_running=2)
        engine = VllmEngine(llm, info, VllmStats(), events, stack.pop_all())
    try:
        yield engine
    finally:
        await engine.close()


async def ask(engine: VllmEngine, context: FakeContext | None = None, **fields: Any) -> Result:
    sampling = fields.pop("sampling", {})
    request = GenerateRequest(fields.pop("token_ids", PROMPT), SamplingParams(**sampling), **fields)
    return Result([item async for item in engine.generate(request, context or FakeContext())])


async def test_a_prompt_is_computed_for_another_engine(tmp_path: Path) -> None:
    """It ends by length, or the KV would not be kept; its one token is no part of the answer."""
    llm = FakeLLM(lambda params: [output([9], "length", dict(REMOTE))])
    async with engine_of(llm, tmp_path) as engine:
        sampling = {"max_tokens": 30, "stop_token_ids": [9], "logprobs": 1, "temperature": 0.5}
        (item,) = (await ask(engine, prefill_only=True, sampling=sampling)).items
    assert (item.token_ids, item.finish_reason) == ([], None)
    assert item.kv == KvDescriptor("vllm", 3, REMOTE)
    assert (item.worker_id, item.cached_tokens) == (4, 3)
    assert item.timings is not None
    ((token_ids, params),) = llm.requests
    assert token_ids == PROMPT
    assert (params.max_tokens, params.ignore_eos) == (1, True)
    assert params.extra_args == {"kv_transfer_params": REMOTE_DECODE}


async def test_a_request_goes_on_with_what_was_handed_over(tmp_path: Path) -> None:
    llm = FakeLLM(lambda params: [output([8]), output([9], "length")])
    async with engine_of(llm, tmp_path) as engine:
        result = await ask(engine, kv=KvDescriptor("vllm", 3, REMOTE))
    assert (result.token_ids, result.finish_reason) == ([8, 9], "length")
    assert llm.requests[0][1].extra_args == {"kv_transfer_params": REMOTE}


@pytest.mark.parametrize("failure", [output([], "error"), RuntimeError("no such engine")])
async def test_kv_that_cannot_be_had_costs_time_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, failure: Any
) -> None:
    llm = FakeLLM(lambda params: [failure] if params.extra_args else [output([8, 9], "length")])
    async with engine_of(llm, tmp_path) as engine:
        result = await ask(engine, kv=KvDescriptor("vllm", 3, REMOTE))
    assert (result.token_ids, result.finish_reason) == ([8, 9], "length")
    assert [params.extra_args is None for _, params in llm.requests] == [False, True]
    assert "computing the prompt" in caplog.text


async def test_a_failure_after_the_first_token_is_the_requests_own(tmp_path: Path) -> None:
    llm = FakeLLM(lambda params: [output([8]), output([], "error")])
    async with engine_of(llm, tmp_path) as engine:
        with pytest.raises(PipelineError, match="vLLM ended the request: error") as error:
            await ask(engine, kv=KvDescriptor("vllm", 3, REMOTE))
    assert error.value.info.kind == "internal"
    assert len(llm.requests) == 1


async def test_a_schema_that_vllm_could_not_keep_to(tmp_path: Path) -> None:
    llm = FakeLLM(lambda params: [output([8]), output([], "error")])
    async with engine_of(llm, tmp_path) as engine:
        with pytest.raises(PipelineError, match="vLLM could not keep to it") as error:
            await ask(engine, sampling={"json_schema": "{}"})
    assert (error.value.info.kind, error.value.info.param) == ("invalid_request", "json_schema")
    assert "x-guidance" in llm.requests[0][1].structured_outputs.json


@pytest.mark.parametrize(("kind", "has_transfer"), [("sglang", True), ("vllm", False)])
async def test_kv_of_another_kind_is_not_fetched(
    tmp_path: Path, kind: str, has_transfer: bool
) -> None:
    llm = FakeLLM(lambda params: [output([8], "length")], has_transfer=has_transfer)
    async with engine_of(llm, tmp_path) as engine:
        assert (await ask(engine, kv=KvDescriptor(kind, 3, {"a": 1}))).token_ids == [8]
    assert llm.requests[0][1].extra_args is None


@pytest.mark.parametrize("has_transfer", [True, False])
async def test_an_engine_that_keeps_no_kv_says_so(tmp_path: Path, has_transfer: bool) -> None:
    llm = FakeLLM(lambda params: [output([9], "length")], has_transfer=has_transfer)
    async with engine_of(llm, tmp_path) as engine:
        with pytest.raises(PipelineError) as error:
            await ask(engine, prefill_only=True)
    assert error.value.info.kind == "unavailable"


async def test_a_prefill_that_is_stopped_is_cancelled(tmp_path: Path) -> None:
    llm = FakeLLM(lambda params: ["wait"])
    context = FakeContext()
    async with engine_of(llm, tmp_path) as engine:
        asking = asyncio.create_task(ask(engine, context, prefill_only=True))
        await eventually(lambda: llm.requests)
        assert engine.metrics().waiting == 1
        context.stop()
        (item,) = (await asking).items
        assert (item.finish_reason, item.kv) == ("cancelled", None)
        assert len(llm.aborted) == 1
        assert engine.metrics().waiting == 0


async def test_what_another_engine_generated_counts(tmp_path: Path) -> None:
    llm = FakeLLM(lambda params: [output([9], "length")])
    sampling = {
        "max_tokens": 10,
        "min_tokens": 4,
        "frequency_penalty": 0.5,
        "logit_bias": [(7, 1.0), (8, 1.0), (8, 0.5)],
        "seed": -3,
        "temperature": 0.0,
    }
    async with engine_of(llm, tmp_path) as engine:
        await ask(engine, token_ids=[5, 7, 7, 6], generated=3, sampling=sampling)
        for name, value in (("seed", 1), ("presence_penalty", 1.0), ("json_schema", "{}")):
            with pytest.raises(PipelineError, match=f"{name} is set") as error:
                await ask(engine, token_ids=[5, 7], generated=1, sampling={name: value})
            assert error.value.info.param == "generated"
    ((_, params),) = llm.requests
    assert (params.max_tokens, params.min_tokens) == (7, 1)
    assert params.logit_bias == {7: 0.0, 8: 1.5, 6: -0.5}
    assert params.seed == 2**63 - 3


@pytest.mark.parametrize(
    ("raised", "kind", "param"),
    [
        (GracefulHTTPError("busy"), "overloaded", None),
        (VLLMClientError("too many", "logprobs"), "invalid_request", "logprobs"),
        (VLLMClientError("top_k must be"), "invalid_request", "top_k"),
        (ValueError("what"), "invalid_request", None),
        (OSError("disk"), "internal", None),
    ],
)
async def test_errors_of_vllm(
    tmp_path: Path, raised: Exception, kind: str, param: str | None
) -> None:
    async with engine_of(FakeLLM(lambda params: [raised]), tmp_path) as engine:
        with pytest.raises(PipelineError) as error:
            await ask(engine)
        assert (error.value.info.kind, error.value.info.param) == (kind, param)


async def test_a_dead_process_fails_the_engine_and_all_requests(tmp_path: Path) -> None:
    llm = FakeLLM(lambda params: [output([8]), "wait"])
    async with engine_of(llm, tmp_path) as engine:
        asking = asyncio.create_task(ask(engine))
        await eventually(lambda: llm.requests)
        llm.errored = True
        assert "vLLM's process has ended" in str(await engine.failed)
        with pytest.raises(PipelineError, match="the engine failed"):
            await asking
        with pytest.raises(PipelineError, match="the engine failed"):
            await ask(engine)


async def test_a_closed_engine_cancels(tmp_path: Path) -> None:
    llm = FakeLLM(lambda params: [output([8]), "wait"])
    async with engine_of(llm, tmp_path) as engine:
        asking = asyncio.create_task(ask(engine))
        await eventually(lambda: llm.requests)
    assert (await asking).finish_reason == "cancelled"
    with pytest.raises(PipelineError, match="the engine is closed"):
        await ask(engine)


async def test_clearing_a_cache_in_use(tmp_path: Path) -> None:
    """vLLM does that only when it may compute running requests anew, and tells late."""
    llm = FakeLLM(lambda params: [])
    llm.can_reset = False
    async with engine_of(llm, tmp_path) as engine:
        events: list[KvEvent] = []
        engine.subscribe(events.extend)
        await engine.clear_cache()
    assert llm.reset_arguments == [{}, {"reset_running_requests": True}]
    assert events == [AllBlocksCleared()]
