"""A prefill engine that stops, or just falls silent, after it has handed a prompt over."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any, cast

from chapter3 import remote_prefill, silence
from chapter3.remote_prefill import RemotePrefill
from chapter3.silence import Silence
from common.kv_transfer.start import kv_transfer
from common.protocol import EngineOutput, GenerateRequest, SamplingParams, to_wire
from common.protocol_transfer import KvDescriptor
from tests.chapter1.helpers import eventually, lines_about
from tests.chapter3.helpers import RuntimeCaller
from tests.chapter3.test_routed_stream import FakeContext
from tests.conftest import StartPipeline

import pytest
from dynamo.runtime import Client, Context

KV = KvDescriptor("sglang", 3)


async def hand_over(caller: RuntimeCaller, namespace: str) -> KvDescriptor:
    """What the prefill engine has of a prompt of 40 tokens, which nobody has fetched yet."""
    prompt = list(range(1000, 1040))
    request = GenerateRequest(prompt, SamplingParams(max_tokens=5), prefill_only=True)
    outputs = await caller.call(f"{namespace}.engine.generate", to_wire(request), EngineOutput)
    assert outputs[-1].kv is not None
    assert outputs[-1].kv.kind == "zmq"
    return outputs[-1].kv


async def test_what_it_has_lent_can_be_fetched_while_it_drains(
    start_pipeline: StartPipeline, runtime_caller: RuntimeCaller
) -> None:
    """And as soon as it has been, it ends."""
    async with start_pipeline(
        chapter="chapter3", engines=2, prefill=1, backend="llamacpp", start=["engine0"]
    ) as running:
        engine = running.processes["engine0"]
        kv = await hand_over(runtime_caller, running.namespace)
        engine.terminate()
        await eventually(lambda: bool(lines_about(engine, "of KV are still to be fetched")))
        assert engine.running
        async with kv_transfer("zmq", "127.0.0.1") as transfer:
            pieces = await transfer.borrower.fetch(kv, 0)
        assert pieces.tokens == 40
        began = time.monotonic()
        assert await engine.wait() == 0
        assert time.monotonic() - began < 15, "it does not wait until the lease is over"


async def test_it_waits_no_longer_than_it_may_drain(
    start_pipeline: StartPipeline, runtime_caller: RuntimeCaller
) -> None:
    async with start_pipeline(
        chapter="chapter3",
        engines=2,
        prefill=1,
        backend="llamacpp",
        start=["engine0"],
        arguments={"engine": ["--drain-timeout=2"]},
    ) as running:
        engine = running.processes["engine0"]
        await hand_over(runtime_caller, running.namespace)
        engine.terminate()
        assert await engine.wait() == 0
        assert lines_about(engine, "of KV are still to be fetched")
        assert lines_about(engine, "of KV were not fetched")


@pytest.mark.parametrize("unlisted", [True, False])
async def test_its_stream_is_not_read_for_ever(
    monkeypatch: pytest.MonkeyPatch, unlisted: bool
) -> None:
    """Its machine lost its power, or it hangs; one that is heard of may keep it open."""
    monkeypatch.setattr(silence, "SILENT_S", 0.05)
    monkeypatch.setattr(remote_prefill, "READ_ON_S", 0.05)
    monkeypatch.setattr(silence, "CHECK_S", 0.01)
    closed = asyncio.Event()
    listed, silent, asked = [100, 101], [False], [0]

    class Engine:
        async def direct(self, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
            return self._stream()

        async def _stream(self) -> AsyncIterator[Any]:
            try:
                yield to_wire(EngineOutput(kv=KV))
                await asyncio.Event().wait()
            finally:
                closed.set()

    async def hangs(instance: int) -> bool:
        asked[0] += 1
        return silent[0]

    remote = RemotePrefill(cast(Client, Engine()), 60.0)
    answer = await remote.compute(
        GenerateRequest([1, 2, 3]),
        100,
        Silence(lambda: listed, hangs),
        cast(Context, FakeContext()),
    )
    assert answer.kv == KV
    await eventually(lambda: asked[0] > 3)
    assert not closed.is_set()
    if unlisted:
        listed.remove(100)
    else:
        silent[0] = True
    await asyncio.wait_for(closed.wait(), 30)
    await eventually(lambda: not remote._reading)
    await remote.close()
