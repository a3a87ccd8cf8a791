"""What a client says about an agent's run for the router's use, and of the run itself."""

import json
from typing import Any

from chapter4.hints import (
    RoutedResponseRequest,
    hinted_request_docs,
    parse_chat,
    parse_response_request,
    routing_hints,
)
from common.protocol import PipelineError
from common.protocol_routing import RoutingHints

import pytest
from starlette.datastructures import Headers


def request(**parameters: Any) -> RoutedResponseRequest:
    body = {"model": "m", "input": "hi", **parameters}
    return parse_response_request(json.dumps(body).encode())


def test_a_run_has_hints_and_a_budget() -> None:
    nvext = {"agent_hints": {"priority": 3}, "tenant_id": "t", "max_steps": 2, "tool_plan": ["a"]}
    parsed = request(nvext=nvext)
    assert parsed.nvext is not None
    assert (parsed.nvext.max_steps, parsed.nvext.tool_plan) == (2, ["a"])
    assert routing_hints(parsed) == RoutingHints(priority=3, tenant="t")


def test_headers_say_it_too() -> None:
    headers = Headers({"x-dynamo-session-id": "s"})
    assert routing_hints(request(), headers) == RoutingHints(session="s")
    with pytest.raises(PipelineError) as caught:
        routing_hints(request(nvext={"session_id": "other"}), headers)
    assert caught.value.info.param == "x-dynamo-session-id"


@pytest.mark.parametrize("name", ["worker_id", "priority"])
def test_what_a_run_has_not_is_refused(name: str) -> None:
    with pytest.raises(PipelineError) as caught:
        request(nvext={name: 1})
    assert caught.value.info.param == f"nvext.{name}"
    assert "tool_plan" in caught.value.info.message


def test_a_chat_has_tools() -> None:
    tool = {"type": "function", "function": {"name": "weather"}}
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "tools": [tool]}
    assert parse_chat(json.dumps(body).encode()).may_call()


def test_the_openapi_document_has_the_headers() -> None:
    docs = hinted_request_docs(RoutedResponseRequest)
    names = [parameter["name"] for parameter in docs["parameters"]]
    assert "x-dynamo-request-priority" in names
    schema = docs["requestBody"]["content"]["application/json"]["schema"]
    assert "max_steps" in schema["properties"]["nvext"]["description"]
