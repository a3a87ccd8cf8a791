"""One task for an agent of a running pipeline: what it does as it happens, and what it took."""

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

from launch.ask import TIMEOUT, check, events_of, served_model
from launch.errors import LaunchError

import httpx

MAX_ANSWER_TOKENS = 256
# A small model does as an example does, and says no more than a form has room for.
EXAMPLE = """\
First search for what you need to know, then calculate with the numbers that you found, then answer.
Example:
Question: What is 5% of the height of the tallest tower in the notes?
search_documents: {"query": "height of the tallest tower"}
Output: the Iron Tower, 340 m
calculator: {"expression": "5% of 340"}
Output: 17
Answer: {"answer": "17 m"}"""
FORM = {
    "type": "json_schema",
    "name": "answer",
    "schema": {
        "type": "object",
        "properties": {"answer": {"type": "string", "maxLength": 200}},
        "required": ["answer"],
        "additionalProperties": False,
    },
}
SHOWN = 160  # characters of a tool's output


async def ask_agent(
    url: str,
    task: str,
    on_text: Callable[[str], None],
    *,
    tools: bool,
    plan: Sequence[str] = (),
) -> str:
    """Give the agent at `url` one task; `on_text` gets its steps and its answer in pieces.

    `plan` is for a model that cannot choose: it names the tools that it must call, in this order,
    and the answer has a form. Returns what it took.

    Raises:
        LaunchError: the pipeline refused the request or failed at work on it.
    """
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT, trust_env=False) as client:
        try:
            return await _stream(client, task, on_text, tools, plan)
        except httpx.HTTPError as error:
            raise LaunchError(
                f"the request to {url} failed: {type(error).__name__}: {error}"
            ) from error


async def _stream(
    client: httpx.AsyncClient,
    task: str,
    on_text: Callable[[str], None],
    tools: bool,
    plan: Sequence[str],
) -> str:
    builtin = {"type": "mcp", "server_label": "builtin", "require_approval": "never"}
    request: dict[str, Any] = {
        "model": await served_model(client),
        "input": task,
        "temperature": 0,
        "max_output_tokens": MAX_ANSWER_TOKENS,
        "stream": True,
        "store": False,
    }
    if tools:
        request["tools"] = [builtin]
    if plan:
        request["tools"] = [{**builtin, "allowed_tools": list(plan)}]
        request["instructions"] = EXAMPLE
        request["text"] = {"format": FORM}
        request["nvext"] = {"tool_plan": list(plan), "max_steps": len(plan) + 1}
    sent = time.perf_counter()
    async with client.stream("POST", "/v1/responses", json=request) as response:
        await check(response)
        async for event in events_of(response):
            match event.get("type"):
                case "response.output_text.delta":
                    on_text(event["delta"])
                case "response.output_item.done":
                    on_text(_call(event["item"]))
                case "response.completed" | "response.incomplete":
                    return _took(event["response"], time.perf_counter() - sent)
                case "response.failed":
                    raise LaunchError(f"the run failed: {event['response']['error']['message']}")
                case "error":
                    raise LaunchError(f"the run failed: {event['message']}")
    raise LaunchError("the run ended without its last event")


def _call(item: dict[str, Any]) -> str:
    """A call of a tool and what it said, as lines."""
    if item["type"] != "mcp_call":
        return ""
    try:
        given = json.loads(item["arguments"])
    except ValueError:  # it was cut off
        arguments = item["arguments"]
    else:
        arguments = ", ".join(
            f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in given.items()
        )
    said = item["error"]["content"] if item.get("error") else item["output"]
    # What a tool says must not steer the terminal.
    said = " ".join("".join(c if c.isprintable() else " " for c in str(said)).split())
    said = said if len(said) <= SHOWN else f"{said[:SHOWN]} …"
    return f"[{item['name']}({arguments}) -> {said}]\n"


def _took(response: dict[str, Any], seconds: float) -> str:
    usage = response["usage"]
    calls = sum(item["type"] == "mcp_call" for item in response["output"])
    cached = usage["input_tokens_details"]["cached_tokens"]
    ended = response["status"]
    if ended == "incomplete":
        ended = f"incomplete: {response['incomplete_details']['reason']}"
    return (
        f"{ended} in {seconds:.1f} s · {calls} tool calls · {usage['input_tokens']} prompt tokens, "
        f"{cached} of them cached · {usage['output_tokens']} completion tokens"
    )
