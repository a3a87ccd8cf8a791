"""One answer of the model, as events while it comes and as items of the run."""

from collections.abc import Mapping

from common.protocol import TextOutput
from common.protocol_agent import (
    AgentEvent,
    CallDelta,
    FunctionCallItem,
    ItemDone,
    MessageItem,
    TextDelta,
    ToolRunItem,
)


class Step:
    """Answer number `number`, which becomes the run's output items from number `first` on.

    `servers` says which calls are the agent's to run, by name; the others are the caller's. Of
    a `draft` nothing is told but its calls.
    """

    def __init__(self, number: int, first: int, servers: Mapping[str, str], *, draft: bool) -> None:
        self._number = number
        self.next_index = first
        self.text = ""
        self.calls: dict[int, FunctionCallItem | ToolRunItem] = {}  # by their output index
        self._servers = servers
        self._draft = draft
        self._text_index: int | None = None
        self._index: dict[int, int] = {}  # of an output item, by the call's in this answer

    def push(self, output: TextOutput) -> list[AgentEvent]:
        """What the item adds."""
        events: list[AgentEvent] = []
        if output.text:
            self.text += output.text
            if not self._draft:
                if self._text_index is None:
                    self._text_index = self._take_index()
                events.append(TextDelta(self._text_index, output.text))
        for piece in output.tool_calls:
            if piece.index not in self._index:
                name, call_id = piece.name or "", piece.id or ""
                index = self._index[piece.index] = self._take_index()
                server = self._servers.get(name)
                self.calls[index] = (
                    FunctionCallItem(call_id, name, "", step=self._number)
                    if server is None
                    else ToolRunItem(call_id, server, name, "", step=self._number)
                )
                events.append(CallDelta(index, piece.arguments, call_id, name, server))
            else:
                index = self._index[piece.index]
                events.append(CallDelta(index, piece.arguments))
            self.calls[index].arguments += piece.arguments
        return events

    def message(self) -> ItemDone | None:
        """What it said, unless that was nothing or a draft."""
        if self._text_index is None:
            return None
        return ItemDone(self._text_index, MessageItem("assistant", self.text))

    def _take_index(self) -> int:
        self.next_index += 1
        return self.next_index - 1
