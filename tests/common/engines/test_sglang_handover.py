"""Prompts that one SGLang computes for another, with a stand-in for SGLang itself."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from common.engines.sglang import SGLangEngine
from common.engines.sglang_load import SGLangLoad
from common.engines.sglang_settings import SGLangSettings
from common.protocol import (
    EngineInfo,
    EngineOutput,
    GenerateRequest,
    PipelineError,
    SamplingParams,
)
from common.protocol_transfer import KvDescriptor
from tests.chapter1.helpers import eventually
from tests.common.engines.engine_helpers import FakeContext

import pytest
import pytest_asyncio

ROOM = {"bootstrap_host": "10.0.0.7", "bootstrap_port": 8998, "bootstrap_room": 12}


class FakeSGLang:
    """Takes what SGLang's `Engine` is asked for; ends each request when `finish` is set."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.finish = asyncio.Event()
        self.left = 0

    async def async_generate(self, **arguments: Any) -> AsyncGenerator[dict[str, Any], None]:
        self.asked.append(arguments)
        return self._outputs()

    async def _outputs(self) -> AsyncGenerator[dict[str, Any], None]:
        try:
            await self.finish.wait()
            meta = {"finish_reason": {"type": "length", "length": 1}, "cached_tokens": 0}
            yield {"output_ids": [5], "meta_info": meta}
        except BaseException:
            self.left += 1
            raise


class FakeProcess:
    def __init__(self, mode: str) -> None:
        self.engine = FakeSGLang()
        flags = {"enable_deterministic_inference": False, "grammar_backend": "xgrammar"}
        args = SimpleNamespace(**flags, disaggregation_mode=mode)
        self.settings = SGLangSettings(args, "", "", "")

    async def close(self) -> None:
        pass


@pytest_asyncio.fixture
async def engine_in(tmp_path: Path) -> AsyncIterator[Any]:
    loads = []

    def make(mode: str) -> tuple[SGLangEngine, FakeSGLang]:
        engine: Any = SGLangEngine()
        engine._process = process = FakeProcess(mode)
        engine._load = SGLangLoad(f"ipc://{tmp_path}/{mode}", 16)
        loads.append(engine._load)
        engine._vocab_size = 1000
        engine._bootstrap = ("10.0.0.7", 8998)
        engine.info = EngineInfo("model", "sglang", 100, 16, 10, worker_id=4)
        return engine, process.engine

    yield make
    for load in loads:
        load.close()


def request(**fields: Any) -> GenerateRequest:
    return GenerateRequest([1, 2, 3], SamplingParams(max_tokens=9), **fields)


async def test_the_prefill_engine_says_at_once_where_the_kv_will_be(engine_in: Any) -> None:
    """The decode engine must be there before the prompt is computed; the caller stays."""
    engine, sglang = engine_in("prefill")
    stream = engine.generate(request(prefill_only=True), FakeContext())
    item = await anext(stream)
    assert item.kv is not None
    assert (item.kv.kind, item.kv.tokens, item.worker_id) == ("sglang", 3, 4)
    assert item.token_ids == []
    assert item.finish_reason is None
    await eventually(lambda: sglang.asked)
    data = item.kv.data
    assert {name: sglang.asked[0][name] for name in data} == data
    assert data == {**ROOM, "bootstrap_room": data["bootstrap_room"]}
    ending = asyncio.ensure_future(anext(stream, None))
    await asyncio.sleep(0)
    assert not ending.done()
    sglang.finish.set()
    assert await ending is None


async def test_rooms_differ(engine_in: Any) -> None:
    engine, _ = engine_in("prefill")
    rooms = set()
    for _ in range(3):
        stream = engine.generate(request(prefill_only=True), FakeContext())
        rooms.add((await anext(stream)).kv.data["bootstrap_room"])
        await stream.aclose()
    assert len(rooms) == 3


async def test_a_caller_who_leaves_ends_the_prefill(engine_in: Any) -> None:
    engine, sglang = engine_in("prefill")
    context = FakeContext()
    stream = engine.generate(request(prefill_only=True), context)
    await anext(stream)
    await eventually(lambda: sglang.asked)
    context.stop()
    assert await anext(stream, None) is None
    assert sglang.left == 1
    assert engine.metrics().running == 0


async def test_the_decode_engine_goes_to_that_room(engine_in: Any) -> None:
    engine, sglang = engine_in("decode")
    sglang.finish.set()
    kv = KvDescriptor("sglang", 3, dict(ROOM))
    items: list[EngineOutput] = [
        item async for item in engine.generate(request(kv=kv), FakeContext())
    ]
    assert {name: sglang.asked[0][name] for name in ROOM} == ROOM
    assert [item.token_ids for item in items] == [[5]]


async def test_an_aggregated_engine_computes_itself(engine_in: Any) -> None:
    engine, sglang = engine_in("null")
    sglang.finish.set()
    kv = KvDescriptor("sglang", 3, dict(ROOM))
    assert [item async for item in engine.generate(request(kv=kv), FakeContext())]
    assert not set(ROOM) & set(sglang.asked[0])


@pytest.mark.parametrize(
    ("mode", "fields", "param"),
    [
        ("null", {"prefill_only": True}, "prefill_only"),
        ("decode", {"prefill_only": True}, "prefill_only"),
        ("prefill", {}, "prefill_only"),
        ("decode", {}, "kv"),
        ("decode", {"kv": KvDescriptor("llamacpp", 3, dict(ROOM))}, "kv"),
        ("decode", {"kv": KvDescriptor("sglang", 3, {"bootstrap_host": 5})}, "kv"),
    ],
)
async def test_roles_that_do_not_fit(
    engine_in: Any, mode: str, fields: dict[str, Any], param: str
) -> None:
    engine, sglang = engine_in(mode)
    with pytest.raises(PipelineError) as error:
        engine.generate(request(**fields), FakeContext())
    assert (error.value.info.kind, error.value.info.param) == ("invalid_request", param)
    assert sglang.asked == []


async def test_an_engine_that_failed(engine_in: Any) -> None:
    """Who waits is told, and nobody new is let in."""
    engine, sglang = engine_in("null")
    stream = engine.generate(request(), FakeContext())
    reading = asyncio.ensure_future(anext(stream))
    await eventually(lambda: sglang.asked)
    engine._fail(RuntimeError("gone"))
    with pytest.raises(PipelineError, match="gone"):
        await reading
    with pytest.raises(PipelineError, match="gone"):
        engine.generate(request(), FakeContext())
    assert str(engine.failed.result()) == "gone"
