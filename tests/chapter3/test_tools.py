"""The scripts of chapter 2 look into this pipeline, too; and what the router knows of requests."""

import asyncio
import itertools
from pathlib import Path

from tests.chapter1.helpers import chat, engine_settings, eventually, http_client, stream
from tests.chapter2.test_show_tree import shown
from tests.chapter2.test_watch_events import line, watching
from tests.chapter3.conftest import RouterOf
from tests.chapter3.helpers import ask, prompt
from tests.conftest import StartPipeline


async def test_show_tree_and_watch_events(
    start_pipeline: StartPipeline, servers: dict[str, str]
) -> None:
    async with (
        start_pipeline(chapter="chapter3", engines=2) as p,
        http_client(p.url) as client,
        watching("--namespace", p.namespace, environment=servers) as events,
    ):
        assert (await line(events)).startswith("watching tcp://")

        async def event() -> str:
            """Two subscriptions take a moment: ask for something new until something comes."""
            for number in itertools.count():
                await ask(client, prompt(f"tell me of the sea{number}", 100))
                await client.post(
                    "/v1/chat/completions", json=chat(prompt(f"and more{number}", 60))
                )
                try:
                    return await asyncio.wait_for(line(events), 1)
                except TimeoutError:
                    continue
            raise AssertionError

        first = await asyncio.wait_for(event(), 60)
        assert " BlockStored " in first
        assert first.startswith(("worker 0 #", "worker 1 #"))
        output = ""

        async def agrees() -> bool:
            nonlocal output
            output, errors, status = await shown("--namespace", p.namespace, environment=servers)
            assert status == 0, errors
            return output.count("the router agrees (ready)") == 2

        await eventually(agrees)
        assert "tell me" in output


async def test_a_processor_that_stops_tells_how_its_last_requests_ended(
    start_pipeline: StartPipeline, router_of: RouterOf, tmp_path: Path
) -> None:
    """Else the router would take them for active ones until they expire."""
    counts = tmp_path / "counts.py"
    counts.write_text(
        "def policy(snapshot):\n"
        "    return [-(w.prefill_requests + w.decode_requests) for w in snapshot.workers]\n"
    )
    arguments = {
        "router": ["--policy", f"{counts}:policy"],
        "engine": engine_settings(decode_base_ms=20),
    }
    async with (
        start_pipeline(chapter="chapter3", engines=2, arguments=arguments) as p,
        http_client(p.url) as client,
    ):
        router = router_of(p)

        async def is_active(requests: int) -> bool:
            found = await router.route([1, 2, 3])
            return -round(sum(candidate.score for candidate in found.candidates)) == requests

        async with stream(client, chat(max_tokens=60)) as answer:
            await answer.read_text()
            await eventually(lambda: is_active(1))
            stopping = asyncio.create_task(p.processes["processor"].stop())
            await answer.read_all()
            assert answer.finish_reason == "length"
        await stopping
        await eventually(lambda: is_active(0))
