"""A session's blocks while its tool runs, in a running pipeline and on the router's page."""

import os
from collections.abc import Iterator

from common.protocol import (
    EngineOutput,
    GenerateRequest,
    SamplingParams,
    TextOutput,
    to_wire,
)
from common.protocol_routing import RoutedProcessRequest, RoutedWorkerState, RoutingHints
from launch.pipeline import Pipeline
from tests.chapter1.helpers import MODEL, engine_settings, eventually
from tests.chapter2.helpers import RuntimeCaller, start_caller
from tests.chapter3.browser import chromium, opened
from tests.chapter4.processor_ready import processor_answers
from tests.conftest import StartPipeline

import playwright.async_api as pw
import pytest

# Two engines of 64 blocks; a prompt of a session has 18 of them.
ENGINES = engine_settings(cache_tokens=1024, decode_base_ms=1)
PREFIX = list(range(1000, 1290))
EXPECTED = RoutingHints(
    session="a", agent_state="calling", step=1, next_turn_s=50.0, output_tokens=4
)


@pytest.fixture(scope="module")
def caller(servers: dict[str, str]) -> Iterator[RuntimeCaller]:
    with start_caller({**os.environ, **servers}) as process:
        yield RuntimeCaller(process)


class Asking:
    def __init__(self, caller: RuntimeCaller, running: Pipeline) -> None:
        self._caller, self._namespace = caller, running.namespace

    async def ask(self, tokens: list[int], hints: RoutingHints | None = None) -> TextOutput:
        """The last item of an answer of four tokens, which has the counts."""
        sampling = SamplingParams(max_tokens=4, ignore_eos=True)
        request = RoutedProcessRequest(MODEL, prompt=tokens, sampling=sampling)
        request.hints = hints or RoutingHints()
        path = f"{self._namespace}.processor.process"
        *_, last = await self._caller.call(path, to_wire(request), TextOutput)
        assert last.error is None
        return last

    async def retain(self, blocks: int, worker_id: int | None = None) -> bool:
        """Whether this engine, or each, retains so many blocks, as the router was told."""
        path = f"{self._namespace}.router.state"
        states = await self._caller.call(path, {}, RoutedWorkerState)
        known = {s.worker_id: s.metrics.retained_blocks for s in states if s.metrics is not None}
        asked = known if worker_id is None else {worker_id}
        return all(known.get(each) == blocks for each in asked)

    async def fill_caches(self) -> None:
        """Send each engine, past the router, more than it has room for."""
        path = f"{self._namespace}.engine.generate"
        sampling = SamplingParams(max_tokens=1)
        for instance in await self._caller.instances(path):
            for number in range(6):
                prompt = list(range(2000 + 300 * number, 2290 + 300 * number))
                request = to_wire(GenerateRequest(prompt, sampling))
                *_, last = await self._caller.call(path, request, EngineOutput, instance)
                assert last.finish_reason == "length"


@pytest.mark.parametrize("says_so", [True, False])
async def test_a_session_finds_its_blocks_again_after_a_tool(
    start_pipeline: StartPipeline, caller: RuntimeCaller, says_so: bool
) -> None:
    arguments = {"engine": ENGINES, "router": ["--no-canaries"]}
    start = ["engine0", "engine1", "router", "processor"]
    async with start_pipeline(
        chapter="chapter4", engines=2, start=start, arguments=arguments
    ) as running:
        asking = Asking(caller, running)
        await processor_answers(caller, running)
        first = await asking.ask(PREFIX, EXPECTED if says_so else None)
        assert first.worker_id is not None
        if says_so:
            await eventually(lambda: asking.retain(18, first.worker_id))
        await asking.fill_caches()
        hints = RoutingHints(session="a", agent_state="answering", step=2)
        second = await asking.ask([*PREFIX, *range(500, 530)], hints if says_so else None)
        assert second.usage is not None
        if says_so:
            assert second.worker_id == first.worker_id
            assert second.usage.cached_tokens == 288
            await eventually(lambda: asking.retain(0))
        else:
            assert second.usage.cached_tokens == 0


async def test_the_page_shows_agents_and_what_is_retained(
    start_pipeline: StartPipeline, caller: RuntimeCaller
) -> None:
    arguments = {"engine": ENGINES, "router": ["--no-canaries"]}
    start = ["engine0", "router", "processor", "agent", "frontend"]
    async with (
        chromium() as browser,
        start_pipeline(chapter="chapter4", start=start, arguments=arguments) as running,
        opened(browser, f"{running.url}/router") as page,
    ):
        await pw.expect(page.locator(".card")).to_have_count(1)
        asking = Asking(caller, running)
        await processor_answers(caller, running)
        await asking.ask(PREFIX, EXPECTED)
        row = page.locator("#decisions tr.line").first
        await pw.expect(row).to_contain_text("calling · step 1")
        await pw.expect(page.locator(".card dd").nth(1)).to_have_text("18 blocks")
        await row.click()
        story = page.locator(".story").first
        await pw.expect(story).to_contain_text("The agent is calling, at step 1; it is expected")
        await pw.expect(story).to_contain_text("back 50.0 s after the answer")
        await pw.expect(story).to_contain_text("prefers the pool small")
