"""Engines that die in the midst of answers: the clients' streams go on as if nothing were."""

import asyncio
import random
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from launch.pipeline import Pipeline
from tests.chapter1.helpers import (
    SseStream,
    chat,
    engine_settings,
    eventually,
    http_client,
    lines_about,
    stream,
)
from tests.chapter3.conftest import RouterOf
from tests.chapter3.helpers import Router, prompt
from tests.conftest import StartPipeline

import httpx

USAGE = {"stream_options": {"include_usage": True}}
ENGINES = 3
Outcome = tuple[str, str | None, int, int]  # text, finish reason, prompt and completion tokens


def arguments(*, drain_s: float = 30, limit: int = 3, step_ms: int = 20) -> dict[str, list[str]]:
    """Engines that take turns, so slow that their answers last until a busy test kills them."""
    engine = engine_settings(decode_base_ms=step_ms, mean_output_tokens=20)
    return {
        "engine": [*engine, f"--drain-timeout={drain_s}"],
        "router": ["--policy=round_robin"],
        "processor": [f"--migration-limit={limit}"],
    }


def requests(name: str, count: int) -> list[dict[str, Any]]:
    """Some have a limit, some end by themselves, some at a stop string."""
    kinds: list[dict[str, Any]] = [
        {"max_tokens": 150},
        {"min_tokens": 120},
        {"max_tokens": 150, "stop": ["no such text"]},
    ]
    return [
        {**chat(prompt(f"{name}{n}", 20), **kinds[n % len(kinds)]), **USAGE} for n in range(count)
    ]


REQUESTS = requests("migrated", 6)


@asynccontextmanager
async def streams(
    client: httpx.AsyncClient, bodies: Sequence[dict[str, Any]]
) -> AsyncIterator[list[SseStream]]:
    """All of them at once, each with some text."""
    async with AsyncExitStack() as stack:
        opened = await asyncio.gather(
            *(stack.enter_async_context(stream(client, body)) for body in bodies)
        )
        await asyncio.gather(*(each.read_text() for each in opened))
        yield opened


async def outcomes(answers: Sequence[SseStream]) -> list[Outcome]:
    await asyncio.gather(*(answer.read_all() for answer in answers))
    return [outcome(answer) for answer in answers]


def outcome(answer: SseStream) -> Outcome:
    assert answer.error is None, answer.error
    usage = answer.chunks[-1]["usage"]
    return answer.text, answer.finish_reason, usage["prompt_tokens"], usage["completion_tokens"]


async def unbroken(client: httpx.AsyncClient, bodies: Sequence[dict[str, Any]]) -> list[Outcome]:
    async with streams(client, bodies) as answers:
        return await outcomes(answers)


_simulated: list[Outcome] = []


async def simulated(client: httpx.AsyncClient, count: int = 6) -> list[Outcome]:
    """The unbroken answers to `REQUESTS`; simulated engines give the same in every pipeline."""
    if not _simulated:
        _simulated.extend(await unbroken(client, REQUESTS))
    return _simulated[:count]


async def migrations(client: httpx.AsyncClient) -> int:
    """How many of them the frontend counts."""
    text = (await client.get("/metrics")).text
    name = r"dynamo_frontend_model_migration_total\{migration_type=.ongoing_request.\}"
    found = re.search(rf"^{name} (\S+)$", text, re.MULTILINE)
    assert found is not None
    return int(float(found[1]))


def moves(running: Pipeline) -> list[tuple[int, int]]:
    """Of each migration the workers: from, to."""
    lines = lines_about(running.processes["processor"], "migrating from worker")
    found = [
        re.search(r"from worker (\d) to (\d) after [1-9]\d* tokens: .", line) for line in lines
    ]
    return [(int(match[1]), int(match[2])) for match in found if match]


async def worker_of(running: Pipeline, answer: SseStream) -> int:
    """Who began the answer."""

    def found() -> list[int]:
        lines = lines_about(running.processes["processor"], answer.request_id)
        return [int(match[1]) for line in lines if (match := re.search(r" worker (\d):", line))]

    await eventually(found)
    return found()[0]


async def test_engines_are_killed_under_several_streams(
    start_pipeline: StartPipeline, router_of: RouterOf
) -> None:
    """First one of three, then, under the same streams, another one."""
    async with (
        start_pipeline(
            chapter="chapter3", engines=ENGINES, arguments=arguments(step_ms=30)
        ) as running,
        http_client(running.url) as client,
    ):
        await router_of(running).wait_ready(ENGINES)
        expected = await simulated(client)
        async with streams(client, REQUESTS) as answers:
            running.processes["engine1"].kill()
            await eventually(lambda: len(moves(running)) == 2)
            length = len(answers[0].text)
            await asyncio.gather(*(answer.read_text(length + 20) for answer in answers))
            running.processes["engine0"].kill()
            assert await outcomes(answers) == expected
        assert await migrations(client) >= 4
        await eventually(lambda: len(moves(running)) >= 4)
        assert {before for before, _ in moves(running)} == {0, 1}
        assert {after for before, after in moves(running) if before == 0} == {2}


