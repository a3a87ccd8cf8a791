"""The API is chapter 1's; a few of its promises, where the router changes the way to the engine."""

import asyncio

from launch.child import Child
from launch.pipeline import Pipeline
from tests.chapter1.helpers import CHAT, MODEL, chat, engine_ended, eventually, lines_about, stream
from tests.chapter1.test_api import check_error
from tests.chapter2.helpers import WORKER, prompt

import httpx

SOON_S = 15.0  # a busy machine's delay; what nobody stops goes on for 40 s


async def test_a_stream_and_a_whole_answer_are_equal(api: httpx.AsyncClient) -> None:
    text = prompt("the same twice")
    body = chat(text, max_tokens=12, stream_options={"include_usage": True}, **WORKER)
    async with stream(api, body) as answer:
        await answer.read_all()
    assert answer.received[-1] == "[DONE]"
    assert answer.finish_reason == "length"
    usage = answer.chunks[-1]["usage"]
    assert usage["completion_tokens"] == 12
    del body["stream_options"]
    whole = (await api.post(CHAT, json=body)).json()
    assert whole["choices"][0]["message"]["content"] == answer.text
    workers = [chunk["nvext"]["worker_id"] for chunk in answer.chunks if "nvext" in chunk]
    assert workers == [whole["nvext"]["worker_id"]]


async def test_a_stop_string_ends_the_chosen_engines_work(
    shared_pipeline: Pipeline, api: httpx.AsyncClient
) -> None:
    text = (await api.post(CHAT, json=chat(max_tokens=30))).json()["choices"][0]["message"]
    middle = len(text["content"]) // 2
    stop = text["content"][middle : middle + 7]
    async with stream(api, chat(max_tokens=2000, stop=["never in there", stop])) as answer:
        await answer.read_all()
    assert answer.finish_reason == "stop"
    assert answer.text == text["content"][: text["content"].index(stop)]
    ended = await work_ended(shared_pipeline, answer.request_id)
    assert [tokens < 1000 for _, tokens in ended] == [True]


async def test_a_client_that_leaves_reaches_the_engine_that_works_for_it(
    shared_pipeline: Pipeline, api: httpx.AsyncClient
) -> None:
    """And no other: of two streams on two engines the one goes on."""
    async with stream(api, chat("stays", max_tokens=60)) as stays:
        await stays.read_text()
        async with stream(api, chat("leaves", max_tokens=2000)) as leaves:
            await leaves.read_text()
        ((reason, tokens),) = await work_ended(shared_pipeline, leaves.request_id)
        assert reason == "cancelled"
        assert tokens < 1000
        await stays.read_all()
    assert stays.finish_reason == "length"


async def work_ended(running: Pipeline, request_id: str) -> list[tuple[str, int]]:
    """How and after how many tokens a request ended, in every engine that it reached."""
    engines = [running.processes[name] for name in ("engine0", "engine1")]
    await eventually(lambda: any(lines_about(engine, request_id) for engine in engines))
    reached = [engine for engine in engines if lines_about(engine, request_id)]
    await eventually(lambda: all(engine_ended(e, request_id) for e in reached), SOON_S)
    return [ended for engine in reached if (ended := engine_ended(engine, request_id))]


async def test_clients_that_leave_while_they_are_routed(
    shared_pipeline: Pipeline, api: httpx.AsyncClient
) -> None:
    """Whichever of their requests reach an engine end there."""
    asking = [
        asyncio.create_task(api.post(CHAT, json=chat(f"leaves {n}", max_tokens=2000)))
        for n in range(20)
    ]
    await asyncio.wait(asking, timeout=0.05)
    for task in asking:
        task.cancel()
    await asyncio.gather(*asking, return_exceptions=True)

    async def nothing_in_flight() -> bool:
        metrics = (await api.get("/metrics")).text
        return "dynamo_frontend_inflight_requests 0.0" in metrics

    await eventually(nothing_in_flight, SOON_S)
    for name in ("engine0", "engine1"):
        engine = shared_pipeline.processes[name]
        await eventually(lambda: not at_work(engine), SOON_S)  # noqa: B023


def at_work(engine: Child) -> set[str]:
    """The requests that began in the engine and have not ended, as far back as its log goes."""
    begun = {line.rpartition("[")[2] for line in lines_about(engine, "prompt of")}
    return begun - {line.rpartition("[")[2] for line in lines_about(engine, "ended: ")}


async def test_errors_have_openais_shape(api: httpx.AsyncClient) -> None:
    """Those of the frontend, of the processor and of the engine, streamed or not."""
    for streamed in (False, True):
        refused = [
            (chat(n=2), 400, "one choice a request"),
            (chat("words " * 9000), 400, "context length is 8192"),
            (chat(response_format={"type": "json_object"}), 400, "simulated engine"),
            ({**chat(), "model": "gpt-9"}, 404, f"'{MODEL}' does"),
        ]
        for body, status, message in refused:
            response = await api.post(CHAT, json={**body, "stream": streamed})
            check_error(response, status, message)


async def test_models(api: httpx.AsyncClient) -> None:
    assert [model["id"] for model in (await api.get("/v1/models")).json()["data"]] == [MODEL]
    assert (await api.get("/health")).json()["status"] == "ready"
