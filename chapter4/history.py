"""What the model is shown of a conversation: items as messages, and what goes when it is too long.

`fit` keeps to this rule. Items are taken in their order, one after the other; whenever they are
over the window, they are cut to three quarters of it:

1. Outputs of tools are shortened to `SHORT` characters, except those of the newest turn.
2. The oldest turns go, each as a whole. A turn is what was asked and all that came of it, so that
   a call and its output are never apart. Messages of the system before the first turn stay.
3. If the newest turn by itself is over the window, its outputs are shortened, those of its last
   step at the end and only as far as they must. The turn stays, even if it is still too long.

What was cut for earlier items stays cut, so that the beginning of the prompt, which an engine has
cached, changes once in a quarter of a window.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from chapter4.item_messages import as_data, messages_of, run_output
from common.protocol import ChatMessage, PipelineError
from common.protocol_agent import (
    FunctionCallItem,
    FunctionOutputItem,
    Item,
    MessageItem,
    ToolRunItem,
)
from common.protocol_tools import ToolCall

from msgspec.structs import replace

__all__ = ["check_calls", "fit", "messages_of", "shortened"]

SHORT = 400
LIMITS = (1600, SHORT, 100)  # characters, for the newest turn's outputs
KEPT_SHARE = 0.75
Count = Callable[[list[ChatMessage]], int]


def shortened(item: Item, limit: int) -> Item:
    """The item; of a tool's output about `limit` characters, most of them from its beginning."""
    if isinstance(item, FunctionOutputItem):
        return replace(item, output=_short(item.output, limit))
    if isinstance(item, ToolRunItem):
        error = item.error and _short(item.error, limit)
        return replace(item, output=_short(item.output, limit), error=error)
    return item


def fit(
    history: Sequence[Item], new: Sequence[Item], *, window_tokens: int, count: Count
) -> list[Item]:
    """What of all that was said fits into the window, by the rule above.

    `count` gives the tokens of messages; that of many should be the sum of each one's, and be
    the same at the next call.
    """
    items = [*history, *new]
    tokens = [_tokens(item, count) for item in items]
    if sum(tokens) <= window_tokens:
        return items
    first = next((i for i, item in enumerate(items) if not _is_system(item)), len(items))
    kept = _Kept(sum(tokens[:first]), window_tokens, count)
    for item, size in zip(items[first:], tokens[first:], strict=True):
        kept.add(item, size)
    return [*items[:first], *(one.item for turn in kept.turns for one in turn)]


@dataclass
class _One:
    """An item of a turn, as it was and as it is shown."""

    original: Item
    item: Item
    tokens: int


@dataclass
class _Kept:
    """What is kept so far; the newest turn is the last one."""

    total: int
    window: int
    count: Count
    turns: list[list[_One]] = field(default_factory=list)
    _open: set[str] = field(default_factory=set)

    def add(self, item: Item, tokens: int) -> None:
        if isinstance(item, FunctionCallItem):
            self._open.add(item.call_id)
        elif isinstance(item, FunctionOutputItem):
            self._open.discard(item.call_id)
        goes_on = self.turns and (self._open or _is_question(self.turns[-1][-1].item))
        if not self.turns or (_is_question(item) and not goes_on):
            self.turns.append([])
        self.turns[-1].append(_One(item, item, tokens))
        self.total += tokens
        if self.total > self.window:
            self._cut(int(self.window * KEPT_SHARE))

    def _cut(self, target: int) -> None:
        for turn in self.turns[:-1]:
            self._shorten(turn, SHORT)
        while len(self.turns) > 1 and self.total > target:
            self.total -= sum(one.tokens for one in self.turns.pop(0))
        if self.total <= self.window:
            return
        newest = self.turns[-1]
        last = _last_outputs(newest)
        for limit in LIMITS:
            if self.total > target:
                self._shorten(newest[:last], limit)
        for limit in LIMITS:
            if self.total > self.window:
                self._shorten(newest[last:], limit)

    def _shorten(self, items: Sequence[_One], limit: int) -> None:
        for one in items:
            item = shortened(one.original, limit)
            if item != one.original and item != one.item:
                tokens = _tokens(item, self.count)
                if tokens < one.tokens:
                    self.total += tokens - one.tokens
                    one.item, one.tokens = item, tokens


def _last_outputs(turn: Sequence[_One]) -> int:
    """Where the outputs at the end of the turn begin that one step has got."""
    place = len(turn)
    last = turn[-1].item
    while place and isinstance(last, FunctionOutputItem | ToolRunItem):
        item = turn[place - 1].item
        if type(item) is not type(last) or getattr(item, "step", 0) != getattr(last, "step", 0):
            break
        place -= 1
    return place


def _tokens(item: Item, count: Count) -> int:
    """What the item takes by itself, a call with or without its output."""
    if isinstance(item, MessageItem):
        return count([ChatMessage(item.role, item.content)])
    if isinstance(item, FunctionOutputItem):
        return count([ChatMessage("tool", as_data(item.output))])
    call = ToolCall(item.call_id, item.name, item.arguments)
    messages = [ChatMessage("assistant", "", tool_calls=[call])]
    if isinstance(item, ToolRunItem):
        messages.append(ChatMessage("tool", as_data(run_output(item))))
    return count(messages)


def check_calls(history: Sequence[Item], new: Sequence[Item]) -> None:
    """Refuse outputs of unknown calls, and input that leaves calls of the last turn open.

    Raises:
        PipelineError: kind `invalid_request`.
    """
    last = max((i for i, item in enumerate(history) if _is_question(item)), default=0)
    known, due = _open_calls(history), _open_calls(history[last:])
    for item in new:
        if isinstance(item, FunctionCallItem):
            known.add(item.call_id)
            due.add(item.call_id)
        elif isinstance(item, FunctionOutputItem):
            if item.call_id not in known:
                message = f"No tool call found for function call output {item.call_id!r}."
                raise PipelineError("invalid_request", message, "input")
            known.discard(item.call_id)
            due.discard(item.call_id)
    if due:
        message = f"No tool output found for function call {min(due)!r}."
        raise PipelineError("invalid_request", message, "input")


def _open_calls(items: Sequence[Item]) -> set[str]:
    answered = {item.call_id for item in items if isinstance(item, FunctionOutputItem)}
    calls = {item.call_id for item in items if isinstance(item, FunctionCallItem)}
    return calls - answered


def _short(text: str, limit: int) -> str:
    """A text of at most `limit` characters and a remark; once shortened it stays as it is."""
    if len(text) <= limit + len(_remark(len(text))):
        return text
    head, tail = limit * 3 // 4, limit - limit * 3 // 4
    return text[:head] + _remark(len(text) - limit) + text[len(text) - tail :]


def _remark(characters: int) -> str:
    return f"\n[{characters} characters are left out]\n"


def _is_question(item: Item) -> bool:
    return isinstance(item, MessageItem) and item.role != "assistant"


def _is_system(item: Item) -> bool:
    return isinstance(item, MessageItem) and item.role == "system"
