"""Two agents of one pipeline share the sessions, and one goes on when the other dies."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from launch.child import Child
from launch.pipeline import Pipeline
from tests.chapter1.helpers import MODEL, eventually, http_client
from tests.chapter4.scripted import CALL, scripted_pipeline

import httpx
import psutil
import pytest
import pytest_asyncio

SCRIPT = [
    (r"(?s)word-1.*Noted.*word-2.*Noted.*word-3.*Noted.*word-4.*Noted.*Repeat", "All four."),
    (r"Wait for ever", CALL % ("python", '{"code": "while True: pass"}')),
    (r"word-\d", "Noted."),
    (r"Repeat", "I know nothing."),
]
BUILTIN = {"type": "mcp", "server_label": "builtin", "require_approval": "never"}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def running(
    servers: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Pipeline]:
    folder = tmp_path_factory.mktemp("script")
    async with scripted_pipeline(servers, folder, SCRIPT) as running:
        running.commands["agent2"] = running.commands["agent"]
        running.start("agent2")
        await running.wait_ready()
        yield running


@pytest_asyncio.fixture
async def api(running: Pipeline) -> AsyncIterator[httpx.AsyncClient]:
    async with http_client(running.url) as client:
        yield client


async def ask(api: httpx.AsyncClient, text: str, **fields: Any) -> dict[str, Any]:
    response = await api.post("/v1/responses", json={"model": MODEL, "input": text, **fields})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def text_of(answer: dict[str, Any]) -> str:
    text: str = answer["output"][-1]["content"][0]["text"]
    return text


async def test_a_conversation_is_held_by_all_agents(api: httpx.AsyncClient) -> None:
    for number in range(1, 5):
        await ask(api, f"word-{number}", conversation="conv_shared")
    assert text_of(await ask(api, "Repeat", conversation="conv_shared")) == "All four."
    assert text_of(await ask(api, "Repeat", conversation="conv_other")) == "I know nothing."


async def test_responses_follow_each_other_over_all_agents(api: httpx.AsyncClient) -> None:
    answer = await ask(api, "word-1")
    for number in range(2, 5):
        answer = await ask(api, f"word-{number}", previous_response_id=answer["id"])
    for _ in range(2):  # the second one forks
        last = await ask(api, "Repeat", previous_response_id=answer["id"])
        assert text_of(last) == "All four."
        assert (await api.get(f"/v1/responses/{last['id']}")).json()["id"] == last["id"]


async def test_of_runs_at_once_one_is_answered_and_the_others_are_refused(
    api: httpx.AsyncClient,
) -> None:
    task = {"model": MODEL, "input": "word-1", "conversation": "conv_rush"}
    answers = await asyncio.gather(*[api.post("/v1/responses", json=task) for _ in range(12)])
    assert {answer.status_code for answer in answers} <= {200, 409}
    refusals = [answer.json()["error"] for answer in answers if answer.status_code == 409]
    assert all(error["code"] == "conflict" for error in refusals)
    assert len(refusals) < 12


async def test_when_an_agent_dies_another_has_its_session_within_seconds(
    running: Pipeline, api: httpx.AsyncClient
) -> None:
    for number in range(1, 5):
        await ask(api, f"word-{number}", conversation="conv_lost")
    agents = [running.processes[name] for name in ("agent", "agent2")]

    def at_work() -> list[Child]:
        return [agent for agent in agents if psutil.Process(agent.pid).children()]

    task = {"model": MODEL, "input": "Wait for ever", "conversation": "conv_lost", "stream": True}
    task["tools"] = [{**BUILTIN, "allowed_tools": ["python"]}]
    async with api.stream("POST", "/v1/responses", json=task) as stream:
        lines = stream.aiter_lines()
        async for line in lines:
            if '"type":"response.mcp_call.in_progress"' in line:
                break
        await eventually(at_work)
        [dying] = at_work()
        dying.kill()
        rest = [line async for line in lines]
    assert any('"type":"response.failed"' in line or '"error"' in line for line in rest)
    question = {"model": MODEL, "input": "Repeat", "conversation": "conv_lost"}
    async with asyncio.timeout(60):
        while (answer := await api.post("/v1/responses", json=question)).status_code != 200:
            assert answer.status_code in (409, 503), answer.text
    assert text_of(answer.json()) == "All four."
