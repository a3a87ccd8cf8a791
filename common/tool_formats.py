"""How models write calls of tools, by family, and the parsers of that.

The formats are those of the models' own chat templates:
- `hermes` (Hermes 2 Pro and 3, Qwen 2.5 and 3, and ours for a model that knows none):
  `<tool_call>` {"name": ..., "arguments": {...}} `</tool_call>`, for each call
- `qwen_xml` (Qwen3-Coder): `<tool_call><function=NAME><parameter=KEY>` value `</parameter>`
  `</function></tool_call>`
- `llama` (Llama 3.1 to 3.3): {"name": ..., "parameters": {...}}, several with `;` between them, at
  the message's begin or after `<|python_tag|>`
- `mistral`: `[TOOL_CALLS]` [{"name": ..., "arguments": {...}}, ...], or since 2025, for each call,
  `[TOOL_CALLS]NAME[ARGS]{...}`
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from common.tool_json import NotJsonError, WrittenCall, calls_in, is_json, value_end

Tools = Mapping[str, dict[str, Any]]
"""The parameters' schemas of the tools that may be called, by name."""


@dataclass(frozen=True)
class Found:
    """The text up to `end` is a whole: of `calls`, or, without any, of nothing but text."""

    end: int
    calls: list[WrittenCall]


Parser = Callable[[str, Tools, bool], Found | None]
"""What a text that begins with one of the format's `opens` is; None: that is not certain yet.

More text never changes what is certain. With True the text is over.
"""


@dataclass(frozen=True)
class ToolFormat:
    """A family's format.

    `opens` are what calls begin with; `bare`: one may also begin the message, with `{`. `marks` are
    control tokens in calls, if the model has them. Forced calls are made to follow `prefill`, or
    `named_prefill` with the tool's name, and have their arguments under `arguments_key`; `array`:
    the model's calls are an array. `ids_of_nine`: the template takes no other ids than of nine
    letters and digits. `separators` stand between calls.
    """

    name: str
    parse: Parser
    opens: tuple[str, ...]
    prefill: str
    named_prefill: str
    marks: tuple[str, ...] = ()
    arguments_key: str = "arguments"
    array: bool = False
    bare: bool = False
    ids_of_nine: bool = False
    separators: str = " \t\r\n"


def format_of(template: str) -> ToolFormat | None:
    """The format that a chat template teaches; None if it is not one of those here."""
    if "[TOOL_CALLS]" in template:
        return MISTRAL_ARGS if "[ARGS]" in template else MISTRAL
    if "<function=" in template:
        return QWEN_XML
    if "<tool_call>" in template:
        return HERMES
    if "<|python_tag|>" in template or ("<|eot_id|>" in template and '"parameters"' in template):
        return LLAMA
    return None


def _json_calls(text: str, start: int, tools: Tools, over: bool) -> Found | None:
    """The object, or array of objects, that begins at `start`, as calls."""
    end = value_end(text, start)
    if end is None:
        return Found(len(text), []) if over else None
    try:
        calls = calls_in(text[start:end])
    except NotJsonError:
        return Found(end, [])
    known = all(call.name in tools for call in calls)
    return Found(end, calls if known else [])


def _closed(found: Found | None, text: str, tag: str, over: bool) -> Found | None:
    """With the closing tag, if there is one; it may be left out."""
    if found is None or (found.end == len(text) and over):
        return found
    rest = text[found.end :].lstrip()
    if rest.startswith(tag):
        return Found(len(text) - len(rest) + len(tag), found.calls)
    if tag.startswith(rest):
        return Found(len(text), found.calls) if over else None
    return found


def _parse_hermes(text: str, tools: Tools, over: bool) -> Found | None:
    opening = "<tool_call>"
    body = text[len(opening) :].lstrip() if text.startswith(opening) else text
    start = len(text) - len(body)
    if body.startswith("{"):
        return _closed(_json_calls(text, start, tools, over), text, "</tool_call>", over)
    if body.startswith("<function="):
        return _closed(_xml_call(text, start, tools, over), text, "</tool_call>", over)
    if "<function=".startswith(body):
        return Found(len(text), []) if over else None
    return Found(len(opening), [])


_FUNCTION = re.compile(r"<function=([^<>\n]*)>")
_PARAMETER = re.compile(r"\s*<parameter=([^<>\n]*)>(.*?)</parameter>", re.DOTALL)
_FUNCTION_END = re.compile(r"\s*</function>")


