"""What the API's routes answer, for the OpenAPI document.

Each constant is the `responses` argument of a FastAPI route decorator, beside the
`openapi_extra` of `request_body_docs`:

    @app.post("/v1/chat/completions", responses=CHAT_RESPONSES, openapi_extra=...)
    @app.post("/v1/completions", responses=COMPLETION_RESPONSES, openapi_extra=...)
    @app.get("/v1/models", responses=MODEL_LIST_RESPONSES)
    @app.get("/v1/models/{model_id}", responses=MODEL_RESPONSES)
"""

from typing import Any

from common.openai_responses import ModelCard, ModelList

Responses = dict[int | str, dict[str, Any]]

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_ERRORS = {
    400: "A parameter is wrong, missing, unknown or not supported; `param` names it.",
    404: "The model does not exist.",
    413: "The body is over the server's limit.",
    429: "The server is full; try again later.",
    500: "The server failed.",
    503: "A component behind the server is missing or died; try again later.",
}


def _responses(description: str, content: dict[str, Any], *errors: int) -> Responses:
    """The documents of a 200 and of the named errors."""
    error = {"application/json": {"schema": _ERROR}}
    documents: Responses = {200: {"description": description, "content": content}}
    return documents | {
        status: {"description": _ERRORS[status], "content": error} for status in errors
    }


def _answer(schema: dict[str, Any]) -> Responses:
    events = {"schema": {"type": "string"}}
    return _responses(
        "The answer; with `stream: true` as server-sent events, each `data:` a chunk in JSON, the "
        "last one `[DONE]`. A stream that fails ends with an event that has an `error` instead.",
        {"application/json": {"schema": schema}, "text/event-stream": events},
        *_ERRORS,
    )


def _document(schema: dict[str, Any], *errors: int) -> Responses:
    return _responses("Found.", {"application/json": {"schema": schema}}, *errors)


CHAT_RESPONSES = _answer({"type": "object"})
COMPLETION_RESPONSES = _answer({"type": "object"})
MODEL_LIST_RESPONSES = _document(ModelList.model_json_schema(), 500, 503)
MODEL_RESPONSES = _document(ModelCard.model_json_schema(), 404, 500, 503)
