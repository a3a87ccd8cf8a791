"""Prompts that go by way of a prefill engine, and what clients notice when it fails: nothing."""

import asyncio
import os
import signal
import uuid
from collections.abc import AsyncIterator
from typing import Any

from launch.chapters import Options
from launch.children import Children
from launch.pipeline import Pipeline, pipeline
from launch.ports import free_port
from tests.chapter1.helpers import (
    CHAT,
    chat,
    engine_settings,
    eventually,
    http_client,
    lines_about,
    stream,
)
from tests.chapter3.conftest import RouterOf
from tests.chapter3.helpers import prompt
from tests.chapter3.test_migration_in_use import USAGE, Outcome, outcome
from tests.conftest import StartPipeline

import httpx
import pytest
import pytest_asyncio

ENGINES = 3  # engine0 is the prefill engine
DEBUG = ["--log-level=debug"]
SLOW_PREFILL = {"prefill_tokens_per_s": 400, "prefill_chunk": 16}


def arguments(*processor: str, **settings: object) -> dict[str, list[str]]:
    """Engines of 100 tokens/s."""
    engine = engine_settings(**{"decode_base_ms": 8, "mean_output_tokens": 60, **settings})
    return {
        "engine": [*DEBUG, *engine, "--drain-timeout=20"],
        "router": DEBUG,
        "processor": [*DEBUG, *processor],
        "frontend": DEBUG,
    }


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def shared(servers: dict[str, str]) -> AsyncIterator[Pipeline]:
    """A prefill engine and two decode engines that compute prompts slowly; simulated."""
    lines: list[str] = []
    with Children(lambda name, line: lines.append(f"{name:>10} | {line}")) as children:
        options = Options(
            namespace=f"test-{uuid.uuid4().hex[:12]}",
            engines=ENGINES,
            prefill=1,
            backend="simulated",
            port=free_port(),
        )
        known = arguments("--prefill-timeout=8", **SLOW_PREFILL)
        async with pipeline(children, servers, "chapter3", options, arguments=known) as running:
            await running.wait_ready()
            yield running
            running.kill()
    print(*lines[-300:], sep="\n")


@pytest_asyncio.fixture
async def running(shared: Pipeline, router_of: RouterOf) -> AsyncIterator[Pipeline]:
    """All engines are there, and nothing of the test is left in the router's books."""
    router = router_of(shared)
    await router.wait_ready(ENGINES)
    yield shared
    for name, process in shared.processes.items():
        if not process.running:
            await shared.start(name).wait_ready()

    async def at_rest() -> bool:
        return await router.active() == 0

    await eventually(at_rest, timeout=30)


@pytest_asyncio.fixture
async def client(running: Pipeline) -> AsyncIterator[httpx.AsyncClient]:
    async with http_client(running.url) as client:
        yield client


def request(name: str, words: int = 60, **fields: Any) -> dict[str, Any]:
    """A prompt of about 3 tokens a word, which takes the slow engines half a second."""
    return {**chat(prompt(name, words), **{"max_tokens": 20, **fields}), **USAGE}


def way(running: Pipeline, request_id: str) -> tuple[list[int], list[int]]:
    """The engines that got the request, and those that handed it over; in order of number.

    As far as they have logged it, which may be after the answer: see `whole_way`.
    """
    return (
        engines_that_said(running, request_id, "prompt of"),
        engines_that_said(running, request_id, "ended: handover"),
    )


def engines_that_said(running: Pipeline, request_id: str, text: str) -> list[int]:
    return [
        number
        for number in range(ENGINES)
        if (process := running.processes.get(f"engine{number}"))
        for line in lines_about(process, request_id)
        if text in line
    ]


async def whole_way(
    running: Pipeline, request_id: str, requests: int, *, ended: bool = True
) -> tuple[list[int], list[int]]:
    """`way`, when so many `requests` to engines and (`ended`) the ends of them are logged.

    An engine that is gone has logged no end.
    """

    def is_known() -> bool:
        got, _ = way(running, request_id)
        ends = engines_that_said(running, request_id, "ended:")
        under_way = [n for n in got if running.processes[f"engine{n}"].running and n not in ends]
        return len(got) >= requests and not (ended and under_way)

    await eventually(is_known)
    return way(running, request_id)


async def answer(
    client: httpx.AsyncClient, body: dict[str, Any]
) -> tuple[str, Outcome, list[dict[str, Any]]]:
    """Its request's id, what it was, and its chunks."""
    async with stream(client, body) as streamed:
        await streamed.read_all()
    return streamed.request_id, outcome(streamed), streamed.chunks


async def test_a_long_prompt_goes_by_way_of_the_prefill_engine(
    running: Pipeline, client: httpx.AsyncClient
) -> None:
    """The answer, whole and in parts, is the one of a single engine."""
    body = request("long", nvext={"extra_fields": ["worker_id", "timing"]})
    request_id, streamed, chunks = await answer(client, body)
    (first, second), handed_over = await whole_way(running, request_id, 2)
    assert (first, handed_over) == (0, [0])
    assert streamed[1:] == ("length", streamed[2], 20)
    assert [chunk["nvext"]["worker_id"] for chunk in chunks if "nvext" in chunk] == [second]
    whole = (await client.post(CHAT, json=chat(prompt("long", 60), max_tokens=20))).json()
    choice, usage = whole["choices"][0], whole["usage"]
    text, reason = choice["message"]["content"], choice["finish_reason"]
    assert (text, reason, usage["prompt_tokens"], usage["completion_tokens"]) == streamed


