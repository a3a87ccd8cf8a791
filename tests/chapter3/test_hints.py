"""Hints of clients: headers and `nvext`, what is refused and how it is named."""

import json
from typing import Any

from chapter3.hints import (
    RoutedChatRequest,
    RoutedCompletionRequest,
    hinted_request_docs,
    parse_chat,
    parse_completion,
    routing_hints,
)
from common.openai import parse_chat as parse_without_hints
from common.protocol import PipelineError
from common.protocol_routing import RoutingHints

import pytest
from starlette.datastructures import Headers

MESSAGES = [{"role": "user", "content": "Hi"}]


def hints(
    nvext: dict[str, Any] | None = None, headers: list[tuple[str, str]] | None = None
) -> RoutingHints:
    body = json.dumps({"model": "m", "messages": MESSAGES, "nvext": nvext}).encode()
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers or []]
    return routing_hints(parse_chat(body), Headers(raw=raw))


def test_nothing_said_is_nothing_special() -> None:
    assert hints() == RoutingHints()
    assert hints({"extra_fields": ["worker_id"]}, [("content-type", "text")]) == RoutingHints()


def test_the_body_says_it_all() -> None:
    nvext = {
        "agent_hints": {"priority": -3, "osl": 500},
        "session_id": "research-42:researcher",
        "tenant_id": "acme",
        "deadline_ms": 1500,
    }
    assert hints(nvext) == RoutingHints(-3, "acme", "research-42:researcher", 1500.0, 500)


def test_a_completion_says_it_too() -> None:
    body = {"model": "m", "prompt": "Hi", "nvext": {"tenant_id": "acme"}}
    assert routing_hints(parse_completion(json.dumps(body).encode())).tenant == "acme"


def test_the_headers_say_it() -> None:
    headers = [
        ("x-dynamo-request-priority", "7"),
        ("x-dynamo-session-id", "s"),
        ("x-dynamo-tenant-id", "caf\xe9"),
        ("x-dynamo-deadline-ms", "250.5"),
    ]
    assert hints(None, headers) == RoutingHints(7, "caf\xe9", "s", 250.5)


@pytest.mark.parametrize("name", ["caf\xe9", "\u65e5\u672c"])
def test_a_name_in_utf8_is_the_same_in_a_header_as_in_the_body(name: str) -> None:
    header = ("x-dynamo-tenant-id", name.encode().decode("latin-1"))
    assert hints({"tenant_id": name}, [header]).tenant == name


def test_both_may_say_the_same() -> None:
    nvext = {"tenant_id": "acme", "deadline_ms": 10, "agent_hints": {"priority": 0}}
    headers = [
        ("x-dynamo-tenant-id", "acme"),
        ("x-dynamo-deadline-ms", "10"),
        ("x-dynamo-request-priority", "0"),
    ]
    assert hints(nvext, headers) == RoutingHints(tenant="acme", deadline_ms=10.0)


@pytest.mark.parametrize(
    ("nvext", "header"),
    [
        ({"tenant_id": "acme"}, ("x-dynamo-tenant-id", "other")),
        ({"session_id": "a"}, ("x-dynamo-session-id", "b")),
        ({"deadline_ms": 10}, ("x-dynamo-deadline-ms", "11")),
        ({"agent_hints": {"priority": 0}}, ("x-dynamo-request-priority", "9")),
    ],
)
def test_a_body_cannot_contradict_a_header(nvext: dict[str, Any], header: tuple[str, str]) -> None:
    """A proxy that knows its tenants sets the header."""
    with pytest.raises(PipelineError, match="Differs from 'nvext") as caught:
        hints(nvext, [header])
    assert caught.value.info.kind == "invalid_request"
    assert caught.value.info.param == header[0]


