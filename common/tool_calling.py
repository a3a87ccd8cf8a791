"""Everything about tools in one request of the processor: its prompt, its grammar, its calls."""

import json
from collections import deque
from contextlib import suppress

from common.chat_template import call_arguments
from common.protocol import (
    ChatMessage,
    PipelineError,
    PositionLogprobs,
    SamplingParams,
    TextOutput,
)
from common.protocol_agent import ToolProcessRequest
from common.text import TextModel
from common.tool_formats import HERMES, format_of
from common.tool_grammar import MAX_FORCED_CALLS, arguments_schema, calls_schema
from common.tool_prompt import (
    in_first_user_message,
    one_call_each,
    with_harmless_results,
    with_ids_of_nine,
    written_out,
)
from common.tool_stream import CallReader, ForcedCalls, FreeCalls, NamedCall, is_named

from msgspec.structs import replace


def has_tools(request: ToolProcessRequest) -> bool:
    """Whether there is anything about tools in the request.

    Raises:
        PipelineError: kind `invalid_request`; its tools and its choice do not go together.
    """
    names = [tool.name for tool in request.tools]
    choice = request.tool_choice
    for name in names:
        if names.count(name) > 1:
            raise PipelineError("invalid_request", f"There are two tools '{name}'.", "tools")
    if choice.name is not None and choice.name not in names:
        message = f"There is no tool '{choice.name}'; there are: {', '.join(names) or 'none'}."
        raise PipelineError("invalid_request", message, "tool_choice")
    if choice.mode == "required" and not names:
        message = "A call is required, but there are no tools."
        raise PipelineError("invalid_request", message, "tool_choice")
    if names and request.messages is None:
        raise PipelineError("invalid_request", "Tools are for chats, not for prompts.", "tools")
    spoken_of = any(m.tool_calls or m.role == "tool" for m in request.messages or [])
    return bool(names) or spoken_of


