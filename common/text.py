"""What a processor needs of a model: its tokenizer and its chat template."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from common.chat_template import ChatTemplate, without_default_system_prompt
from common.detokenizer import Detokenizer, VisibleControls
from common.model_files import find_model, served_name, tokenizer_folder
from common.protocol import (
    ChatMessage,
    LogprobEntry,
    PipelineError,
    PositionLogprobs,
    TokenLogprobs,
)
from common.protocol_tools import FunctionTool
from common.stop_strings import StopStrings
from common.tokenizer import GgufTokenizer, HuggingFaceTokenizer, Tokenizer

import jinja2

__all__ = ["Detokenizer", "StopStrings", "TextModel", "load_text_model"]


@dataclasses.dataclass(frozen=True)
class TextModel:
    """A model's text side; `name` is what clients call the model."""

    name: str
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None

    def encode(self, text: str) -> list[int]:
        """Token ids, with one BOS in front if the model wants one; parses control tokens."""
        return self.tokenizer.encode(text)

    def encode_parts(self, parts: Iterable[str]) -> list[int]:
        """Token ids of the parts' text, none of which reaches from one part into another.

        A tokenizer that puts a space before a text cannot do that: it encodes the whole.
        """
        bos = self.encode("")
        probe = self.encode("{")[len(bos) :]
        if b"".join(map(self.tokenizer.token_bytes, probe)) != b"{":
            return self.encode("".join(parts))
        first, *others = map(self.encode, parts)
        return [*first, *(token for other in others for token in other[len(bos) :])]

    def render_chat(
        self, messages: list[ChatMessage], tools: list[FunctionTool] | None = None
    ) -> str:
        """The prompt of the assistant's next message; see `ChatTemplate.render`.

        Raises:
            PipelineError: kind `invalid_request`; the model has no chat template, or its
                template refuses the messages.
        """
        if self.chat_template is None:
            message = f"The model {self.name} has no chat template; use /v1/completions."
            raise PipelineError("invalid_request", message, "messages")
        return self.chat_template.render(messages, tools)

    def detokenizer(self, visible: Iterable[str] = ()) -> Detokenizer:
        """A new one, for one stream; the control tokens `visible` have their text in it."""
        control = self.tokenizer.control_ids
        marks = {control[text]: text for text in visible if text in control}
        detokenizer = self.tokenizer.detokenizer()
        return VisibleControls(detokenizer, marks) if marks else detokenizer

    def check_token_ids(self, token_ids: Iterable[int], param: str) -> None:
        """Raise a `PipelineError`, kind `invalid_request`, for an id the model does not have."""
        last = self.tokenizer.n_tokens - 1
        for token_id in token_ids:
            if not 0 <= token_id <= last:
                message = f"'{param}': token id {token_id} is not in 0..{last}."
                raise PipelineError("invalid_request", message, param)

    def logprobs(
        self, token_ids: list[int], logprobs: list[TokenLogprobs]
    ) -> list[PositionLogprobs]:
        """The engine's log probabilities with the texts of their tokens."""
        return [
            PositionLogprobs(
                self._entry(token_id, position.logprob),
                [self._entry(other, logprob) for other, logprob in position.top],
            )
            for token_id, position in zip(token_ids, logprobs, strict=True)
        ]

    def _entry(self, token_id: int, logprob: float) -> LogprobEntry:
        data = self.tokenizer.token_bytes(token_id)
        return LogprobEntry(data.decode(errors="replace"), logprob, list(data))


def load_text_model(model: str, chat_template: Path | None = None) -> TextModel:
    """The model of that name (here or on Hugging Face), GGUF path, or path of a folder.

    `chat_template` is a file with a jinja2 template to use instead of the model's own.

    Raises:
        FileNotFoundError: there is no such model, or no such template file.
        ValueError: it is not a model, or the template is not valid.
    """
    folder = tokenizer_folder(model)
    name = served_name(model)
    tokenizer: Tokenizer = (
        GgufTokenizer(find_model(model)) if folder is None else HuggingFaceTokenizer(folder)
    )
    if chat_template:
        source = chat_template.read_text()
    else:
        source = without_default_system_prompt(tokenizer.chat_template or "")
    if not source:
        return TextModel(name, tokenizer, None)
    try:
        template = ChatTemplate(
            source, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token
        )
    except jinja2.TemplateSyntaxError as error:
        origin = chat_template or model
        raise ValueError(f"the chat template of {origin} is invalid: {error}") from error
    return TextModel(name, tokenizer, template)