@pytest.mark.parametrize(
    ("nvext", "param"),
    [
        ({"agent_hints": {"priority": 101}}, "nvext.agent_hints.priority"),
        ({"agent_hints": {"priority": 1.5}}, "nvext.agent_hints.priority"),
        ({"agent_hints": {"priority": "1"}}, "nvext.agent_hints.priority"),
        ({"agent_hints": {"priority": True}}, "nvext.agent_hints.priority"),
        ({"agent_hints": {"osl": 0}}, "nvext.agent_hints.osl"),
        ({"agent_hints": {"strict_priority": 1}}, "nvext.agent_hints.strict_priority"),
        ({"agent_hints": {"urgency": 1}}, "nvext.agent_hints.urgency"),
        ({"agent_hints": []}, "nvext.agent_hints"),
        ({"priority": 1}, "nvext.priority"),
        ({"deadline_ms": 0}, "nvext.deadline_ms"),
        ({"deadline_ms": -1}, "nvext.deadline_ms"),
        ({"deadline_ms": 1e9}, "nvext.deadline_ms"),
        ({"deadline_ms": "5"}, "nvext.deadline_ms"),
        ({"tenant_id": ""}, "nvext.tenant_id"),
        ({"tenant_id": "t" * 129}, "nvext.tenant_id"),
        ({"tenant_id": "a\nb"}, "nvext.tenant_id"),
        ({"session_id": 7}, "nvext.session_id"),
    ],
)
def test_a_wrong_body_is_refused_by_name(nvext: dict[str, Any], param: str) -> None:
    with pytest.raises(PipelineError) as caught:
        hints(nvext)
    assert caught.value.info.kind == "invalid_request"
    assert caught.value.info.param == param
    assert param in str(caught.value)
    assert '"deadline_ms": milliseconds until the first token' in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "accepted"),
    [
        ("x-dynamo-request-priority", "high", "an integer from -100 to 100"),
        ("x-dynamo-request-priority", "101", "an integer from -100 to 100"),
        ("x-dynamo-request-priority", "", "an integer from -100 to 100"),
        ("x-dynamo-request-priority", "1_0", "an integer from -100 to 100"),
        ("x-dynamo-request-priority", "9" * 5000, "an integer from -100 to 100"),
        ("x-dynamo-deadline-ms", "soon", "milliseconds until the first token"),
        ("x-dynamo-deadline-ms", "nan", "milliseconds until the first token"),
        ("x-dynamo-deadline-ms", "inf", "milliseconds until the first token"),
        ("x-dynamo-deadline-ms", "0", "milliseconds until the first token"),
        ("x-dynamo-deadline-ms", "1e3", "milliseconds until the first token"),
        ("x-dynamo-tenant-id", "", "1 to 128 characters"),
        ("x-dynamo-tenant-id", "t" * 129, "1 to 128 characters"),
        ("x-dynamo-session-id", "a\x85b", "1 to 128 characters"),
        ("x-dynamo-priority", "5", "x-dynamo-request-priority"),
        ("x-dynamo-osl", "5", "x-dynamo-request-priority"),
    ],
)
def test_a_wrong_header_is_refused_by_name(name: str, value: str, accepted: str) -> None:
    with pytest.raises(PipelineError) as caught:
        hints(None, [(name, value)])
    assert caught.value.info.kind == "invalid_request"
    assert caught.value.info.param == name
    assert f"'{name}'" in str(caught.value)
    assert accepted in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_header_that_comes_twice_is_refused() -> None:
    with pytest.raises(PipelineError, match="Given 2 times"):
        hints(None, [("x-dynamo-tenant-id", "a"), ("x-dynamo-tenant-id", "a")])


def test_what_asks_for_nothing_is_accepted() -> None:
    assert hints({"agent_hints": {"speculative_prefill": False, "priority": None}, "x": None})


def test_the_chapters_before_go_on_refusing_hints() -> None:
    body = {"model": "m", "messages": MESSAGES, "nvext": {"tenant_id": "acme"}}
    with pytest.raises(PipelineError) as caught:
        parse_without_hints(json.dumps(body).encode())
    assert caught.value.info.param == "nvext.tenant_id"


@pytest.mark.parametrize("model", [RoutedChatRequest, RoutedCompletionRequest])
def test_the_documents_name_headers_and_members(
    model: type[RoutedChatRequest] | type[RoutedCompletionRequest],
) -> None:
    docs = hinted_request_docs(model)
    assert {parameter["name"]: parameter["schema"]["type"] for parameter in docs["parameters"]} == {
        "x-dynamo-request-priority": "integer",
        "x-dynamo-session-id": "string",
        "x-dynamo-tenant-id": "string",
        "x-dynamo-deadline-ms": "number",
    }
    schema = docs["requestBody"]["content"]["application/json"]["schema"]
    assert "$ref" not in json.dumps(docs)
    nvext = schema["properties"]["nvext"]["anyOf"][0]["properties"]
    assert {"extra_fields", "agent_hints", "session_id", "tenant_id", "deadline_ms"} <= set(nvext)
