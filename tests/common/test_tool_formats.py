"""Calls in free text, in every family's format, whatever the pieces in which the text arrives."""

import json
import string

from common.tool_formats import (
    HERMES,
    LLAMA,
    MISTRAL,
    MISTRAL_ARGS,
    QWEN_XML,
    ToolFormat,
    format_of,
)
from common.tool_stream import FreeCalls

import pytest
from hypothesis import given
from hypothesis import strategies as st

TOOLS = {
    "f": {"properties": {"a": {"type": "integer"}, "s": {"type": "string"}}},
    "get_weather": {"properties": {"city": {"type": "string"}}},
}

Calls = list[tuple[str, str]]


def read(
    format_: ToolFormat, pieces: list[str], *, parallel: bool = True
) -> tuple[str, Calls, list[str]]:
    """The text, the calls, and what of the text was shown by each piece."""
    reader = FreeCalls(format_, TOOLS, parallel=parallel)
    shown: list[str] = []
    calls: Calls = []
    for piece, over in [*((piece, False) for piece in pieces), ("", True)]:
        text, deltas = reader.push(piece, over=over)
        shown.append(text)
        for delta in deltas:
            assert delta.index == len(calls)
            assert (delta.id or "").startswith("call_")
            assert delta.name is not None
            calls.append((delta.name, delta.arguments))
    assert reader.calls == len(calls)
    return "".join(shown), calls, shown


F1 = ("f", '{"a": 1}')
F2 = ("f", '{"a": 2}')
H1, H2 = (f'<tool_call>\n{{"name": "f", "arguments": {{"a": {n}}}}}\n</tool_call>' for n in (1, 2))
X1 = "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>"
X2 = X1.replace("1", "2")
L1, L2 = (f'{{"name": "f", "parameters": {{"a": {n}}}}}' for n in (1, 2))
J1, J2 = (f'{{"name": "f", "arguments": {{"a": {n}}}}}' for n in (1, 2))
TRICKY = {"s": '}] "</tool_call>" \\ <tool_call>{ \u00e9\u6f22\U0001f469 \n```\n [TOOL_CALLS]'}
TRICKY_TEXT = json.dumps(TRICKY, ensure_ascii=False)
NESTED = '{"s": {"x": [{"y": {}}, []], "z": "{{{["}}'

