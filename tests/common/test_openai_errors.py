"""What the components behind the frontend complain about has the name that the client gave it."""

import json
from typing import Any

from common.openai import client_error, parse_chat, parse_completion
from common.protocol import ErrorInfo

import pytest

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION = {"model": "m", "prompt": "Once"}
TOO_MANY = "max_tokens is 99; with a prompt of 3 tokens it must be from 1 to 5"


def seen(body: dict[str, Any], message: str, param: str | None) -> tuple[str, str | None]:
    """The message and the param that the client sees."""
    parse = parse_chat if "messages" in body else parse_completion
    request = parse(json.dumps(body).encode())
    info = client_error(request, ErrorInfo("invalid_request", message, param))
    assert info.kind == "invalid_request"
    assert client_error(request, info) == info
    return info.message, info.param


@pytest.mark.parametrize(
    ("body", "message", "param", "expected"),
    [
        ({**CHAT, "max_completion_tokens": 99}, TOO_MANY, "max_tokens", "max_completion_tokens"),
        ({**CHAT, "max_tokens": 99}, TOO_MANY, "max_tokens", "max_tokens"),
        ({**COMPLETION, "max_tokens": 99}, TOO_MANY, "max_tokens", "max_tokens"),
        (CHAT, "token_ids has 7; ids are from 0 to 5", "token_ids", "messages"),
        (COMPLETION, "token_ids has 7; ids are from 0 to 5", "token_ids", "prompt"),
        (COMPLETION, "'token_ids': token id 7 is wrong", "token_ids", "prompt"),
        (COMPLETION, "stop_token_ids has 7", "stop_token_ids", "stop_token_ids"),
        (CHAT, "a simulated engine has no json_schema", "json_schema", "response_format"),
        (CHAT, "min_tokens is 9; it must be from 0 to 5", "min_tokens", "min_tokens"),
    ],
)
def test_the_client_sees_its_own_names(
    body: dict[str, Any], message: str, param: str, expected: str
) -> None:
    assert seen(body, message, param) == (message.replace(param, expected), expected)


def test_a_client_that_sent_both_limits_is_told_of_the_old_one() -> None:
    body = {**CHAT, "max_tokens": 99, "max_completion_tokens": 99}
    assert seen(body, TOO_MANY, "max_tokens") == (TOO_MANY, "max_tokens")


def test_an_error_about_no_field_is_left_alone() -> None:
    assert seen(CHAT, "the token_ids are lost", None) == ("the token_ids are lost", None)
