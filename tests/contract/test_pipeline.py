"""Chapters 2 and 4 on engines of a backend that is installed separately, from HTTP to the model."""

import json
import os
import signal
from typing import Any

from tests.chapter1.helpers import CHAT, MODEL, chat, eventually, http_client, stream
from tests.chapter2.helpers import Router, RuntimeCaller, ask, prompt, start_caller
from tests.conftest import StartPipeline
from tests.contract.backends import Backend

import httpx
import psutil
import pytest

pytestmark = pytest.mark.timeout(1200)

READY_TIMEOUT_S = 540
BUILTIN = {"type": "mcp", "server_label": "builtin", "require_approval": "never"}


async def test_two_engines_behind_the_router(
    external: Backend,
    servers: dict[str, str],
    start_pipeline: StartPipeline,
    request: pytest.FixtureRequest,
) -> None:
    """They answer, a prompt goes to where it is cached, and one that is killed is not missed."""
    model, flags = (request.config.getoption(name) for name in ("--engine-model", "--engine-flags"))
    environment = {**servers, "ENGINE_FLAGS": flags}
    start = start_pipeline(
        chapter="chapter2",
        backend=external.name,
        engines=2,
        model=model,
        wait=False,
        environment=environment,
    )
    with start_caller({**os.environ, **servers}) as caller:
        async with start as running, http_client(running.url, timeout=120) as client:
            await running.wait_ready(READY_TIMEOUT_S)
            router = Router(RuntimeCaller(caller), running)
            await router.wait_ready()
            await it_answers(client)
            prompts = await cached_somewhere(client, router)
            for worker, text in prompts.items():
                again = await ask(client, text)
                assert again.worker == worker
                assert 0.5 * again.prompt_tokens < again.cached_tokens < again.prompt_tokens
            dying = psutil.Process(running.processes["engine0"].pid)
            its_own = dying.children(recursive=True)
            assert its_own
            os.kill(dying.pid, signal.SIGKILL)
            await eventually(lambda: not any(map(psutil.pid_exists, pids_of(its_own))), 60)
            await it_goes_on(client, prompts[0])


async def test_an_agent_with_tools(
    external: Backend,
    servers: dict[str, str],
    start_pipeline: StartPipeline,
    request: pytest.FixtureRequest,
) -> None:
    """Chapter 4: a call that the client runs, and one that the agent does; its router's hints."""
    model, flags = (request.config.getoption(name) for name in ("--engine-model", "--engine-flags"))
    start = start_pipeline(
        chapter="chapter4",
        backend=external.name,
        engines=1,
        model=model,
        wait=False,
        environment={**servers, "ENGINE_FLAGS": flags},
    )
    async with start as running, http_client(running.url, timeout=120) as client:
        await running.wait_ready(READY_TIMEOUT_S)
        await it_calls(client)
        await it_refuses_a_schema(client)
        await its_agent_calculates(client)


async def it_calls(client: httpx.AsyncClient) -> None:
    """A schema of a number that is hard to keep to."""
    answer = await client.post(CHAT, json=forced({"type": "integer", "multipleOf": 7}))
    assert answer.status_code == 200, answer.text
    [choice] = answer.json()["choices"]
    [call] = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls"
    assert call["function"]["name"] == "f"
    assert json.loads(call["function"]["arguments"])["x"] % 7 == 0


async def it_refuses_a_schema(client: httpx.AsyncClient) -> None:
    answer = await client.post(CHAT, json=forced({"type": "string", "pattern": "^(?=a)"}))
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == "tools"


def forced(schema: dict[str, Any]) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"x": schema}, "required": ["x"]}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    return chat("Which number?", tools=[tool], tool_choice="required", max_tokens=60)


async def its_agent_calculates(client: httpx.AsyncClient) -> None:
    """Two steps: the calculator is called, for it must be, and its output answered."""
    body = {
        "model": MODEL,
        "input": "What is 17 * 23?",
        "tools": [{**BUILTIN, "allowed_tools": ["calculator"]}],
        "tool_choice": "required",
        "max_output_tokens": 120,
        "nvext": {"max_steps": 2},
    }
    answer = await client.post("/v1/responses", json=body)
    assert answer.status_code == 200, answer.text
    kinds = [item["type"] for item in answer.json()["output"]]
    assert kinds[0] == "mcp_call"


async def it_answers(client: httpx.AsyncClient) -> None:
    """Whole and streamed answers, and one that a JSON schema describes."""
    question = chat("What is the capital of France?", max_tokens=24, temperature=0)
    whole = (await client.post(CHAT, json=question)).json()["choices"][0]["message"]["content"]
    assert "Paris" in whole
    async with stream(client, question) as streamed:
        await streamed.read_all()
    assert len(streamed.chunks) > 3
    assert "Paris" in streamed.text
    schema = {"type": "object", "properties": {"big": {"type": "boolean"}}, "required": ["big"]}
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema}}
    answer = await client.post(CHAT, json={**question, "response_format": form})
    assert answer.status_code == 200, answer.text


async def cached_somewhere(client: httpx.AsyncClient, router: Router) -> dict[int, str]:
    """Prompts that engines have cached: one of each, by worker id, which the router knows."""
    prompts: dict[int, str] = {}
    for number in range(4):
        text = prompt(f"cached{number}", words=30)
        prompts.setdefault((await ask(client, text)).worker, text)
        await eventually(router.is_right, 30)
    assert sorted(prompts) == [0, 1]
    return prompts


async def it_goes_on(client: httpx.AsyncClient, text: str) -> None:
    """The other engine computes the prompt; until the dead one is no longer listed some fail."""

    async def status() -> bool:
        body: dict[str, Any] = chat(text, max_tokens=2)
        return (await client.post(CHAT, json=body)).status_code == 200

    await eventually(status, 60)
    assert (await ask(client, text)).worker == 1


def pids_of(processes: list[psutil.Process]) -> list[int]:
    return [process.pid for process in processes]