GOLDEN: list[tuple[ToolFormat, str, str, Calls]] = [
    # One call, whole, with text before and after it.
    (HERMES, H1, "", [F1]),
    (HERMES, f"Let me see.\n{H1}", "Let me see.\n", [F1]),
    (HERMES, f"{H1}\nDone.", "\nDone.", [F1]),
    (HERMES, f"\n\n{H1}\n", "", [F1]),
    (HERMES, J1.join(["<tool_call>", "</tool_call>"]), "", [F1]),
    (QWEN_XML, X1, "", [F1]),
    (QWEN_XML, f"Let me see.\n{X1}", "Let me see.\n", [F1]),
    (QWEN_XML, f"{X1}\nDone.", "\nDone.", [F1]),
    (LLAMA, L1, "", [F1]),
    (LLAMA, f" \n{L1}", "", [F1]),
    (LLAMA, f"Let me see. <|python_tag|>{L1}", "Let me see. ", [F1]),
    (LLAMA, f"{L1} Done.", " Done.", [F1]),
    (LLAMA, J1, "", [F1]),
    (MISTRAL, f"[TOOL_CALLS] [{J1}]", "", [F1]),
    (MISTRAL, f"Let me see.[TOOL_CALLS][{J1}]", "Let me see.", [F1]),
    (MISTRAL, f"[TOOL_CALLS][{J1}] Done.", " Done.", [F1]),
    (MISTRAL_ARGS, '[TOOL_CALLS]f[ARGS]{"a": 1}', "", [F1]),
    (MISTRAL_ARGS, 'Let me see.[TOOL_CALLS]f[CALL_ID]x12345678[ARGS]{"a": 1}', "Let me see.", [F1]),
    (MISTRAL_ARGS, '[TOOL_CALLS]f{"a": 1} Done.', " Done.", [F1]),
    # Two calls.
    (HERMES, f"{H1}\n{H2}", "", [F1, F2]),
    (HERMES, f"First {H1} then {H2}.", "First  then .", [F1, F2]),
    (QWEN_XML, f"{X1}\n{X2}", "", [F1, F2]),
    (LLAMA, f"{L1}; {L2}", "", [F1, F2]),
    (LLAMA, f"<|python_tag|>{L1};{L2}", "", [F1, F2]),
    (LLAMA, f"{L1}\n{L2}", "", [F1, F2]),
    (LLAMA, f"{L1}; and so on", "; and so on", [F1]),
    (MISTRAL, f"[TOOL_CALLS] [{J1}, {J2}]", "", [F1, F2]),
    (MISTRAL_ARGS, '[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]f[ARGS]{"a": 2}', "", [F1, F2]),
    # What JSON can hide in a string, or nest.
    (HERMES, f'<tool_call>{{"name": "f", "arguments": {TRICKY_TEXT}}}</tool_call>!', "!",
     [("f", TRICKY_TEXT)]),
    (LLAMA, f'{{"name": "f", "parameters": {TRICKY_TEXT}}}', "", [("f", TRICKY_TEXT)]),
    (MISTRAL, f'[TOOL_CALLS][{{"name": "f", "arguments": {TRICKY_TEXT}}}]', "",
     [("f", TRICKY_TEXT)]),
    (MISTRAL_ARGS, f"[TOOL_CALLS]f[ARGS]{TRICKY_TEXT}", "", [("f", TRICKY_TEXT)]),
    (HERMES, f'<tool_call>{{"name": "f", "arguments": {NESTED}}}</tool_call>', "", [("f", NESTED)]),
    (QWEN_XML, "<tool_call><function=f><parameter=s>\n{} \u6f22 </function>\n</parameter>"
     "<parameter=a>[1]</parameter></function></tool_call>", "",
     [("f", '{"s": "{} \u6f22 </function>", "a": [1]}')]),
    # What is no JSON, or cannot be sent on, is text.
    *((QWEN_XML, X1.replace("1", value), "", [("f", json.dumps({"a": value}))])
      for value in ("NaN", "-Infinity", "1e999", '"\\ud800"', "[1, NaN]", "01")),
    # Arguments left out, null, or as the text of an object.
    (HERMES, '<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
    (HERMES, '<tool_call>{"name": "f", "arguments": null}</tool_call>', "", [("f", "{}")]),
    (HERMES, '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [F1]),
    (QWEN_XML, "<tool_call><function=f></function></tool_call>", "", [("f", "{}")]),
    # The closing tag left out; the opening one as Qwen3-Coder sometimes does.
    (HERMES, f"<tool_call>{J1}", "", [F1]),
    (HERMES, f"<tool_call>{J1}\n</tool", "", [F1]),
    (HERMES, f"<tool_call>{J1} and <b>", " and <b>", [F1]),
    (QWEN_XML, X1.removeprefix("<tool_call>\n"), "", [F1]),
]  # fmt: skip

UNKNOWN = '{"name": "rm", "arguments": {"a": 1}}'
NO_CALLS: list[tuple[ToolFormat, str]] = [
    # Unknown names.
    (HERMES, f"x <tool_call>{UNKNOWN}</tool_call> y"),
    (QWEN_XML, X1.replace("=f", "=rm")),
    (LLAMA, UNKNOWN),
    (LLAMA, f"<|python_tag|>{UNKNOWN}"),
    (MISTRAL, f"[TOOL_CALLS][{UNKNOWN}]"),
    (MISTRAL, f"[TOOL_CALLS][{J1}, {UNKNOWN}]"),
    (MISTRAL_ARGS, '[TOOL_CALLS]rm[ARGS]{"a": 1}'),
    (HERMES, '<tool_call>{"name": "F", "arguments": {}}</tool_call>'),
    # Broken JSON, or JSON that is no call.
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": 1,}}</tool_call>'),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>'),
    (HERMES, "<tool_call>{'name': 'f', 'arguments': {}}</tool_call>"),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": 1</tool_call>'),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"s": "unended</tool_call>'),
    (HERMES, '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
    (HERMES, '<tool_call>{"name": ["f"], "arguments": {}}</tool_call>'),
    (HERMES, '<tool_call>{"arguments": {}}</tool_call>'),
    (HERMES, "<tool_call>f(1)</tool_call>"),
    (HERMES, "<tool_call>"),
    (HERMES, "<tool_cal"),
    (HERMES, "a < b, <tool>, <tool_call"),
    (QWEN_XML, "<tool_call><function=f><parameter=a>1</function></tool_call>"),
    (QWEN_XML, "<tool_call><function=f>1</function></tool_call>"),
    (QWEN_XML, "<function=f"),
    (QWEN_XML, "<function=f\n>"),
    (LLAMA, '{"name": "f", "parameters": {"a": }}'),
    (LLAMA, '{"city": "Paris"}'),
    (LLAMA, "<|python_tag|>print(1)"),
    (LLAMA, f"So: {L1}"),
    (LLAMA, f"So:\n{L1}"),
    (MISTRAL, "[TOOL_CALLS][]"),
    (MISTRAL, "[TOOL_CALLS] none"),
    (MISTRAL_ARGS, "[TOOL_CALLS]f[ARGS]"),
    (MISTRAL_ARGS, '[TOOL_CALLS]f[ARGS]{"a": 1'),
    (MISTRAL_ARGS, '[TOOL_CALLS]f[ARGS]{"a" 1}'),
    (MISTRAL_ARGS, "[TOOL_CALLS]f is what I call"),
    # In code.
    (HERMES, f"Write:\n```\n{H1}\n```\nSo."),
    (HERMES, f"```xml\n{H1}"),
    (HERMES, f"  ~~~\n{H1}\n~~~"),
    (HERMES, f"Write `{H1}`."),
    (QWEN_XML, f"```\n{X1}\n```"),
    (MISTRAL, f"```\n[TOOL_CALLS][{J1}]\n```"),
    (LLAMA, f"```\n<|python_tag|>{L1}\n```"),
    # Nothing.
    (HERMES, ""),
    (HERMES, " \n"),
    (LLAMA, " ; "),
    (HERMES, "\u6f22\U0001f469 Plain text."),
]


@pytest.mark.parametrize(("format_", "text", "content", "calls"), GOLDEN)
def test_calls_are_found_whole_and_split_anywhere(
    format_: ToolFormat, text: str, content: str, calls: Calls
) -> None:
    assert read(format_, [text])[:2] == (content, calls)
    assert read(format_, list(text))[:2] == (content, calls)
    for cut in range(1, len(text)):
        assert read(format_, [text[:cut], text[cut:]])[:2] == (content, calls), text[:cut]


@pytest.mark.parametrize(("format_", "text"), NO_CALLS)
def test_what_is_no_call_is_text_to_the_last_character(format_: ToolFormat, text: str) -> None:
    assert read(format_, [text])[:2] == (text, [])
    assert read(format_, list(text))[:2] == (text, [])
    for cut in range(1, min(len(text), 300)):
        assert read(format_, [text[:cut], text[cut:]])[:2] == (text, []), text[:cut]


def test_a_call_that_is_nested_too_deep_is_text() -> None:
    text = '<tool_call>{"name": "f", "arguments": ' + '{"s": ' * 1200 + "1" + "}" * 1201
    assert read(HERMES, [text])[:2] == (text, [])
    assert read(HERMES, [text[:5000], text[5000:]])[:2] == (text, [])


def test_a_call_after_a_code_block_counts() -> None:
    text = f"```\n{H1}\n```\n"
    assert read(HERMES, [text + H2])[:2] == (text, [F2])


def test_text_is_shown_at_once_unless_a_call_may_begin_with_it() -> None:
    shown = read(HERMES, ["One ", "two <", "b> three <tool", "_call> four"])[2]
    assert shown == ["One ", "two ", "<b> three ", "<tool_call> four", ""]


def test_without_parallel_calls_the_first_call_is_the_only_one() -> None:
    for format_, text in (
        (HERMES, f"Now {H1}{H2} and"),
        (MISTRAL, f"Now [TOOL_CALLS][{J1}, {J2}]"),
        (LLAMA, f"Now <|python_tag|>{L1}; {L2}"),
    ):
        assert read(format_, [text], parallel=False)[:2] == ("Now ", [F1])
        assert read(format_, list(text), parallel=False)[:2] == ("Now ", [F1])


PARTS = {
    format_.name: [*format_.opens, *words, *string.ascii_lowercase[:3], "\n", " ", "```", "\u6f22"]
    for format_, words in (
        (HERMES, [H1, J1, UNKNOWN, "</tool_call>", '"', "{", "}", "\\", "<", "`"]),
        (QWEN_XML, [X1, J1, "<function=f>", "</function>", "<parameter=a>", "</parameter>", "<"]),
        (LLAMA, [L1, UNKNOWN, ";", '"', "{", "}"]),
        (MISTRAL, [f"[{J1}]", f"[{J1},{J2}]", J1, UNKNOWN, '"', "[", "]"]),
        (MISTRAL_ARGS, ["f[ARGS]", '{"a": 1}', "f", "[CALL_ID]", "rm[ARGS]{}", '"', "[", "}"]),
    )
}


@pytest.mark.parametrize("format_", [HERMES, QWEN_XML, LLAMA, MISTRAL, MISTRAL_ARGS])
@given(data=st.data())
def test_pieces_make_no_difference(format_: ToolFormat, data: st.DataObject) -> None:
    """And no character is lost: what is not in a call, or beside one, is shown."""
    parts = data.draw(st.lists(st.sampled_from(PARTS[format_.name]), max_size=12))
    parallel = data.draw(st.booleans())
    text = "".join(parts)
    whole = read(format_, [text], parallel=parallel)[:2]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(format_, pieces, parallel=parallel)[:2] == whole
    assert read(format_, list(text), parallel=parallel)[:2] == whole
    if not whole[1]:
        assert whole[0] == text


@pytest.mark.parametrize(
    ("template", "format_"),
    [
        ("{% if tools %}<tool_call>{{ tool_call | tojson }}</tool_call>{% endif %}", HERMES),
        ("<tool_call>\n<function=' + tool_call.name", QWEN_XML),
        ("{{ '<|python_tag|>' }} \"parameters\"", LLAMA),
        ("{{ '[TOOL_CALLS]' }}", MISTRAL),
        ("{{ '[TOOL_CALLS]' + name + '[ARGS]' }}", MISTRAL_ARGS),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", None),
    ],
)
def test_the_family_is_known_by_its_template(template: str, format_: ToolFormat | None) -> None:
    assert format_of(template) is format_
