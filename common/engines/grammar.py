"""JSON schemas as token masks, by llguidance."""

import asyncio
import threading
from collections.abc import Awaitable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from common.engines.json_schema import JSON_STYLE, check_schema_numbers, schema_error
from common.engines.llama_capi import Vocab
from common.model_files import find_model

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

# Errors are shown to clients: they must not carry the state of the parser.
_LIMITS = LLParserLimits(verbose_errors=False)
_THREADS = 2
# llguidance recurses once for each level of a schema, $ref included: thousands in 64 KiB.
_STACK_BYTES = 256 * 1024 * 1024
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
    """Compiles JSON schemas for the vocabulary of a model, in threads of its own.

    A compilation can take seconds, and the first one loads the vocabulary. `compiling` counts
    those that somebody waits for.
    """

    def __init__(self, model: str) -> None:
        self.compiling = 0
        self._model = model
        self._vocab: Vocab | None = None
        self._tokenizer: LLTokenizer | None = None
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="json-schema")

    async def compile_unless(
        self, stopped: Awaitable[bool], json_schema: str, output: Sequence[int] = ()
    ) -> LLMatcher | None:
        """See `compile`; None as soon as `stopped` returns or this compiler is stopped."""
        compilation = asyncio.wrap_future(self._submit(json_schema, output))
        stopping = asyncio.ensure_future(stopped)
        self.compiling += 1
        try:
            await asyncio.wait((compilation, stopping), return_when=asyncio.FIRST_COMPLETED)
            if not compilation.done() or compilation.cancelled():
                return None
            return compilation.result()
        finally:
            self.compiling -= 1
            stopping.cancel()
            compilation.cancel()  # if it has not begun, it never will

    def compile(self, json_schema: str, output: Sequence[int] = ()) -> LLMatcher:
        """A matcher of documents that the schema allows, after the tokens of `output`.

        Raises:
            PipelineError: kind `invalid_request`, the schema is wrong, no document can begin
                to match it or begins like `output`, or it is beyond llguidance.
        """
        check_schema_numbers(json_schema)
        try:
            grammar = LLMatcher.grammar_from_json_schema(json_schema, overrides=JSON_STYLE)
        except ValueError as error:
            raise schema_error(str(error)) from error
        matcher = LLMatcher(self._load_tokenizer(), grammar, log_level=0, limits=_LIMITS)
        if not matcher.is_error():
            matcher.compute_bitmask()  # finds out whether any token may come first
        if matcher.is_error():
            raise schema_error(matcher_error(matcher))
        if matcher.is_stopped():
            raise schema_error("no JSON document matches it")
        if not matcher.consume_tokens(list(output)):
            raise schema_error(matcher_error(matcher))
        return matcher

    def _submit(self, json_schema: str, output: Sequence[int]) -> Future[LLMatcher]:
        usual = threading.stack_size(_STACK_BYTES)  # the pool starts its threads in `submit`
        try:
            return self._threads.submit(self.compile, json_schema, output)
        finally:
            threading.stack_size(usual)

    def _load_tokenizer(self) -> LLTokenizer:
        with self._lock:
            if self._tokenizer is None:
                self._vocab = Vocab(find_model(self._model))
                wrapper = TokenizerWrapper(_Tokenizer(self._vocab))
                self._tokenizer = LLTokenizer(wrapper, eos_token=sorted(self._vocab.eog_ids))
            return self._tokenizer

    def stop(self) -> None:
        """Cancel the compilations that have not begun; the others go on."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """Wait for what is being compiled and free the vocabulary; no matcher may be used after."""
        self._threads.shutdown(cancel_futures=True)
        if self._vocab is not None:
            self._vocab.close()


def matcher_error(matcher: LLMatcher) -> str:
    """Why the matcher gave up, in words about the schema where llguidance has none."""
    error = matcher.get_error()
    if error.startswith("NoExtension"):
        return "no JSON document matches it, or none that begins like the output"
    return error
