"""Text to token ids and back, out of a GGUF file or a Hugging Face folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from common.detokenizer import ByteDetokenizer, DecodeStreamDetokenizer, Detokenizer, TokenBytes
from common.engines.llama_capi import LlamaCppError, Vocab

import tokenizers


class Tokenizer(Protocol):
    """One model's vocabulary, with what its files say about chats.

    `bos_token` and `eos_token` are the texts that a chat template may insert, "" if there is
    none; `chat_template` is jinja2 source. `control_ids` are the control tokens by their texts.
    """

    n_tokens: int
    bos_token: str
    eos_token: str
    chat_template: str | None
    control_ids: dict[str, int]
    token_bytes: Callable[[int], bytes]

    def encode(self, text: str) -> list[int]:
        """Token ids; starts with exactly one BOS if the model wants one, with none if not.

        Control tokens in the text are parsed: a rendered chat consists of them.
        """
        ...

    def detokenizer(self) -> Detokenizer: ...


class GgufTokenizer:
    """llama.cpp's own tokenizer, so any GGUF file works and the ids are the engine's."""

    def __init__(self, path: Path) -> None:
        try:
            vocab = Vocab(path)
        except LlamaCppError as error:
            raise ValueError(str(error)) from error
        self._vocab = vocab
        self.n_tokens = vocab.n_tokens
        self.chat_template = vocab.chat_template
        self.bos_token = self._control_text(vocab.bos_id)
        try:
            eos_id = int(vocab.metadata("tokenizer.ggml.eos_token_id"))
        except KeyError:
            eos_id = None
        self.eos_token = self._control_text(eos_id)
        self.control_ids = {self._control_text(token): token for token in vocab.control_ids}
        self._table = TokenBytes(vocab.token_bytes)
        self.token_bytes = self._table.__getitem__

    def _control_text(self, token_id: int | None) -> str:
        if token_id is None:
            return ""
        return self._vocab.token_bytes(token_id, control=True).decode(errors="replace")

    def encode(self, text: str) -> list[int]:
        bos = self._vocab.bos_id if self._vocab.add_bos else None
        return with_one_bos(self._vocab.encode(text), bos)

    def detokenizer(self) -> Detokenizer:
        return ByteDetokenizer(self._table)


class HuggingFaceTokenizer:
    """A folder with `tokenizer.json` and, for chats, `tokenizer_config.json`."""

    def __init__(self, folder: Path) -> None:
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise FileNotFoundError(f"the folder {folder} has no tokenizer.json")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library has no exception type of its own
            raise ValueError(f"cannot read {file}: {error}") from error
        config = _read_json(folder / "tokenizer_config.json")
        self.n_tokens = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.bos_token = _token_text(config.get("bos_token"))
        self.eos_token = _token_text(config.get("eos_token"))
        self.chat_template = _chat_template(folder, config)
        # What the tokenizer puts before any text tells whether the model wants a BOS.
        self._bos_id = self._tokenizer.token_to_id(self.bos_token) if self.bos_token else None
        if self._bos_id not in self._tokenizer.encode("").ids[:1]:
            self._bos_id = None
        self._added = self._tokenizer.get_added_tokens_decoder()
        self.control_ids = {t.content: i for i, t in self._added.items() if t.special}
        self._byte_level = _is_byte_level(json.loads(self._tokenizer.to_str())["decoder"])
        self._table = TokenBytes(self._bytes_of)
        self.token_bytes = self._table.__getitem__

    def encode(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return with_one_bos(ids, self._bos_id)

    def detokenizer(self) -> Detokenizer:
        if self._byte_level:
            return ByteDetokenizer(self._table)
        return DecodeStreamDetokenizer(self._tokenizer)

    def _bytes_of(self, token_id: int) -> bytes:
        added = self._added.get(token_id)
        if added is not None:
            return b"" if added.special else added.content.encode()
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            raise ValueError(f"token id {token_id} is not in 0..{self.n_tokens - 1}")
        if self._byte_level and _BYTE_OF_CHARACTER.keys() >= set(token):
            return bytes(_BYTE_OF_CHARACTER[character] for character in token)
        if len(token) == 6 and token.startswith("<0x"):
            return bytes([int(token[3:5], 16)])
        return token.replace("\u2581", " ").encode()


def with_one_bos(ids: list[int], bos_id: int | None) -> list[int]:
    """`ids` with `bos_id` in front, unless a chat template has put it there."""
    if bos_id is None or ids[:1] == [bos_id]:
        return ids
    return [bos_id, *ids]


def _read_json(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return content


def _token_text(token: Any) -> str:
    """A special token of `tokenizer_config.json`: null, its text, or an object with it."""
    return (token["content"] if isinstance(token, dict) else token) or ""


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text()
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _is_byte_level(decoder: dict[str, Any] | None) -> bool:
    if decoder is None:
        return False
    steps = decoder.get("decoders", [decoder])
    return [step["type"] for step in steps] == ["ByteLevel"]


def _byte_of_character() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for.

    Printable bytes stand for themselves, the others are moved to U+0100 and up, in order.
    Source: bytes_to_unicode in https://github.com/openai/gpt-2/blob/master/src/encoder.py.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    moved = {chr(0x100 + offset): byte for offset, byte in enumerate(others)}
    return {chr(byte): byte for byte in printable} | moved


_BYTE_OF_CHARACTER = _byte_of_character()
