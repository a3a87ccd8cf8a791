"""What the API's routes take and answer, for the OpenAPI document.

`request_body_docs` makes the `openapi_extra` argument of a FastAPI route decorator, and each
constant is a `responses` argument:

    @app.post("/v1/chat/completions", openapi_extra=..., responses=CHAT_RESPONSES)
    @app.post("/v1/completions", openapi_extra=..., responses=COMPLETION_RESPONSES)
    @app.get("/v1/models", responses=MODEL_LIST_RESPONSES)
    @app.get("/v1/models/{model_id}", responses=MODEL_RESPONSES)
"""

from typing import Any

from common.openai_fields import StrictModel
from common.openai_objects import ChatCompletion, Completion, ErrorDocument
from common.openai_responses import ModelCard, ModelList

import msgspec

Responses = dict[int | str, dict[str, Any]]

_ERRORS = {
    400: "A parameter is wrong, missing, unknown or not supported; `param` names it.",
    403: "The request comes from a web page of another site, or is for a host unknown here.",
    404: "The model does not exist, or what else was named.",
    408: "The body did not come in time.",
    409: "Another request is changing the same conversation; this one changed nothing.",
    413: "The body is over the server's limit.",
    429: "The server is full; try again later.",
    500: "The server failed.",
    503: "A component behind the server is missing or died; try again later.",
}
_ANSWER_ERRORS = (400, 403, 404, 408, 413, 429, 500, 503)


def request_body_docs(model: type[StrictModel]) -> dict[str, Any]:
    """The documents of a JSON body that the route parses itself."""
    content = {"application/json": {"schema": _inlined(model.model_json_schema())}}
    return {"requestBody": {"required": True, "content": content}}


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema without references, which are relative to the OpenAPI document as a whole."""
    definitions = schema.get("$defs", {})

    def inline(node: Any) -> Any:
        if isinstance(node, dict):
            if "$ref" in node:
                name = node["$ref"].removeprefix("#/$defs/")
                node = {**definitions[name], **{k: v for k, v in node.items() if k != "$ref"}}
            return {key: inline(value) for key, value in node.items()}
        return [inline(item) for item in node] if isinstance(node, list) else node

    inlined: dict[str, Any] = inline({k: v for k, v in schema.items() if k != "$defs"})
    return inlined


def _responses(description: str, content: dict[str, Any], *errors: int) -> Responses:
    """The documents of a 200 and of the named errors."""
    error = {"application/json": {"schema": _inlined(msgspec.json.schema(ErrorDocument))}}
    documents: Responses = {200: {"description": description, "content": content}}
    return documents | {
        status: {"description": _ERRORS[status], "content": error} for status in errors
    }


_CHUNKS = (
    "A chunk of the answer as JSON, as OpenAI's API has it; at last `[DONE]`. "
    "A stream that fails ends with the JSON of an error instead."
)


def answer_docs(schema: dict[str, Any], data_description: str = _CHUNKS, *errors: int) -> Responses:
    data = {"type": "string", "description": data_description}
    event = {"type": "object", "required": ["data"], "properties": {"data": data}}
    return _responses(
        "The answer; with `stream: true` as server-sent events.",
        {
            "application/json": {"schema": _inlined(schema)},
            "text/event-stream": {"itemSchema": event},  # from OpenAPI 3.2; FastAPI's own too
        },
        *(errors or _ANSWER_ERRORS),
    )


def document_docs(schema: dict[str, Any], *errors: int) -> Responses:
    return _responses("Found.", {"application/json": {"schema": _inlined(schema)}}, *errors)


CHAT_RESPONSES = answer_docs(msgspec.json.schema(ChatCompletion))
COMPLETION_RESPONSES = answer_docs(msgspec.json.schema(Completion))
MODEL_LIST_RESPONSES = document_docs(ModelList.model_json_schema(), 500, 503)
MODEL_RESPONSES = document_docs(ModelCard.model_json_schema(), 404, 500, 503)
