"""What a client may say about a request for the router's use, and how it says it.

In the body, as `nvext` of Dynamo's requests, or in a header; said twice, it must be the same, so
that what a trusted proxy in front of us adds cannot be contradicted. The names are Dynamo's where
it has the field; `tenant_id` and `deadline_ms` are ours. To Dynamo's router, `priority` is one
reason among others and `strict_priority` goes before all; here `priority` goes before all.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any

from common.openai import (
    CompletionRequest,
    ToolChatRequest,
    request_body_docs,
)
from common.openai_fields import StrictModel, parse
from common.openai_requests import Nvext
from common.openai_response_requests import AGENT_NVEXT, AgentNvext, ResponseRequest
from common.openai_values import Label, TokenCount
from common.protocol import PipelineError
from common.protocol_routing import RoutingHints

from pydantic import Field, ValidationError
from starlette.datastructures import Headers

MAX_PRIORITY = 100
MAX_DEADLINE_MS = 3_600_000
HEADER_PREFIX = "x-dynamo-"
OTHER_AGENT_HINTS: Mapping[str, tuple[Any, ...]] = {
    "speculative_prefill": (False,),
    "strict_priority": (),
}
"""Those of Dynamo that we do not have; see `openai_unsupported`."""

_PRIORITY = f"an integer from {-MAX_PRIORITY} to {MAX_PRIORITY}, the highest goes first; default 0"
_NAME = "1 to 128 characters, none of them a control character"
_DEADLINE = f"milliseconds until the first token, above 0 and up to {MAX_DEADLINE_MS}"

_Name = Annotated[Label, Field(max_length=128, description=_NAME)]


class AgentHints(StrictModel):
    """Dynamo's `agent_hints`; `osl` is the expected number of output tokens."""

    unsupported = OTHER_AGENT_HINTS

    priority: Annotated[
        int | None, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY, description=_PRIORITY)
    ] = None
    osl: Annotated[TokenCount | None, Field(description="an integer from 1")] = None


class RoutingMembers(StrictModel):
    """What of `nvext` a router can use."""

    agent_hints: AgentHints | None = None
    session_id: _Name | None = None
    tenant_id: _Name | None = None
    deadline_ms: Annotated[float | None, Field(gt=0, le=MAX_DEADLINE_MS, description=_DEADLINE)] = (
        None
    )


class RoutingNvext(RoutingMembers, Nvext):
    """`nvext` of a chat or a completion."""


class RunNvext(RoutingMembers, AgentNvext):
    """`nvext` of an agent's run."""


_ROUTING = (
    f'"agent_hints": {{"priority": {_PRIORITY}; "osl": the expected output tokens, an integer '
    f'from 1}}; "session_id", "tenant_id": {_NAME}; "deadline_ms": {_DEADLINE}'
)
_NVEXT = f'an object; "extra_fields": a list of any of "worker_id", "timing"; {_ROUTING}'
_RoutingNvextField = Annotated[RoutingNvext | None, Field(description=_NVEXT)]


class RoutedChatRequest(ToolChatRequest):
    """The body of POST /v1/chat/completions."""

    nvext: _RoutingNvextField = None


class RoutedCompletionRequest(CompletionRequest):
    """The body of POST /v1/completions."""

    nvext: _RoutingNvextField = None


class RoutedResponseRequest(ResponseRequest):
    """The body of POST /v1/responses."""

    nvext: Annotated[
        RunNvext | None, Field(description=f"an object; {AGENT_NVEXT}; {_ROUTING}")
    ] = None


# What each header stands for in `nvext`.
_HEADERS: dict[str, tuple[str, ...]] = {
    f"{HEADER_PREFIX}request-priority": ("agent_hints", "priority"),
    f"{HEADER_PREFIX}session-id": ("session_id",),
    f"{HEADER_PREFIX}tenant-id": ("tenant_id",),
    f"{HEADER_PREFIX}deadline-ms": ("deadline_ms",),
}
_ACCEPTED = {
    ("agent_hints", "priority"): _PRIORITY,
    ("session_id",): _NAME,
    ("tenant_id",): _NAME,
    ("deadline_ms",): _DEADLINE,
}


