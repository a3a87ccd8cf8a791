"""JSON schemas as token masks, by llguidance."""

import threading
from typing import TYPE_CHECKING

from common.engines.llama_capi import Vocab
from common.model_files import find_model
from common.protocol import PipelineError

from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

# Without free white space a weak model cannot fill its answer with it.
_JSON_STYLE: "JsonCompileOptions" = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}
_CONTROL_MARK = b"\xff"  # toktrie: a token that begins so never matches text


class _Tokenizer:
    """What llguidance's `TokenizerWrapper` asks of a tokenizer."""

    def __init__(self, vocab: Vocab) -> None:
        self._vocab = vocab
        self.eos_token_id = min(vocab.eog_ids)
        self.bos_token_id = vocab.bos_id
        self.special_token_ids = sorted(vocab.control_ids)
        self.tokens = [
            (_CONTROL_MARK if token in vocab.control_ids else b"")
            + vocab.token_bytes(token, control=True)
            for token in range(vocab.n_tokens)
        ]

    def __call__(self, text: str) -> list[int]:
        return self._vocab.encode(text, special=False)


class GrammarCompiler:
    """Compiles JSON schemas for the vocabulary of a model; thread-safe until `close`.

    A compilation can take seconds, and the first one loads the vocabulary.
    """

    def __init__(self, model: str) -> None:
        self._model = model
        self._vocab: Vocab | None = None
        self._tokenizer: LLTokenizer | None = None
        self._lock = threading.Lock()

    def compile(self, json_schema: str) -> LLMatcher:
        """A matcher at the start of a document that the schema allows.

        Raises:
            PipelineError: kind `invalid_request`, the schema is wrong or beyond llguidance.
        """
        try:
            grammar = LLMatcher.grammar_from_json_schema(json_schema, overrides=_JSON_STYLE)
        except ValueError as error:
            raise _bad_schema(str(error)) from error
        matcher = LLMatcher(self._load_tokenizer(), grammar, log_level=0)
        if matcher.is_error():
            raise _bad_schema(matcher.get_error())
        return matcher

    def _load_tokenizer(self) -> LLTokenizer:
        with self._lock:
            if self._tokenizer is None:
                self._vocab = Vocab(find_model(self._model))
                wrapper = TokenizerWrapper(_Tokenizer(self._vocab))
                self._tokenizer = LLTokenizer(wrapper, eos_token=sorted(self._vocab.eog_ids))
            return self._tokenizer

    def close(self) -> None:
        """Free the vocabulary; no matcher may be used after."""
        if self._vocab is not None:
            self._vocab.close()


def _bad_schema(reason: str) -> PipelineError:
    return PipelineError(
        "invalid_request", f"the JSON schema cannot be used: {reason}", "response_format"
    )
