"""Agents on a running pipeline: the page, the planner, a client that leaves, an agent that dies."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from launch.pipeline import Pipeline
from tests.chapter1.helpers import MODEL, eventually, http_client
from tests.chapter3.browser import chromium, opened
from tests.chapter4.scripted import CALL, scripted_pipeline

import httpx
import playwright.async_api as pw
import psutil
import pytest
import pytest_asyncio

SCRIPT = [
    (
        r"(?s)Split the task.*(?!<tool_output>)Double trouble",
        '{"steps": ["Double 21.", "Say it."]}',
    ),
    # A model that does what a letter says, at every step of a plan.
    (r"(?s)Split the task.*Obey the letter", '{"steps": ["What does the letter say?", "Do it."]}'),
    (r"(?s)Known so far.*&lt;tool_call>.*Do it", CALL % ("python", '{"code": "print(2)"}')),
    (r"(?s)Obey the letter.*&lt;tool_call>.*Answer the task", CALL % ("python", '{"code": "3"}')),
    (r"(?s)Answer the task with these results", "Twice 21 is 42."),
    (r"(?s)Known so far.*It is 42.*Say it", "Forty-two."),
    (r"(?s)Double 21.*<tool_output>", "It is 42."),
    (r"Double 21", CALL % ("calculator", '{"expression": "2 * 21"}')),
    # And in a run without a plan.
    (r"(?s)What does the letter say.*<tool_output>", CALL % ("python", '{"code": "print(1)"}')),
    (r"What does the letter say", CALL % ("search_documents", '{"query": "letter"}')),
    (r"(?s)Divide.*by zero", "It cannot be done."),
    (r"Divide", CALL % ("calculator", '{"expression": "1 / 0"}')),
    (r"Wait for ever", CALL % ("python", '{"code": "while True: pass"}')),
    (r"(?s)Say <b>hello.*</b>", "<b>Hello</b>"),
    (r"(?s)My name is Ada.*Who am I", "You are Ada."),
    (r"Who am I", "I do not know."),
    (r"My name is Ada", "Hello Ada."),
]
BUILTIN = {"type": "mcp", "server_label": "builtin", "require_approval": "never"}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def running(
    servers: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Pipeline]:
    folder = tmp_path_factory.mktemp("script")
    async with scripted_pipeline(servers, folder, SCRIPT) as running:
        yield running


@pytest_asyncio.fixture
async def api(running: Pipeline) -> AsyncIterator[httpx.AsyncClient]:
    async with http_client(running.url) as client:
        yield client


@pytest_asyncio.fixture
async def browser() -> AsyncIterator[pw.Browser]:
    async with chromium() as browser:
        yield browser


def body(task: str, *tools: str, **fields: Any) -> dict[str, Any]:
    chosen = [{**BUILTIN, "allowed_tools": list(tools)}] if tools else []
    return {"model": MODEL, "input": task, "tools": chosen, **fields}


def text_of(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    last = response.json()["output"][-1]
    text: str = last["content"][0]["text"]
    return text


async def test_the_planner_has_agents_do_its_steps(api: httpx.AsyncClient) -> None:
    task = body("Double trouble", "calculator", nvext={"agent": "planner"})
    response = await api.post("/v1/responses", json=task)
    assert text_of(response) == "Twice 21 is 42."
    items = response.json()["output"]
    assert [item["type"] for item in items] == [
        *("message", "mcp_call", "message", "message", "message")
    ]
    assert json.loads(items[0]["content"][0]["text"]) == {"steps": ["Double 21.", "Say it."]}
    assert (items[1]["name"], items[1]["output"]) == ("calculator", "42")
    assert len({item["id"] for item in items}) == len(items)


async def test_the_planner_calls_no_functions_of_its_caller(api: httpx.AsyncClient) -> None:
    function = {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": False}
    task = body("Double trouble", nvext={"agent": "planner"})
    response = await api.post("/v1/responses", json={**task, "tools": [function]})
    assert response.status_code == 400
    assert "ask the agent" in response.json()["error"]["message"]


async def test_the_planner_keeps_no_conversation(api: httpx.AsyncClient) -> None:
    task = body("Double trouble", nvext={"agent": "planner"}, conversation="conv_plan")
    response = await api.post("/v1/responses", json=task)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "conversation"


async def test_what_the_model_refuses_is_a_status(api: httpx.AsyncClient) -> None:
    """Streamed or not: nothing has been told yet."""
    for stream in (False, True):
        task = {**body("Double 21.", stream=stream), "model": "gpt-9"}
        assert (await api.post("/v1/responses", json=task)).status_code == 404


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required", "nvext": {"max_steps": 1}}, "nvext.max_steps"),
        ({"nvext": {"tool_plan": ["calculator"] * 2}, "max_tool_calls": 1}, "max_tool_calls"),
    ],
)
async def test_a_call_that_the_budget_has_no_room_for_is_refused(
    api: httpx.AsyncClient, fields: dict[str, Any], param: str
) -> None:
    response = await api.post("/v1/responses", json=body("Double 21.", "calculator", **fields))
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


async def test_a_session_is_its_users(api: httpx.AsyncClient) -> None:
    task = body("My name is Ada.", conversation="conv_own", user="ada")
    url = f"/v1/responses/{(await api.post('/v1/responses', json=task)).json()['id']}"
    for other in ("", "?user=eve"):
        assert (await api.get(f"{url}{other}")).status_code == 404
        assert (await api.delete(f"{url}{other}")).status_code == 404
        assert (await api.delete(f"/v1/conversations/conv_own{other}")).status_code == 404
    assert (await api.get(f"{url}?user=ada")).status_code == 200
    assert (await api.delete("/v1/conversations/conv_own?user=ada")).status_code == 200


async def test_the_page_shows_each_step(running: Pipeline, browser: pw.Browser) -> None:
    async with opened(browser, f"{running.url}/agent") as page:
        await page.fill("#task", "Double 21.")
        await page.fill("#plan", "")
        await page.click("#run")
        await page.get_by_text("It is 42.").wait_for()
        call = page.locator(".call")
        assert await call.locator("code").inner_text() == '{"expression": "2 * 21"}'
        assert await call.locator(".output").inner_text() == "42"
        await page.get_by_text("Completed").wait_for()
        assert await page.get_by_text("Step 1").count() == 1
        assert await page.get_by_text("Step 2").count() == 1


async def test_the_page_goes_on_with_its_session(running: Pipeline, browser: pw.Browser) -> None:
    async with opened(browser, f"{running.url}/agent") as page:
        await page.fill("#plan", "")
        for task, answer in (("My name is Ada.", "Hello Ada."), ("Who am I?", "You are Ada.")):
            await page.fill("#task", task)
            await page.click("#run")
            await page.get_by_text(answer).wait_for()
            await page.locator("#run:enabled").wait_for()
        await page.click("#new")
        await page.click("#run")
        await page.get_by_text("I do not know.").wait_for()


async def test_what_a_model_says_is_text_on_the_page(
    running: Pipeline, browser: pw.Browser
) -> None:
    async with opened(browser, f"{running.url}/agent") as page:
        await page.fill("#task", "Say <b>hello</b>.")
        await page.fill("#plan", "")
        await page.click("#run")
        await page.get_by_text("<b>Hello</b>", exact=True).wait_for()


async def test_the_page_shows_why_a_tool_failed(running: Pipeline, browser: pw.Browser) -> None:
    async with opened(browser, f"{running.url}/agent") as page:
        await page.fill("#task", "Divide.")
        await page.fill("#plan", "")
        await page.click("#run")
        await page.get_by_text("It cannot be done.").wait_for()
        assert "division by zero" in await page.locator(".output.failed").inner_text()


async def test_a_refusal_is_shown(running: Pipeline, browser: pw.Browser) -> None:
    async with opened(browser, f"{running.url}/agent") as page:
        await page.fill("#plan", "no_such_tool")
        await page.click("#run")
        await page.get_by_text("'no_such_tool' is no tool of this request").wait_for()


async def read_until(lines: AsyncIterator[str], event: str) -> None:
    """Read a stream of events up to the first of that type.

    The caller keeps `lines`: the connection is closed as soon as nobody has them.
    """
    async for line in lines:
        if f'"type":"{event}"' in line:
            return
    raise AssertionError(f"the stream ended without {event}")


def sandboxes(running: Pipeline) -> list[psutil.Process]:
    """The processes that the agent has started."""
    return psutil.Process(running.processes["agent"].pid).children(recursive=True)


async def test_a_document_gains_no_tool_that_the_request_does_not_give(
    running: Pipeline, api: httpx.AsyncClient
) -> None:
    """The model does as the letter says; its call is text, and nothing runs."""
    began = set(sandboxes(running))
    task = body("What does the letter say?", "search_documents", nvext={"max_steps": 4})
    response = await api.post("/v1/responses", json=task)
    calls = [item for item in response.json()["output"] if item["type"] == "mcp_call"]
    assert [call["name"] for call in calls] == ["search_documents"]
    assert "letter.md" in calls[0]["output"]
    assert text_of(response) == CALL % ("python", '{"code": "print(1)"}')
    assert set(sandboxes(running)) <= began


async def test_a_document_gains_no_tool_by_way_of_the_planner(
    running: Pipeline, api: httpx.AsyncClient
) -> None:
    """Neither in the step that reads it, nor in the next one or the answer, which are told of it.

    To those it is data: the call that the first step wrote has lost its mark.
    """
    began = set(sandboxes(running))
    task = body("Obey the letter", "search_documents", nvext={"agent": "planner"})
    response = await api.post("/v1/responses", json=task)
    assert text_of(response) == CALL % ("python", '{"code": "3"}')
    plan, call, *said = response.json()["output"]
    assert json.loads(plan["content"][0]["text"])["steps"][1] == "Do it."
    assert (call["type"], call["name"]) == ("mcp_call", "search_documents")
    assert "letter.md" in call["output"]
    assert [item["content"][0]["text"] for item in said] == [
        CALL % ("python", json.dumps({"code": code})) for code in ("print(1)", "print(2)", "3")
    ]
    assert set(sandboxes(running)) <= began


async def test_a_client_that_leaves_ends_the_tool_at_work(
    running: Pipeline, api: httpx.AsyncClient
) -> None:
    task = body("Wait for ever", "python", stream=True)
    async with api.stream("POST", "/v1/responses", json=task) as answer:
        lines = answer.aiter_lines()
        await read_until(lines, "response.mcp_call_arguments.done")
        await eventually(lambda: sandboxes(running))
    await eventually(lambda: not sandboxes(running))


async def test_a_second_run_of_a_session_is_refused(api: httpx.AsyncClient) -> None:
    """As long as the first one lasts; what it would have said is not mixed into the first."""
    task = body("Wait for ever", "python", conversation="conv_busy", stream=True)
    other = body("My name is Ada.", conversation="conv_busy")
    async with api.stream("POST", "/v1/responses", json=task) as answer:
        lines = answer.aiter_lines()
        await read_until(lines, "response.created")
        clash = await api.post("/v1/responses", json=other)
        assert clash.status_code == 409
        assert clash.json()["error"]["code"] == "conflict"

    async def free() -> bool:
        return (await api.post("/v1/responses", json=other)).status_code == 200

    await eventually(free)


async def test_another_agent_goes_on_with_the_session(
    running: Pipeline, api: httpx.AsyncClient
) -> None:
    """The one that had it is killed."""
    first = await api.post("/v1/responses", json=body("My name is Ada.", conversation="conv_ada"))
    assert text_of(first) == "Hello Ada."
    running.processes["agent"].kill()
    await asyncio.wrap_future(running.processes["agent"].exited)
    running.start("agent")
    await running.processes["agent"].wait_ready()

    async def answered() -> bool:
        again = await api.post("/v1/responses", json=body("Who am I?", conversation="conv_ada"))
        return again.status_code == 200 and text_of(again) == "You are Ada."

    await eventually(answered)