async def test_an_engine_that_drains_too_long_hands_its_streams_over(
    start_pipeline: StartPipeline, router_of: RouterOf
) -> None:
    """It is told to stop, and its streams are longer than --drain-timeout."""
    settings = arguments(drain_s=0.3)
    async with (
        start_pipeline(chapter="chapter3", engines=2, arguments=settings) as running,
        http_client(running.url) as client,
    ):
        await router_of(running).wait_ready(2)
        expected = await simulated(client, 4)
        async with streams(client, REQUESTS[:4]) as answers:
            running.processes["engine0"].terminate()
            assert await outcomes(answers) == expected
        await eventually(lambda: moves(running) == [(0, 1)] * 2)
        assert await migrations(client) == 2


async def test_without_migration_a_stream_breaks_off(
    start_pipeline: StartPipeline, router_of: RouterOf
) -> None:
    settings = arguments(limit=0)
    async with (
        start_pipeline(chapter="chapter3", engines=2, arguments=settings) as running,
        http_client(running.url) as client,
    ):
        await router_of(running).wait_ready(2)
        async with streams(client, REQUESTS[:2]) as answers:
            running.processes["engine0"].kill()
            await asyncio.gather(*(answer.read_all() for answer in answers))
        (error,) = [answer.error for answer in answers if answer.error is not None]
        assert error["code"] == "unavailable"
        assert "The engine is unavailable: Unavailable: Stream ended" in error["message"]
        assert moves(running) == []
        assert await migrations(client) == 0


async def test_no_token_is_lost_or_doubled_whatever_dies(
    start_pipeline: StartPipeline, router_of: RouterOf
) -> None:
    """Engines are killed, or told to stop, at random; clients compare what they get."""
    rng = random.Random(4)
    settings = arguments(drain_s=0.3, limit=10, step_ms=8)
    answered = 0
    stopping = False
    async with (
        start_pipeline(chapter="chapter3", engines=ENGINES, arguments=settings) as running,
        http_client(running.url) as client,
    ):
        router = router_of(running)
        await router.wait_ready(ENGINES)
        expected = await simulated(client)

        async def ask_for_ever(number: int) -> None:
            nonlocal answered
            while not stopping:
                async with stream(client, REQUESTS[number]) as answer:
                    await answer.read_all()
                assert outcome(answer) == expected[number]
                answered += 1

        async with asyncio.TaskGroup() as clients:
            for number in range(len(REQUESTS)):
                clients.create_task(ask_for_ever(number))
            for _ in range(3):
                goal = answered + rng.randint(1, 6)
                await eventually(lambda goal=goal: answered >= goal, timeout=60)  # type: ignore[misc]
                name = f"engine{rng.randrange(ENGINES)}"
                if rng.random() < 0.5:
                    running.processes[name].kill()
                else:
                    running.processes[name].terminate()
                await running.processes[name].wait()
                running.start(name)
                await running.processes[name].wait_ready()
            stopping = True
        assert await migrations(client) > 0


async def wait_for_all(running: Pipeline, router: Router) -> None:
    """Start the engines that are gone."""
    for name, process in running.processes.items():
        if name.startswith("engine") and not process.running:
            await running.start(name).wait_ready()
    await router.wait_ready(len([name for name in running.processes if name.startswith("engine")]))


async def forget_prompts(router: Router) -> None:
    """A prompt of which a part is cached is computed in another batch, and rounded otherwise."""
    path = f"{router.running.namespace}.engine.clear_kv_blocks"
    for state in await router.state():
        await router.caller.call(path, {}, dict, state.instance_id)


async def test_an_answer_of_a_real_model_goes_on(
    start_pipeline: StartPipeline, router_of: RouterOf
) -> None:
    """Alone on its engine, so that batches of other shapes do not change the arithmetic."""
    body = {
        **chat("Name some colours, one per line.", max_tokens=100, ignore_eos=True),
        "seed": 5,
        "temperature": 0.9,
        "top_p": 0.9,
        "frequency_penalty": 0.5,
        **USAGE,
    }
    settings = {"router": ["--policy=round_robin"]}
    async with (
        start_pipeline(
            chapter="chapter3", engines=2, backend="llamacpp", arguments=settings
        ) as running,
        http_client(running.url, timeout=60) as client,
    ):  # fmt: skip
        await router_of(running).wait_ready(2)
        expected = await unbroken(client, [body])
        while not await migrations(client):  # it may be over before its engine is killed
            await wait_for_all(running, router_of(running))
            await forget_prompts(router_of(running))
            async with streams(client, [body]) as answers:
                worker = await worker_of(running, answers[0])
                running.processes[f"engine{worker}"].kill()
                assert await outcomes(answers) == expected
        await eventually(lambda: moves(running) == [(worker, 1 - worker)])