class ToolCalling:
    """What tools make of a request that `has_tools`.

    In a call that is forced, stop strings and stop tokens do not count: they are for text, and
    would leave arguments that are not JSON. Items that complete a call have no log probabilities.
    """

    def __init__(self, model: TextModel, request: ToolProcessRequest) -> None:
        """Raises a `PipelineError`, kind `invalid_request`, for what cannot be forced."""
        self.stop = request.stop
        self._sampling = request.sampling
        self._parallel = request.parallel_tool_calls
        self._name: str | None = None  # of the only tool that can be called, if it is forced
        self._model = model
        self._messages = request.messages or []
        self._tools = request.tools
        template = model.chat_template
        own = format_of(template.source) if template and template.takes_tools else None
        self._written_out = own is None
        self._format = own or HERMES
        self._prefill = ""
        self._reader: CallReader | None = None
        self._forced = request.tool_choice.mode == "required" or request.tool_choice.name
        if self._forced:
            self._reader = self._force(request)
        elif request.tools and request.tool_choice.mode == "auto":
            if request.sampling.json_schema is not None:
                message = "A format for the answer needs tool_choice 'none', or a forced call."
                raise PipelineError("invalid_request", message, "tool_choice")
            self._reader = FreeCalls(
                self._format,
                {tool.name: tool.parameters or {} for tool in request.tools},
                parallel=request.parallel_tool_calls,
            )
        self.visible = () if self._reader is None else self._format.marks
        self._made = 0  # characters
        self._logprobs: deque[tuple[int, list[PositionLogprobs]]] = deque()  # by their text's end

    def _force(self, request: ToolProcessRequest) -> CallReader:
        for field in ("min_tokens", "ignore_eos"):
            if getattr(request.sampling, field):
                message = f"'{field}' does not go with a forced call."
                raise PipelineError("invalid_request", message, field)
        self.stop = []
        self._name = request.tool_choice.name
        if self._name is None and len(self._tools) == 1 and not request.parallel_tool_calls:
            self._name = self._tools[0].name
        if self._name is None:
            self._prefill = self._format.prefill
            return ForcedCalls({tool.name: {} for tool in self._tools})
        self._prefill = self._named_prefill(self._name)
        return NamedCall(self._name)

    def _named_prefill(self, name: str) -> str:
        return self._format.named_prefill % {"name": name, "json": json.dumps(name)}

    def sampling(self, room: int) -> SamplingParams:
        """With the grammar of calls that are forced, where `room` tokens fit into the context.

        Raises:
            PipelineError: kind `invalid_request`; see `tool_schema.tightened`.
        """
        sampling = self._sampling
        if not self._forced:
            return sampling
        tokens = room if sampling.max_tokens is None else min(room, sampling.max_tokens)
        if self._name is not None:
            [tool] = [tool for tool in self._tools if tool.name == self._name]
            schema = arguments_schema(tool, tokens)
        else:
            key, array = self._format.arguments_key, self._format.array
            most = MAX_FORCED_CALLS if self._parallel else 1 if array else None
            schema = calls_schema(self._tools, key, tokens, most=most)
        return replace(sampling, json_schema=schema, stop_token_ids=[])

    def refusal(self, error: PipelineError) -> PipelineError | None:
        """What to say of an engine's refusal of the schema, if that is one of a forced call."""
        if not self._forced or error.info.param != "json_schema":
            return None
        message = f"A call cannot be forced by the tools' parameters: {error.info.message}"
        return PipelineError(error.info.kind, message, "tools")

    def token_ids(self) -> list[int]:
        """The prompt, with the tokens that the conversation had while it was made.

        A call that `is_named` was made after a prompt that ended right before its arguments, and so
        did a token. In the whole text it would not: the blank of `": {"` is of one token with `{`.

        Raises:
            PipelineError: see `TextModel.render_chat`.
        """
        messages = self._harmless()
        prompt = self._rendered(messages) + self._prefill
        parts: list[str] = []
        done = 0
        for number, message in enumerate(messages):
            if not number or [is_named(call.id) for call in message.tool_calls] != [True]:
                continue
            [call] = message.tool_calls
            arguments = json.dumps(call_arguments(call), ensure_ascii=False)
            with suppress(PipelineError):  # then it was not made after this
                before = self._rendered(messages[:number]) + self._named_prefill(call.name)
                if len(before) >= done and prompt.startswith(before + arguments):
                    parts += [prompt[done : len(before)], arguments]
                    done = len(before) + len(arguments)
        return self._model.encode_parts([*parts, prompt[done:]])

    def render(self) -> str:
        """The prompt's text, with the beginning of the call that is forced.

        Raises:
            PipelineError: see `TextModel.render_chat`.
        """
        return self._rendered(self._harmless()) + self._prefill

    def _harmless(self) -> list[ChatMessage]:
        return with_harmless_results(self._messages, self._model.tokenizer.control_ids)

    def _rendered(self, messages: list[ChatMessage]) -> str:
        tools = None if self._written_out else self._tools
        if self._written_out:
            messages = written_out(messages, self._tools)
            other = in_first_user_message(messages)
        else:
            messages = with_ids_of_nine(messages) if self._format.ids_of_nine else messages
            other = one_call_each(messages)
        try:
            return self._model.render_chat(messages, tools)
        except PipelineError:
            if other == messages:
                raise
            return self._model.render_chat(other, tools)

    @property
    def done(self) -> bool:
        """The answer is over, though the engine may go on."""
        return self._reader is not None and self._reader.done

    def push(self, output: TextOutput) -> TextOutput:
        """An item of the answer with its calls apart from its text."""
        if self._reader is None:
            return output
        over = output.finish_reason is not None
        self._made += len(output.text)
        if output.logprobs:
            self._logprobs.append((self._made, output.logprobs))
        output.text, output.tool_calls = self._reader.push(output.text, over=over)
        decided = self._made - self._reader.undecided()
        released: list[PositionLogprobs] = []
        while self._logprobs and self._logprobs[0][0] <= decided:
            released += self._logprobs.popleft()[1]
        output.logprobs = None if output.tool_calls or self._forced else released or None
        if self.done or (output.finish_reason == "stop" and self._reader.calls):
            output.finish_reason = "tool_calls"
        return output
