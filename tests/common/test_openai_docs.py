"""The OpenAPI document tells the truth about what the routes answer."""

import json
from typing import Any

from common.openai import (
    CHAT_RESPONSES,
    COMPLETION_RESPONSES,
    MODEL_LIST_RESPONSES,
    MODEL_RESPONSES,
    ChatCompletionRequest,
    chat_response,
    completion_response,
    error_response,
    model_document,
    model_list,
    parse_chat,
    parse_completion,
    request_body_docs,
)
from common.openai_docs import Responses
from common.protocol import (
    EngineInfo,
    EngineTimings,
    ErrorInfo,
    LogprobEntry,
    PositionLogprobs,
    TextOutput,
    Timings,
    Usage,
)

import jsonschema_rs
import pytest
from fastapi import FastAPI
from fastapi.responses import Response

ENTRY = LogprobEntry("a", -0.5, [97])
LAST = TextOutput(
    text="a",
    tokens=1,
    logprobs=[PositionLogprobs(ENTRY, [ENTRY])],
    finish_reason="stop",
    usage=Usage(3, 1),
    timings=Timings(1.0, 2.0, EngineTimings(0.1, 0.2, 0.3)),
    worker_id=0,
)
ENGINE = EngineInfo("m", backend="llamacpp", context_length=8, block_size=4, total_blocks=2)
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION = {"model": "m", "prompt": "hi"}
ALL = {"nvext": {"extra_fields": ["worker_id", "timing"]}}


def check(document: Any, responses: Responses, status: int = 200) -> None:
    """The document is as documented, and has no member that is not."""
    schema = responses[status]["content"]["application/json"]["schema"]
    assert "$ref" not in json.dumps(schema), "references would point outside the schema"
    jsonschema_rs.validate({**schema, "unevaluatedProperties": False}, document)


@pytest.mark.parametrize("extra", [{}, ALL])
@pytest.mark.parametrize("last", [LAST, TextOutput(finish_reason="length", usage=Usage(3, 0))])
def test_answers(extra: dict[str, Any], last: TextOutput) -> None:
    chat = parse_chat(json.dumps({**CHAT, **extra}).encode())
    check(json.loads(chat_response("r", chat, [last])), CHAT_RESPONSES)
    completion = parse_completion(json.dumps({**COMPLETION, **extra}).encode())
    check(json.loads(completion_response("r", completion, [last])), COMPLETION_RESPONSES)


def test_models() -> None:
    check(model_list(ENGINE, 1).model_dump(), MODEL_LIST_RESPONSES)
    check(model_document(ENGINE, "m", 1).model_dump(), MODEL_RESPONSES)


@pytest.mark.parametrize(
    ("info", "status"),
    [
        (ErrorInfo("invalid_request", "wrong", "top_p"), 400),
        (ErrorInfo("model_not_found", "none such", "model"), 404),
        (ErrorInfo("too_large", "too long"), 413),
        (ErrorInfo("overloaded", "full"), 429),
        (ErrorInfo("internal", "oh"), 500),
        (ErrorInfo("unavailable", "gone"), 503),
    ],
)
def test_errors(info: ErrorInfo, status: int) -> None:
    got, body = error_response(info)
    assert got == status
    for responses in (CHAT_RESPONSES, COMPLETION_RESPONSES):
        check(body, responses, status)


def test_a_document_that_is_not_as_documented() -> None:
    with pytest.raises(jsonschema_rs.ValidationError):
        check({**model_document(ENGINE, "m", 1).model_dump(), "permission": []}, MODEL_RESPONSES)
    with pytest.raises(jsonschema_rs.ValidationError):
        check({"error": "gone"}, CHAT_RESPONSES, 503)


def test_the_document_that_fastapi_makes_of_it() -> None:
    app = FastAPI()

    @app.post(
        "/chat", openapi_extra=request_body_docs(ChatCompletionRequest), responses=CHAT_RESPONSES
    )
    async def chat() -> Response:
        return Response()

    operation = app.openapi()["paths"]["/chat"]["post"]
    errors = {"400", "403", "404", "408", "413", "429", "500", "503"}
    assert set(operation["responses"]) == {"200"} | errors
    assert set(operation["responses"]["200"]["content"]) == {
        "application/json",
        "text/event-stream",
    }
    answer = operation["responses"]["200"]["content"]["application/json"]["schema"]
    assert answer["properties"]["object"] == {"enum": ["chat.completion"]}
    assert "requestBody" in operation