async def test_short_and_cached_prompts_do_not(
    running: Pipeline, client: httpx.AsyncClient, router_of: RouterOf
) -> None:
    request_id, _, _ = await answer(client, request("short", 3))
    (got,), handed_over = await whole_way(running, request_id, 1)
    assert got != 0
    assert handed_over == []
    body = request("cached")
    first_id, first, _ = await answer(client, body)
    assert (await whole_way(running, first_id, 2))[1] == [0]
    await eventually(router_of(running).is_right)

    again_id, again, chunks = await answer(client, body)
    assert again == first
    (got,), handed_over = await whole_way(running, again_id, 1)
    assert (got != 0, handed_over) == (True, [])
    assert chunks[-1]["usage"]["prompt_tokens_details"]["cached_tokens"] > 100


@pytest.mark.parametrize(
    "fields",
    [{"max_tokens": 1}, {"stop": ["no such text"]}, {"stop": [" "]}, {"n": 1, "min_tokens": 5}],
)
async def test_what_ends_an_answer(
    running: Pipeline, client: httpx.AsyncClient, router_of: RouterOf, fields: dict[str, Any]
) -> None:
    """As an engine that already has the prompt says it."""
    body = request(f"ends{sorted(fields)}{fields.get('stop')}", **fields)
    request_id, by_way, _ = await answer(client, body)
    if fields == {"max_tokens": 1}:
        assert await whole_way(running, request_id, 1) == ([0], [])
        assert by_way[1:] == ("length", by_way[2], 1)
        return
    assert 0 in (await whole_way(running, request_id, 1))[0]
    await eventually(router_of(running).is_right)
    again_id, again, _ = await answer(client, body)
    assert 0 not in (await whole_way(running, again_id, 1))[0]
    assert again == by_way


class Asked:
    """A request with a prompt that takes the prefill engine seconds, while it has it."""

    def __init__(
        self, running: Pipeline, client: httpx.AsyncClient, name: str, words: int = 250
    ) -> None:
        self.engine = running.processes["engine0"]
        self._before = len(lines_about(self.engine, "prompt of"))
        self.answer = asyncio.create_task(answer(client, request(name, words)))

    async def computes(self) -> None:
        """Wait until the prefill engine has it."""
        await eventually(lambda: len(lines_about(self.engine, "prompt of")) > self._before)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP])
async def test_the_prefill_engine_is_lost_while_it_computes(
    running: Pipeline, client: httpx.AsyncClient, end: signal.Signals
) -> None:
    """Killed, told to stop (it finishes first), or hanging for longer than --prefill-timeout."""
    asked = Asked(running, client, f"lost{end}")
    await asked.computes()
    if end == signal.SIGTERM:
        asked.engine.terminate()
    elif end == signal.SIGKILL:
        asked.engine.kill()
    else:
        os.kill(asked.engine.pid, end)
    try:
        request_id, result, _ = await asked.answer
    finally:
        if end == signal.SIGSTOP:
            asked.engine.kill()
        await asked.engine.wait()
    assert result[1:] == ("length", result[2], 20)
    (first, last), handed_over = await whole_way(running, request_id, 2)
    assert {first, last} in ({0, 1}, {0, 2})
    assert handed_over == ([0] if end == signal.SIGTERM else [])

    def was_missed() -> bool:
        lines = lines_about(running.processes["processor"], "did not compute the prompt")
        return any(request_id in line for line in lines)

    if end == signal.SIGTERM:
        assert not was_missed()
    else:
        await eventually(was_missed)


async def test_a_client_leaves_while_the_prefill_engine_computes(
    running: Pipeline, client: httpx.AsyncClient, router_of: RouterOf
) -> None:
    ends = "ended: cancelled after 0 tokens"
    asked = Asked(running, client, "leaves", 1000)
    before = len(lines_about(asked.engine, ends))
    await asked.computes()
    asked.answer.cancel()
    await asyncio.gather(asked.answer, return_exceptions=True)
    await eventually(lambda: len(lines_about(asked.engine, ends)) > before)
    states = await router_of(running).workers()
    assert states[0].state == "ready", "it is not to blame"


async def test_the_decode_engine_is_killed_after_the_handover(
    running: Pipeline, client: httpx.AsyncClient
) -> None:
    """Another one goes on, by way of the prefill engine again: it has the prompt."""
    body = request("decode engine", max_tokens=400)
    async with stream(client, body) as streamed:
        await streamed.read_text(20)
        killed = (await whole_way(running, streamed.request_id, 2, ended=False))[0][-1]
        running.processes[f"engine{killed}"].kill()
        await streamed.read_all()
    assert outcome(streamed)[1:] == ("length", outcome(streamed)[2], 400)
    got, handed_over = await whole_way(running, streamed.request_id, 4)
    assert killed != 0
    assert set(got) == {0, 1, 2}, "the one that was left went on"
    assert handed_over[0] == 0
    await running.processes[f"engine{killed}"].wait()
    again = (await answer(client, body))[1]
    assert again == outcome(streamed)


async def test_only_a_prefill_engine_is_left(
    start_pipeline: StartPipeline, router_of: RouterOf
) -> None:
    """Of real engines; before, the answer is the one of a single engine."""
    greedy = {"temperature": 0, "max_tokens": 12, "seed": 1, "logprobs": True, "top_logprobs": 1}
    body = {**chat("Name some colours, one per line. " * 12, **greedy), **USAGE}
    async with (
        start_pipeline(
            chapter="chapter3",
            engines=2,
            prefill=1,
            backend="llamacpp",
            arguments={"engine": DEBUG},
        ) as running,
        http_client(running.url, timeout=60) as client,
    ):  # fmt: skip
        await router_of(running).wait_ready(2)
        request_id, by_way, _ = await answer(client, body)
        assert (await whole_way(running, request_id, 2))[1] == [0]
        running.processes["engine1"].kill()
        await running.processes["engine1"].wait()
        _, alone, _ = await answer(client, body)
        assert alone == by_way