def parse_chat(body: bytes) -> RoutedChatRequest:
    """The chat request in `body`; raises as `openai_fields.parse` does."""
    return parse(RoutedChatRequest, body)


def parse_completion(body: bytes) -> RoutedCompletionRequest:
    """The completion request in `body`; raises as `openai_fields.parse` does."""
    return parse(RoutedCompletionRequest, body)


def parse_response_request(body: bytes) -> RoutedResponseRequest:
    """The request for a response in `body`; raises as `openai_fields.parse` does."""
    return parse(RoutedResponseRequest, body)


def routing_hints(
    request: RoutedChatRequest | RoutedCompletionRequest | RoutedResponseRequest,
    headers: Headers | None = None,
) -> RoutingHints:
    """What the request says in its body and its headers.

    Raises:
        PipelineError: kind `invalid_request`; a header is wrong, unknown, or says something
            else than the body.
    """
    nvext = request.nvext or RoutingMembers()
    agent_hints = nvext.agent_hints or AgentHints()
    hints: dict[tuple[str, ...], Any] = {
        ("agent_hints", "priority"): agent_hints.priority,
        ("session_id",): nvext.session_id,
        ("tenant_id",): nvext.tenant_id,
        ("deadline_ms",): nvext.deadline_ms,
    }
    for name, value in _from_headers(headers or Headers()).items():
        path = _HEADERS[name]
        if hints[path] not in (None, value):
            field = ".".join(("nvext", *path))
            message = f"'{name}': Differs from '{field}' in the body; give one of them."
            raise PipelineError("invalid_request", message, name)
        hints[path] = value
    return RoutingHints(
        priority=hints["agent_hints", "priority"] or 0,
        tenant=hints["tenant_id",] or "",
        session=hints["session_id",] or "",
        deadline_ms=hints["deadline_ms",],
        output_tokens=agent_hints.osl,
    )


def hinted_request_docs(model: type[StrictModel]) -> dict[str, Any]:
    """`openai_docs.request_body_docs`, and those of the headers."""
    schema = RoutingMembers.model_json_schema()
    schemas = {**schema["properties"], **schema["$defs"]["AgentHints"]["properties"]}
    parameters = [
        {
            "name": name,
            "in": "header",
            "required": False,
            "description": f"as `{'.'.join(('nvext', *path))}`: {_ACCEPTED[path]}",
            # A header is absent, never null.
            "schema": next(kind for kind in schemas[path[-1]]["anyOf"] if kind["type"] != "null"),
        }
        for name, path in _HEADERS.items()
    ]
    return {**request_body_docs(model), "parameters": parameters}


def _from_headers(headers: Headers) -> dict[str, str | int | float]:
    """The values of the headers that are there, by name."""
    values: dict[str, str | int | float] = {}
    for name in sorted({name for name in headers if name.startswith(HEADER_PREFIX)}):
        if name not in _HEADERS:
            message = f"The header is unknown. Supported: {', '.join(_HEADERS)}."
            raise PipelineError("invalid_request", f"'{name[:80]}': {message}", name[:80])
        texts = headers.getlist(name)
        if len(texts) > 1:
            message = f"'{name}': Given {len(texts)} times; once is enough."
            raise PipelineError("invalid_request", message, name)
        values[name] = _checked(name, _decoded(texts[0]))
    return values


def _decoded(text: str) -> str:
    """Starlette takes a header's bytes for Latin-1; clients that have other letters send UTF-8."""
    try:
        return text.encode("latin-1").decode()
    except UnicodeDecodeError:
        return text


def _checked(name: str, text: str) -> str | int | float:
    path = _HEADERS[name]
    value: str | int | float = text
    if path[-1] == "priority" and re.fullmatch("-?[0-9]{1,9}", text):
        value = int(text)
    elif path[-1] == "deadline_ms" and re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text):
        value = float(text)
    nested: Any = value
    for member in reversed(path):
        nested = {member: nested}
    try:
        RoutingMembers.model_validate(nested)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]["msg"]
        message = f"'{name}': {problem}, not {text[:80]!r}. Accepted: {_ACCEPTED[path]}."
        raise PipelineError("invalid_request", message, name) from error
    return value
