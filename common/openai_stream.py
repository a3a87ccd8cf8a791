"""Server-sent events of a streamed answer, encoded for speed.

At tens of thousands of tokens a second the JSON of each chunk is what a frontend spends its
time on. All but the text is the same in every chunk of an answer, so it is encoded once, and
whatever is ready leaves as one bytes object.

Source of the shapes: https://platform.openai.com/docs/api-reference/chat/streaming. Chunks
have no `system_fingerprint`, as in `openai_objects`.
"""

import time
from typing import Any

from common.openai_errors import sse_error
from common.openai_requests import ChatRequest, CompletionRequest
from common.openai_responses import (
    TextOffsets,
    chat_logprobs,
    extension,
    failure,
    usage_object,
)
from common.openai_tools import ToolChatRequest
from common.protocol import TextOutput
from common.protocol_tools import ToolCallDelta

import msgspec
from msgspec import UNSET

DONE = b"data: [DONE]\n\n"

_encode = msgspec.json.encode


class ChatStream:
    """The events of one answer of POST /v1/chat/completions.

    The first item's bytes begin with the chunk that names the role, with a content of null if
    the item has a call and no text; the last item's end with
    the finish reason, `nvext` and the token counts if asked for, and `[DONE]`. An item with
    an `error`, or whose answer was cancelled, becomes an error event; nothing may follow it.
    """

    def __init__(self, request_id: str, request: ChatRequest) -> None:
        self._frame = _Frame("chatcmpl-", "chat.completion.chunk", request_id, request)
        self._head = self._frame.choice_head + b'"delta":{"content":'
        self._tail = b'},"logprobs":null,"finish_reason":null}' + self._frame.tail
        self._start = self._role(b'""')
        self._calls_possible = isinstance(request, ToolChatRequest) and request.may_call()

    def chunk(self, output: TextOutput) -> bytes:
        """The events that tell about `output`; b"" if there is nothing to tell yet."""
        if self._calls_possible and msgspec.structs.replace(output, tokens=0) == TextOutput():
            return b""  # of the role too: whether there is a content is not known yet
        start, self._start = self._start, b""
        if error := failure(output):
            return start + sse_error(error)
        if start and output.tool_calls and not output.text:
            start = self._role(b"null")
        events = start
        if output.logprobs:
            body = b'"delta":{"content":%b},"logprobs":%b,"finish_reason":null'
            logprobs = _encode(chat_logprobs(output.logprobs))
            events += self._frame.choice(body % (_encode(output.text), logprobs))
        elif output.text:
            events += self._head + _encode(output.text) + self._tail
        for call in output.tool_calls:
            events += self._call(call)
        if output.finish_reason is not None:
            events += self._frame.end(output, b'"delta":{},"logprobs":null')
        return events

    def _role(self, content: bytes) -> bytes:
        delta = b'"delta":{"role":"assistant","content":%b,"refusal":null}' % content
        return self._frame.choice(delta + b',"logprobs":null,"finish_reason":null')

    def _call(self, call: ToolCallDelta) -> bytes:
        delta: dict[str, Any] = {"index": call.index, "function": {"arguments": call.arguments}}
        if call.id is not None:
            delta |= {"id": call.id, "type": "function"}
            delta["function"] = {"name": call.name, **delta["function"]}
        body = b'"delta":{"tool_calls":[%b]},"logprobs":null,"finish_reason":null'
        return self._frame.choice(body % _encode(delta))


class CompletionStream:
    """The events of one answer of POST /v1/completions; like `ChatStream`, without a role."""

    def __init__(self, request_id: str, request: CompletionRequest) -> None:
        self._frame = _Frame("cmpl-", "text_completion", request_id, request)
        self._head = self._frame.choice_head + b'"text":'
        self._tail = b',"logprobs":null,"finish_reason":null}' + self._frame.tail
        self._offsets = TextOffsets()

    def chunk(self, output: TextOutput) -> bytes:
        """The events that tell about `output`; b"" if there is nothing to tell yet."""
        if error := failure(output):
            return sse_error(error)
        events = b""
        if output.logprobs:
            logprobs = self._offsets.logprobs(output.logprobs)
            body = b'"text":%b,"logprobs":%b,"finish_reason":null'
            events = self._frame.choice(body % (_encode(output.text), _encode(logprobs)))
        elif output.text:
            events = self._head + _encode(output.text) + self._tail
        if output.finish_reason is not None:
            events += self._frame.end(output, b'"text":"","logprobs":null')
        return events


class _Frame:
    """What every event of one answer has around its choice."""

    def __init__(
        self,
        prefix: str,
        kind: str,
        request_id: str,
        request: ChatRequest | CompletionRequest,
    ) -> None:
        common = {
            "id": prefix + request_id,
            "object": kind,
            "created": int(time.time()),
            "model": request.model,
        }
        self._include_usage = request.include_usage()
        self._extra_fields = request.extra_fields()
        self._head = b"data: " + _encode(common)[:-1] + b',"choices":['
        # With include_usage, OpenAI's other chunks have a usage of null.
        self._after_choices = b'],"usage":null' if self._include_usage else b"]"
        self.choice_head = self._head + b'{"index":0,'
        self.tail = self._after_choices + b"}\n\n"

    def choice(self, body: bytes) -> bytes:
        """The event of a chunk whose choice has the members `body`."""
        return self.choice_head + body + b"}" + self.tail

    def end(self, output: TextOutput, body: bytes) -> bytes:
        """The last events: the finish reason, the token counts, `[DONE]`."""
        nvext = extension(self._extra_fields, output)
        events = [self.choice_head, body, b',"finish_reason":', _encode(output.finish_reason), b"}"]
        events.append(self._after_choices)
        if nvext is not UNSET:
            events += [b',"nvext":', _encode(nvext)]
        events.append(b"}\n\n")
        if self._include_usage and output.usage is not None:
            events += [self._head, b'],"usage":', _encode(usage_object(output.usage)), b"}\n\n"]
        events.append(DONE)
        return b"".join(events)
