"""The limits on JSON schemas, and their compilation beside the engine's queue."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Sequence
from typing import Any

from common.engines.json_schema import check_schema_numbers, schema_error
from common.engines.llamacpp import LlamaCppEngine, LlamaCppSettings
from common.protocol import EngineOutput, GenerateRequest, PipelineError, SamplingParams
from tests.common.engines.engine_helpers import ONE_THREAD, FakeContext, collect

import pytest
import pytest_asyncio
from llguidance import LLMatcher

BOOLEAN = '{"type": "boolean"}'


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"minimum": 10**30}, r"minimum is 10{30}; it must be from -9007199254740991 to"),
        ({"type": "integer", "minimum": -(2**63), "maximum": -(2**63)}, "minimum is -9223372"),
        ({"items": [{"exclusiveMaximum": -1e20}]}, r"exclusiveMaximum is -1e\+20"),
        ({"properties": {"a": {"maximum": 2**53}}}, "maximum is 9007199254740992"),
        ({"multipleOf": 9999991}, "multipleOf is 9999991"),
        ({"allOf": [{"multipleOf": 997}, {"multipleOf": 991}]}, "multipleOf is"),
    ],
)
def test_numbers_that_llguidance_would_change_or_choke_on_are_refused(
    schema: dict[str, Any], message: str
) -> None:
    """-2**63 crashed the process, 9999991 took minutes and gigabytes, 10**30 was lowered."""
    with pytest.raises(PipelineError, match=message) as caught:
        check_schema_numbers(json.dumps(schema))
    assert (caught.value.info.kind, caught.value.info.param) == ("invalid_request", "json_schema")


def test_a_number_that_a_later_one_of_the_same_name_hides_is_checked() -> None:
    with pytest.raises(PipelineError, match="minimum is"):
        check_schema_numbers('{"minimum": 1e30, "minimum": 1}')


@pytest.mark.parametrize(
    "schema",
    [
        {"minimum": -(2**53) + 1, "exclusiveMaximum": 2**53 - 1},
        {"properties": {"price": {"multipleOf": 0.01}, "minutes": {"multipleOf": 60}}},
        {"properties": {"minimum": {"type": "number"}, "multipleOf": {"multipleOf": 10**6}}},
        {"maximum": True, "multipleOf": 0},
    ],
)
def test_other_numbers_are_left_to_llguidance(schema: dict[str, Any]) -> None:
    check_schema_numbers(json.dumps(schema))


@pytest.mark.parametrize("text", ["{", "[" * 60000, '{"minimum": ' + "9" * 5000 + "}"])
def test_text_that_python_cannot_parse_is_refused(text: str) -> None:
    with pytest.raises(PipelineError, match="not valid JSON"):
        check_schema_numbers(text)


def test_an_error_is_one_bounded_printable_line() -> None:
    """Schema text is in llguidance's messages, and messages are logged."""
    forged = schema_error("Invalid type: a\n12:00 INFO fake\x1b[31m\u202e\n<state>\ngrammar")
    assert forged.info.message == (
        "the JSON schema cannot be used: Invalid type: a 12:00 INFO fake\\x1b[31m\\u202e"
    )
    assert len(schema_error("x" * 10**6).info.message) < 250


class HeldCompiler:
    """Makes an engine's compilations wait until `release` is set; counts those that began."""

    def __init__(self, engine: LlamaCppEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.release = threading.Event()
        self.began = 0
        original = engine._grammars.compile

        def held(json_schema: str, output: Sequence[int] = ()) -> LLMatcher:
            self.began += 1
            assert self.release.wait(30)
            return original(json_schema, output)

        monkeypatch.setattr(engine._grammars, "compile", held)


@pytest_asyncio.fixture
async def engine() -> AsyncIterator[LlamaCppEngine]:
    settings = LlamaCppSettings(
        cache_tokens=256, max_sequences=8, max_running=2, max_waiting=2, **ONE_THREAD
    )
    engine = await LlamaCppEngine.start(settings)
    yield engine
    await engine.close()


@pytest.fixture
def held(engine: LlamaCppEngine, monkeypatch: pytest.MonkeyPatch) -> HeldCompiler:
    return HeldCompiler(engine, monkeypatch)


async def ask(engine: LlamaCppEngine, context: FakeContext) -> list[EngineOutput]:
    request = GenerateRequest([1000], SamplingParams(json_schema=BOOLEAN))
    return [item async for item in engine.generate(request, context)]


async def start(engine: LlamaCppEngine, count: int) -> list[asyncio.Task[list[EngineOutput]]]:
    """So many requests, all of them waiting for their schema."""
    tasks = [asyncio.create_task(ask(engine, FakeContext())) for _ in range(count)]
    while engine.metrics().waiting < count:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    return tasks


async def test_a_schema_over_the_size_limit_is_refused_at_once(engine: LlamaCppEngine) -> None:
    schema = json.dumps({"enum": ["é" * 40000]}, ensure_ascii=False)
    with pytest.raises(PipelineError, match="has 80014 bytes; at most 65536") as caught:
        await collect(engine, [1], json_schema=schema)
    assert (caught.value.info.kind, caught.value.info.param) == ("invalid_request", "json_schema")


async def test_requests_that_wait_for_their_schema_count_as_waiting(
    engine: LlamaCppEngine, held: HeldCompiler
) -> None:
    tasks = await start(engine, 4)
    with pytest.raises(PipelineError, match="has 4 of at most 4 requests") as caught:
        await ask(engine, FakeContext())
    assert caught.value.info.kind == "overloaded"
    plain = await collect(engine, [1000], max_tokens=2, ignore_eos=True)
    assert plain.finish_reason == "length"
    held.release.set()
    assert [items[-1].finish_reason for items in await asyncio.gather(*tasks)] == ["stop"] * 4
    assert engine.metrics().waiting == 0


async def test_a_request_stopped_while_it_waits_ends_at_once_and_is_not_compiled(
    engine: LlamaCppEngine, held: HeldCompiler
) -> None:
    busy = await start(engine, 2)  # both threads
    context = FakeContext()
    waiting = asyncio.create_task(ask(engine, context))
    left = asyncio.create_task(ask(engine, FakeContext()))
    while engine.metrics().waiting < 4:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    context.stop()
    left.cancel()
    items = await asyncio.wait_for(waiting, 20)
    assert [item.finish_reason for item in items] == ["cancelled"]
    assert items[0].worker_id == 0
    await asyncio.wait([left], timeout=20)
    assert left.cancelled()
    assert engine.metrics().waiting == 2
    held.release.set()
    await asyncio.gather(*busy)
    assert held.began == 2


async def test_closing_cancels_the_compilations_that_have_not_begun(
    engine: LlamaCppEngine, held: HeldCompiler
) -> None:
    tasks = await start(engine, 4)
    closing = asyncio.create_task(engine.close())
    done, _ = await asyncio.wait(tasks[2:], timeout=20)
    reasons = [task.result()[-1].finish_reason for task in done]
    assert reasons == ["cancelled"] * 2
    held.release.set()
    await closing
    for result in await asyncio.gather(*tasks[:2], return_exceptions=True):
        assert isinstance(result, PipelineError)
        assert result.info.kind == "unavailable"
    assert held.began == 2
