"""The launcher's task for an agent: the request it sends, and every way in which a run can end."""

import json
from typing import Any

from launch.ask_agent import SHOWN, ask_agent
from launch.errors import LaunchError
from launch.ports import LOOPBACK, free_port
from tests.answering_server import server

import pytest


def call(output: str | None, error: str | None = None) -> dict[str, Any]:
    item = {"type": "mcp_call", "name": "calculator", "arguments": '{"expression": "6*7"}'}
    return {
        "type": "response.output_item.done",
        "item": {**item, "output": output, "error": error and {"content": error}},
    }


def delta(text: str) -> dict[str, Any]:
    return {"type": "response.output_text.delta", "delta": text}


def last(kind: str = "completed", **fields: Any) -> dict[str, Any]:
    usage = {
        "input_tokens": 90,
        "input_tokens_details": {"cached_tokens": 64},
        "output_tokens": 12,
    }
    output = [{"type": "mcp_call"}, {"type": "message"}]
    response = {"status": kind, "usage": usage, "output": output, **fields}
    return {"type": f"response.{kind}", "response": response}


def events(*items: dict[str, Any]) -> bytes:
    return "".join(
        f"event: {item['type']}\ndata: {json.dumps(item)}\n\n" for item in items
    ).encode()


async def run(content: bytes, *, plan: tuple[str, ...] = (), status: int = 200) -> tuple[str, str]:
    """What is shown, and what it took."""
    shown: list[str] = []
    with server(lambda request: (status, content)) as url:
        took = await ask_agent(url, "6 x 7?", shown.append, tools=True, plan=plan)
    return "".join(shown), took


async def test_shows_the_steps_and_tells_what_it_took() -> None:
    shown, took = await run(events(call("42"), delta("It is"), delta(" 42."), last()))
    assert shown == '[calculator(expression="6*7") -> 42]\nIt is 42.'
    assert took.startswith("completed in ")
    assert "1 tool calls · 90 prompt tokens, 64 of them cached · 12 completion tokens" in took


@pytest.mark.parametrize("tools", [True, False])
@pytest.mark.parametrize("plan", [(), ("calculator",)])
async def test_asks_for_what_the_model_can_do(tools: bool, plan: tuple[str, ...]) -> None:
    sent: list[dict[str, Any]] = []

    def answer(request: dict[str, Any]) -> tuple[int, bytes]:
        sent.append(request)
        return 200, events(last())

    with server(answer) as url:
        await ask_agent(url, "6 x 7?", lambda text: None, tools=tools, plan=plan)
    (request,) = sent
    assert (request["model"], request["input"], request["store"]) == ("toy", "6 x 7?", False)
    assert bool(request.get("tools")) == (tools or bool(plan))
    if plan:
        assert request["nvext"] == {"tool_plan": ["calculator"], "max_steps": 2}
        assert request["tools"][0]["allowed_tools"] == ["calculator"]
        assert request["text"]["format"]["type"] == "json_schema"
    else:
        assert not {"nvext", "text", "instructions"} & request.keys()


async def test_a_tool_that_failed_says_why() -> None:
    shown, _ = await run(events(call(None, "division by zero"), last()))
    assert shown == '[calculator(expression="6*7") -> division by zero]\n'


async def test_a_call_that_was_cut_off_is_shown_as_it_is() -> None:
    cut = call(None)
    cut["item"]["arguments"] = '{"expression": "1 +'
    shown, _ = await run(events(cut, last()))
    assert shown.startswith('[calculator({"expression": "1 +) -> ')


async def test_no_output_steers_the_terminal() -> None:
    shown, _ = await run(events(call("\x1b[2J\x07ok"), last()))
    assert "\x1b" not in shown
    assert "ok" in shown


async def test_long_outputs_are_cut() -> None:
    shown, _ = await run(events(call("ab\n" * 1000), last()))
    assert len(shown) < SHOWN + 60
    assert "\n" not in shown.rstrip("\n")


async def test_an_incomplete_run_says_what_is_used_up() -> None:
    reason = {"reason": "max_output_tokens"}
    _, took = await run(events(last("incomplete", incomplete_details=reason)))
    assert took.startswith("incomplete: max_output_tokens in ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (events(last("failed", error={"message": "no engine"})), "the run failed: no engine"),
        (events({"type": "error", "message": "broken"}), "the run failed: broken"),
        (events(delta("It is")), "ended without its last event"),
    ],
)
async def test_a_run_that_breaks_off(content: bytes, message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        await run(content)


async def test_a_refusal() -> None:
    refusal = json.dumps({"error": {"message": "'input': too long"}}).encode()
    with pytest.raises(LaunchError, match="answered 400: 'input': too long"):
        await run(refusal, status=400)


async def test_nobody_there() -> None:
    url = f"http://{LOOPBACK}:{free_port()}"
    with pytest.raises(LaunchError, match="ConnectError"):
        await ask_agent(url, "6 x 7?", lambda text: None, tools=True)
