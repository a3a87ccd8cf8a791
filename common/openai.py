"""OpenAI's API as the frontend needs it: requests in, responses and SSE frames out.

`openai_requests` and `openai_tools` say what is accepted, `openai_responses` and `openai_stream`
what is answered, `openai_errors` how a failure looks, `openai_docs` what the OpenAPI document says.
What an agent answers, POST /v1/responses, is in the files `openai_response_*`.
"""

from common.openai_docs import (
    CHAT_RESPONSES,
    COMPLETION_RESPONSES,
    MODEL_LIST_RESPONSES,
    MODEL_RESPONSES,
    request_body_docs,
)
from common.openai_errors import client_error, error_response, sse_error
from common.openai_requests import (
    ChatCompletionRequest,
    ChatRequest,
    CompletionRequest,
    parse_chat,
    parse_completion,
    to_process_request,
)
from common.openai_responses import (
    ModelCard,
    ModelList,
    chat_response,
    completion_response,
    model_document,
    model_list,
)
from common.openai_stream import ChatStream, CompletionStream
from common.openai_tools import ToolChatRequest, to_tool_process_request

__all__ = [
    "CHAT_RESPONSES",
    "COMPLETION_RESPONSES",
    "MODEL_LIST_RESPONSES",
    "MODEL_RESPONSES",
    "ChatCompletionRequest",
    "ChatRequest",
    "ChatStream",
    "CompletionRequest",
    "CompletionStream",
    "ModelCard",
    "ModelList",
    "ToolChatRequest",
    "chat_response",
    "client_error",
    "completion_response",
    "error_response",
    "model_document",
    "model_list",
    "parse_chat",
    "parse_completion",
    "request_body_docs",
    "sse_error",
    "to_process_request",
    "to_tool_process_request",
]
