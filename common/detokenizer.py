"""Token ids to text, piece by piece and exactly.

A token may be a part of a character. Characters are given out when they are complete, so the
pieces joined are the text of the whole, whatever the boundaries were. A character that is
still incomplete when the stream ends is dropped. Bytes that can belong to no character (a
model may produce any bytes) become U+FFFD, as in `bytes.decode(errors="replace")`.
"""

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol

import tokenizers
from tokenizers.decoders import DecodeStream

_Utf8Decoder = codecs.getincrementaldecoder("utf-8")


class Detokenizer(Protocol):
    """The text of one stream of token ids; constant time a token."""

    def push(self, token_ids: Sequence[int]) -> str:
        """The characters that `token_ids` complete; control tokens have no text."""
        ...


class TokenBytes(dict[int, bytes]):
    """The bytes of each token, looked up in the vocabulary once."""

    def __init__(self, lookup: Callable[[int], bytes]) -> None:
        super().__init__()
        self._lookup = lookup

    def __missing__(self, token_id: int) -> bytes:
        self[token_id] = found = self._lookup(token_id)
        return found


class ByteDetokenizer:
    """For vocabularies whose tokens are byte strings, which is what language models use."""

    def __init__(self, table: TokenBytes) -> None:
        self._table = table
        self._decoder = _Utf8Decoder("replace")

    def push(self, token_ids: Sequence[int]) -> str:
        table = self._table
        return self._decoder.decode(b"".join([table[token_id] for token_id in token_ids]))


class DecodeStreamDetokenizer:
    """For the other Hugging Face tokenizers, whose decoder may look at neighbouring tokens."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)

    def push(self, token_ids: Sequence[int]) -> str:
        step, tokenizer = self._stream.step, self._tokenizer
        return "".join([step(tokenizer, token_id) or "" for token_id in token_ids])


class VisibleControls:
    """Another detokenizer with the text of some control tokens, by their ids."""

    def __init__(self, detokenizer: Detokenizer, visible: dict[int, str]) -> None:
        self._detokenizer = detokenizer
        self._visible = visible

    def push(self, token_ids: Sequence[int]) -> str:
        push, visible = self._detokenizer.push, self._visible
        return "".join(
            visible[token_id] if token_id in visible else push([token_id]) for token_id in token_ids
        )
