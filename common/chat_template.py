"""A conversation as the text that a model was trained on, by the model's own template.

The environment is that of Hugging Face, for which templates are written:
https://huggingface.co/docs/transformers/chat_templating_writing.
"""

import json
from datetime import datetime
from typing import Any, NoReturn

from common.protocol import ChatMessage, PipelineError
from common.protocol_tools import FunctionTool, ToolCall

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import msgspec

_SMOLLM2_DEFAULT_SYSTEM_PROMPT = """\
{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
' }}{% endif %}"""


def without_default_system_prompt(source: str) -> str:
    """SmolLM2's own template without the system prompt it adds where none is given.

    With that prompt the 135M model, decoding greedily, continues "What is the capital of
    France?" with "L'Étoile, la Marseillaise, la femme, …"; with no system message at all it
    says "The capital of France is Paris." Of seven short questions, no system message gave
    the most sensible answers, ahead of an empty one and of "You are a helpful assistant."
    Other templates are returned as they are.
    """
    return source.replace(_SMOLLM2_DEFAULT_SYSTEM_PROMPT, "")


class ChatTemplate:
    """A compiled jinja2 template; it comes with a model, so it runs in a sandbox.

    `takes_tools`: it has a part for tools.
    """

    def __init__(self, source: str, *, bos_token: str = "", eos_token: str = "") -> None:
        """Compile.

        Raises:
            jinja2.TemplateSyntaxError: the source is not valid jinja2.
        """
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self._template = environment.from_string(source)
        self.source = source
        self.takes_tools = "tools" in jinja2.meta.find_undeclared_variables(
            environment.parse(source)
        )
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}

    def render(self, messages: list[ChatMessage], tools: list[FunctionTool] | None = None) -> str:
        """The prompt whose continuation is the assistant's next message.

        Tools and their calls have the shape that Hugging Face gives them:
        https://huggingface.co/docs/transformers/chat_extras.

        Raises:
            PipelineError: kind `invalid_request`; the template refuses these messages, two
                user messages in a row, say.
        """
        try:
            return self._template.render(
                messages=_shaped(messages),
                add_generation_prompt=True,
                tools=[shaped_tool(tool) for tool in tools] if tools else None,
                documents=None,
                **self._tokens,
            )
        except jinja2.TemplateError as error:
            message = f"The model's chat template refuses the messages: {error}"
            raise PipelineError("invalid_request", message, "messages") from error


def shaped_tool(tool: FunctionTool) -> dict[str, Any]:
    """The tool as templates expect it, and OpenAI."""
    parameters = tool.parameters or {"type": "object", "properties": {}}
    function = {"name": tool.name, "description": tool.description, "parameters": parameters}
    return {"type": "function", "function": function}


def _shaped(messages: list[ChatMessage]) -> list[dict[str, Any]]:
    names = {call.id: call.name for message in messages for call in message.tool_calls}
    shaped = []
    for message in messages:
        fields: dict[str, Any] = msgspec.to_builtins(message)
        if message.tool_calls:
            fields["tool_calls"] = [_shaped_call(call) for call in message.tool_calls]
        if message.tool_call_id in names:
            fields["name"] = names[message.tool_call_id]
        shaped.append(fields)
    return shaped


def _shaped_call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call_arguments(call)}
    return {"id": call.id, "type": "function", "function": function}


def call_arguments(call: ToolCall) -> dict[str, Any]:
    """The arguments of a call in the conversation.

    Raises:
        PipelineError: kind `invalid_request`; they are not a JSON object.
    """
    try:
        text = json.dumps(json.loads(call.arguments), ensure_ascii=False)
        # Half of a surrogate pair can be written as JSON, but is no text that has tokens.
        arguments = json.loads(text.encode(errors="replace"))
    except (ValueError, RecursionError) as error:
        arguments = error
    if not isinstance(arguments, dict):
        message = f"The arguments of the call {call.id!r} must be the text of a JSON object."
        raise PipelineError("invalid_request", message, "messages")
    return arguments


class _Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks text for training; here it is only text."""

    tags = {"generation"}  # noqa: RUF012 (the base class is declared so)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format_: str) -> str:
    return datetime.now().strftime(format_)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes <, > and & for HTML, which prompts are not.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
