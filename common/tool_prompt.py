"""A conversation with tools as the messages that a chat template takes.

A template with a part for tools gets them as they are. For any other one, such as SmolLM2's, this
module writes them out:

- The system message, the first if there is none, ends with the tools, each as a line of JSON
  between `<tools>` and `</tools>`, and with how to call one.
- A call is `<tool_call>`, a line of JSON with `name` and `arguments`, and `</tool_call>`, after
  what else the assistant says.
- Results are a user's message: each between `<tool_response>` and `</tool_response>`, those of
  calls in one message together.
"""

import hashlib
import json
from collections.abc import Iterable

from common.chat_template import call_arguments, shaped_tool
from common.protocol import ChatMessage
from common.protocol_tools import FunctionTool, ToolCall

from msgspec.structs import replace

_TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")

_INSTRUCTIONS = """\
# Tools

You can call these functions; each is described by a line of JSON:
<tools>
{tools}
</tools>

To call a function, write its name and its arguments as JSON between <tool_call> and </tool_call>:
<tool_call>
{{"name": "...", "arguments": {{...}}}}
</tool_call>"""


def written_out(messages: list[ChatMessage], tools: list[FunctionTool]) -> list[ChatMessage]:
    """The conversation for a template that knows nothing of tools."""
    written: list[ChatMessage] = []
    last: ChatMessage | None = None
    for message in messages:
        if message.role == "tool":
            response = f"<tool_response>\n{message.content}\n</tool_response>"
            if last is not None and last.role == "tool":
                written[-1] = replace(written[-1], content=f"{written[-1].content}\n{response}")
            else:
                written.append(ChatMessage("user", response))
        elif message.tool_calls:
            calls = [_call_text(call) for call in message.tool_calls]
            said = [message.content] if message.content else []
            written.append(ChatMessage("assistant", "\n".join(said + calls)))
        else:
            written.append(message)
        last = message
    if not tools:
        return written
    lines = [json.dumps(shaped_tool(tool), ensure_ascii=False) for tool in tools]
    instructions = _INSTRUCTIONS.format(tools="\n".join(lines))
    if written[:1] and written[0].role == "system":
        system = f"{written[0].content}\n\n{instructions}"
        return [ChatMessage("system", system), *written[1:]]
    return [ChatMessage("system", instructions), *written]


def _call_text(call: ToolCall) -> str:
    text = json.dumps({"name": call.name, "arguments": call_arguments(call)}, ensure_ascii=False)
    return f"<tool_call>\n{text}\n</tool_call>"


def in_first_user_message(messages: list[ChatMessage]) -> list[ChatMessage]:
    """The conversation for a template that refuses system messages."""
    if len(messages) < 2 or messages[0].role != "system" or messages[1].role != "user":
        return messages
    content = f"{messages[0].content}\n\n{messages[1].content}"
    return [ChatMessage("user", content), *messages[2:]]


def with_harmless_results(
    messages: list[ChatMessage], control_texts: Iterable[str]
) -> list[ChatMessage]:
    """The conversation with a space after the first character of each mark in a tool's result.

    Marks are the model's control tokens and the tags of calls and results: with them, what a tool
    read somewhere could end its message and begin another one's.
    """
    if all(message.role != "tool" for message in messages):
        return messages
    marks = [text for text in {*control_texts, *_TAGS} if len(text) > 1]
    return [
        replace(message, content=_harmless(message.content, marks))
        if message.role == "tool"
        else message
        for message in messages
    ]


def _harmless(content: str, marks: list[str]) -> str:
    for mark in marks:
        content = content.replace(mark, f"{mark[0]} {mark[1:]}")
    return content


def one_call_each(messages: list[ChatMessage]) -> list[ChatMessage]:
    """The conversation for a template that refuses messages with several calls (Llama 3).

    A message with each call, each followed by its result.
    """
    results = {message.tool_call_id: message for message in messages if message.role == "tool"}
    split: list[ChatMessage] = []
    moved: set[str | None] = set()
    for message in messages:
        if len(message.tool_calls) > 1:
            for number, call in enumerate(message.tool_calls):
                said = "" if number else message.content
                split.append(ChatMessage("assistant", said, [call]))
                if (result := results.get(call.id)) is not None:
                    split.append(result)
                    moved.add(call.id)
        elif message.role != "tool" or message.tool_call_id not in moved:
            split.append(message)
    return split


def with_ids_of_nine(messages: list[ChatMessage]) -> list[ChatMessage]:
    """The conversation for a template that takes ids of nine letters and digits only (Mistral)."""
    return [
        replace(
            message,
            tool_calls=[replace(call, id=_nine(call.id)) for call in message.tool_calls],
            tool_call_id=message.tool_call_id and _nine(message.tool_call_id),
        )
        for message in messages
    ]


def _nine(call_id: str) -> str:
    if len(call_id) == 9 and call_id.isascii() and call_id.isalnum():
        return call_id
    return hashlib.sha256(call_id.encode()).hexdigest()[:9]
