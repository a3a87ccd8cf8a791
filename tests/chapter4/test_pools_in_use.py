"""Small models for short steps, large ones for answers: engines with tags, in use."""

import os
from collections.abc import Iterator

from common.protocol import EngineInfo, SamplingParams, TextOutput, to_wire
from common.protocol_routing import RoutedProcessRequest, RoutingHints
from tests.chapter1.helpers import MODEL
from tests.chapter2.helpers import RuntimeCaller, start_caller
from tests.chapter4.processor_ready import processor_answers
from tests.conftest import StartPipeline

import pytest


@pytest.fixture(scope="module")
def caller(servers: dict[str, str]) -> Iterator[RuntimeCaller]:
    with start_caller({**os.environ, **servers}) as process:
        yield RuntimeCaller(process)


async def test_steps_go_to_the_small_pool_and_answers_to_the_large_one(
    start_pipeline: StartPipeline, caller: RuntimeCaller
) -> None:
    start = ["engine0", "router", "processor"]
    arguments = {"engine": ["--tag", "pool=small"], "router": ["--no-canaries"]}
    async with start_pipeline(
        chapter="chapter4", engines=2, start=start, arguments=arguments
    ) as running:
        running.commands["engine1"] += ["--tag", "pool=large"]
        running.commands["engine1"].remove("pool=small")
        running.commands["engine1"].remove("--tag")
        await running.start("engine1").wait_ready()
        await processor_answers(caller, running)
        path = f"{running.namespace}.processor.process"
        sampling = SamplingParams(max_tokens=2, ignore_eos=True)

        async def ask(hints: RoutingHints) -> int | None:
            request = RoutedProcessRequest(MODEL, prompt=[1, 2, 3], sampling=sampling, hints=hints)
            *_, last = await caller.call(path, to_wire(request), TextOutput)
            assert last.error is None
            return last.worker_id

        while await ask(RoutingHints(pool="large")) != 1:
            pass  # the router has not heard of it yet
        assert await ask(RoutingHints(agent_state="planning")) == 0
        assert await ask(RoutingHints(agent_state="calling")) == 0
        assert await ask(RoutingHints(agent_state="answering")) == 1
        assert await ask(RoutingHints(agent_state="answering", pool="small")) == 0


async def test_an_engine_may_stand_in_for_another_model(
    start_pipeline: StartPipeline, caller: RuntimeCaller
) -> None:
    arguments = {"engine": ["--serve-as", "A-Larger-Model"]}
    async with start_pipeline(
        chapter="chapter4", start=["engine0"], arguments=arguments
    ) as running:
        (info,) = await caller.call(f"{running.namespace}.engine.info", {}, EngineInfo)
        assert info.model == "A-Larger-Model"
