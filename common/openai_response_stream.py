"""The events of an agent's run as the server-sent events of POST /v1/responses.

Source of the events, their order and shapes:
https://platform.openai.com/docs/api-reference/responses-streaming. With `nvext.extra_fields` of
"steps" there are two more, `nvext.step_started` and `nvext.step_ended`.
"""

import time
from dataclasses import dataclass
from typing import Any

from common.openai_response_objects import (
    Asked,
    ConversationObject,
    ItemStatus,
    OutputItem,
    OutputText,
    RunExtension,
)
from common.openai_response_output import CODE, SEARCH, OutputItems, argument, begun, end
from common.protocol import ErrorInfo, Usage
from common.protocol_agent import (
    AgentEvent,
    AgentRequest,
    CallDelta,
    FunctionCallItem,
    ItemDone,
    MessageItem,
    RunEnded,
    StepEnded,
    StepStarted,
    TextDelta,
    ToolRunItem,
    ToolStarted,
)

import msgspec

_encode = msgspec.json.encode


@dataclass
class _Call:
    """A call of which the end has not come."""

    call_id: str
    name: str
    server: str | None
    kind: str
    arguments: str = ""
    started: bool = False


class ResponseStream:
    """One response: `chunk` makes bytes of a run's event, and `response` is what it is now."""

    def __init__(self, request: AgentRequest, asked: Asked, *, steps: bool) -> None:
        response_id = request.response_id
        self.response = begun(response_id, request.model, asked, request.instructions)
        self.response.previous_response_id = request.previous_response_id
        if request.conversation is not None:
            self.response.conversation = ConversationObject(request.conversation)
        self._items = OutputItems(response_id, asked)
        self._ids: dict[int, str] = {}  # of items, by output index, as all of these
        self._done: dict[int, OutputItem] = {}
        self._texts: dict[int, str] = {}  # of messages that have not ended
        self._calls: dict[int, _Call] = {}
        self._steps: list[StepEnded] | None = [] if steps else None
        self._cut_off = False
        self._number = 0
        self._begun = False

    def chunk(self, event: AgentEvent) -> bytes:
        """The server-sent events that tell about `event`; b"" if there is nothing to tell."""
        start = b"" if self._begun else self._start()
        match event:
            case TextDelta():
                return start + self._text(event)
            case CallDelta():
                return start + self._call(event)
            case ToolStarted():
                return start + self._tool_started(event.index)
            case ItemDone():
                return start + self._item_done(event)
            case StepStarted() | StepEnded():
                return start + self._step(event)
            case RunEnded():
                return start + self._ended(event)

    def is_last(self, event: AgentEvent) -> bool:
        return isinstance(event, RunEnded)

    def document(self, events: list[AgentEvent]) -> bytes:
        """The JSON of the whole response, from all events of the run."""
        for event in events:
            self.chunk(event)
        return _encode(self.response)

    def failed(self, info: ErrorInfo) -> bytes:
        """The last events of a run of which no end has come."""
        start = b"" if self._begun else self._start()
        error = self._event("error", code=info.kind, message=info.message, param=info.param)
        return start + error + self._ended(RunEnded("failed", Usage(0, 0), error=info))

    def _start(self) -> bytes:
        self._begun = True
        events = ("response.created", "response.in_progress")
        return b"".join(self._event(event, response=self.response) for event in events)

    def _text(self, event: TextDelta) -> bytes:
        index, start = event.index, b""
        if index not in self._texts:
            self._texts[index] = ""
            start = self._added(index, self._items.message(index, None, "in_progress"))
            start += self._part("response.content_part.added", index, "")
        self._texts[index] += event.text
        name = "response.output_text.delta"
        return start + self._of(name, index, content_index=0, delta=event.text, logprobs=[])

    def _call(self, event: CallDelta) -> bytes:
        index, start = event.index, b""
        if index not in self._calls:
            call_id, name = event.call_id or "", event.name or ""
            kind = self._items.type_of(event.server, name)
            self._calls[index] = _Call(call_id, name, event.server, kind)
            start = self._added(index, self._open_call(index))
            if event.server is not None:
                start += self._of(f"response.{kind}_call.in_progress", index)
        call = self._calls[index]
        call.arguments += event.arguments
        if not event.arguments or call.kind in (CODE, SEARCH):
            return start
        name = f"response.{call.kind}_call_arguments.delta"
        return start + self._of(name, index, delta=event.arguments)

    def _arguments_done(self, index: int) -> bytes:
        """The events when the arguments are complete."""
        call = self._calls[index]
        call.started = True
        if call.kind == SEARCH:
            return b""
        if call.kind != CODE:
            name = f"response.{call.kind}_call_arguments.done"
            return self._of(name, index, arguments=call.arguments)
        code = argument(call.arguments, "code") or ""
        name = "response.code_interpreter_call_code"
        return self._of(f"{name}.delta", index, delta=code) + self._of(
            f"{name}.done", index, code=code
        )

    def _tool_started(self, index: int) -> bytes:
        doing = {CODE: "interpreting", SEARCH: "searching"}.get(self._calls[index].kind)
        events = self._arguments_done(index)
        if doing is None:
            return events
        name = f"response.{self._calls[index].kind}_call.{doing}"
        return events + self._of(name, index)

    def _item_done(self, event: ItemDone) -> bytes:
        index, item, events = event.index, event.item, b""
        done = self._items.done(index, item)
        if isinstance(item, MessageItem):
            if self._cut_off:
                done = self._items.message(index, item.content, "incomplete")
            if index not in self._texts:
                events = self._text(TextDelta(index, item.content))
            events += self._text_done(index)
        elif isinstance(item, FunctionCallItem | ToolRunItem):
            if index not in self._calls:
                server = item.server if isinstance(item, ToolRunItem) else None
                events = self._call(
                    CallDelta(index, item.arguments, item.call_id, item.name, server)
                )
            if not self._calls[index].started:
                events += self._arguments_done(index)
            if isinstance(item, ToolRunItem):
                events += self._tool_ended(index, failed=item.error is not None)
            del self._calls[index]
        return events + self._close(index, done)

    def _text_done(self, index: int) -> bytes:
        text = self._texts.pop(index)
        events = self._of(
            "response.output_text.done", index, content_index=0, text=text, logprobs=[]
        )
        return events + self._part("response.content_part.done", index, text)

    def _tool_ended(self, index: int, *, failed: bool) -> bytes:
        kind = self._calls[index].kind
        if failed and kind in (CODE, SEARCH):
            return b""  # OpenAI's API has no such event; the item says it
        name = f"response.{kind}_call.{'failed' if failed else 'completed'}"
        return self._of(name, index)

    def _step(self, event: StepStarted | StepEnded) -> bytes:
        self._cut_off = isinstance(event, StepStarted) or event.finish_reason == "length"
        if self._steps is None:
            return b""
        members = msgspec.structs.asdict(event)
        if isinstance(event, StepStarted):
            return self._event("nvext.step_started", **members)
        self._steps.append(event)
        return self._event("nvext.step_ended", **members)

    def _ended(self, event: RunEnded) -> bytes:
        events = b""
        for index in list(self._texts):
            item = self._items.message(index, self._texts[index], "incomplete")
            events += self._text_done(index) + self._close(index, item)
        for index in list(self._calls):
            events += self._close(index, self._open_call(index, ended=True))
        output = [self._done[index] for index in sorted(self._done)]
        end(self.response, event, output, int(time.time()))
        if self._steps is not None:
            self.response.nvext = RunExtension(self._steps)
        return events + self._event(f"response.{event.status}", response=self.response)

    def _open_call(self, index: int, *, ended: bool = False) -> OutputItem:
        call = self._calls[index]
        status: ItemStatus = "incomplete" if ended else "in_progress"
        arguments = call.arguments if ended else ""
        if call.server is None:
            return self._items.function_call(call.call_id, call.name, arguments, status)
        run = ToolRunItem(call.call_id, call.server, call.name, arguments)
        return self._items.tool_run(run, status, done=False)

    def _added(self, index: int, item: OutputItem) -> bytes:
        self._ids[index] = item.id
        return self._event("response.output_item.added", output_index=index, item=item)

    def _close(self, index: int, item: OutputItem) -> bytes:
        self._done[index] = item
        return self._event("response.output_item.done", output_index=index, item=item)

    def _part(self, name: str, index: int, text: str) -> bytes:
        return self._of(name, index, content_index=0, part=OutputText(text))

    def _of(self, name: str, index: int, **members: Any) -> bytes:
        """An event about an output item."""
        return self._event(name, item_id=self._ids[index], output_index=index, **members)

    def _event(self, name: str, **members: Any) -> bytes:
        document = {"type": name, "sequence_number": self._number, **members}
        self._number += 1
        return b"event: %b\ndata: %b\n\n" % (name.encode(), _encode(document))