def _xml_call(text: str, start: int, tools: Tools, over: bool) -> Found | None:
    function = _FUNCTION.match(text, start)
    if function is None:
        undecided = ">" not in text[start:] and "\n" not in text[start:]
        if undecided:
            return Found(len(text), []) if over else None
        return Found(start + len("<function="), [])
    name = function[1].strip()
    position = function.end()
    values: dict[str, str] = {}
    while (parameter := _PARAMETER.match(text, position)) is not None:
        values[parameter[1].strip()] = parameter[2].removeprefix("\n").removesuffix("\n")
        position = parameter.end()
    end = _FUNCTION_END.match(text, position)
    if end is None:
        rest = text[position:].lstrip()
        begun = rest.startswith("<parameter=") or "<parameter=".startswith(rest)
        if begun or "</function>".startswith(rest):
            return Found(len(text), []) if over else None
        return Found(position, [])
    if name not in tools:
        return Found(end.end(), [])
    schemas = tools[name].get("properties", {})
    members = (f"{_quoted(key)}: {_json(value, schemas.get(key))}" for key, value in values.items())
    call = WrittenCall(name, f"{{{', '.join(members)}}}")
    return Found(end.end(), [call] if call.is_json() else [])


def _json(value: str, schema: Any) -> str:
    """A parameter's text as JSON: what it is, unless its schema says that it is a string."""
    is_text = isinstance(schema, dict) and schema.get("type") == "string"
    return value.strip() if not is_text and is_json(value) else _quoted(value)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _parse_llama(text: str, tools: Tools, over: bool) -> Found | None:
    opening = "<|python_tag|>"
    body = text[len(opening) :].lstrip() if text.startswith(opening) else text
    if body.startswith("{"):
        return _json_calls(text, len(text) - len(body), tools, over)
    if not body and not over:
        return None
    return Found(len(opening), [])


_MISTRAL_NAME = re.compile(r"\s*([\w.-]+)(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?\s*(?=\{)")
_MISTRAL_NAME_BEGUN = re.compile(r"\s*(?:[\w.-]+(?:\[[\w\]]*)*\s*)?")


def _parse_mistral(text: str, tools: Tools, over: bool) -> Found | None:
    opening = "[TOOL_CALLS]"
    body = text[len(opening) :].lstrip()
    start = len(text) - len(body)
    if body.startswith("["):
        return _json_calls(text, start, tools, over)
    named = _MISTRAL_NAME.match(text, start)
    if named is not None:
        end = value_end(text, named.end())
        if end is None:
            return Found(len(text), []) if over else None
        call = WrittenCall(named[1], text[named.end() : end])
        return Found(end, [call] if call.name in tools and call.is_json() else [])
    if _MISTRAL_NAME_BEGUN.fullmatch(text, start):
        return Found(len(text), []) if over else None
    return Found(len(opening), [])


HERMES = ToolFormat(
    "hermes",
    _parse_hermes,
    ("<tool_call>",),
    prefill="<tool_call>\n",
    named_prefill='<tool_call>\n{"name": %(json)s, "arguments": ',
    marks=("<tool_call>", "</tool_call>"),
)
# What a grammar of JSON can force is not this format; Qwen knows the other one, too.
QWEN_XML = ToolFormat(
    "qwen_xml",
    _parse_hermes,
    ("<tool_call>", "<function="),
    prefill="<tool_call>\n",
    named_prefill='<tool_call>\n{"name": %(json)s, "arguments": ',
    marks=("<tool_call>", "</tool_call>"),
)
LLAMA = ToolFormat(
    "llama",
    _parse_llama,
    ("<|python_tag|>",),
    prefill="",
    named_prefill='{"name": %(json)s, "parameters": ',
    marks=("<|python_tag|>",),
    arguments_key="parameters",
    bare=True,
    separators=" \t\r\n;",
)
MISTRAL = ToolFormat(
    "mistral",
    _parse_mistral,
    ("[TOOL_CALLS]",),
    prefill="[TOOL_CALLS]",
    named_prefill='[TOOL_CALLS][{"name": %(json)s, "arguments": ',
    marks=("[TOOL_CALLS]",),
    array=True,
    ids_of_nine=True,
)
MISTRAL_ARGS = ToolFormat(
    "mistral_args",
    _parse_mistral,
    ("[TOOL_CALLS]",),
    prefill="[TOOL_CALLS]",
    named_prefill="[TOOL_CALLS]%(name)s[ARGS]",
    marks=("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
    array=True,
    ids_of_nine=True,
)
