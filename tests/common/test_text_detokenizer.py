"""Incremental detokenisation equals the decode of the whole, for any tokens in any pieces."""

import ctypes
import functools
from itertools import pairwise

from common.detokenizer import ByteDetokenizer, DecodeStreamDetokenizer, Detokenizer, TokenBytes
from common.engines.llama_capi import Vocab, library
from common.model_files import DEFAULT_MODEL, find_model
from common.text import TextModel, load_text_model

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

HARD_TEXTS = [
    "👩‍👩‍👧‍👦 family, 🏳️‍🌈 flag, 👍🏽 skin tone, 🇫🇷 France",
    "漢字とかな交じり文、한국어, עברית, العربية",
    "e\u0301 n\u0303 \u0915\u094d\u0937 Z\u0351\u036b\u0343",
    "\u0000\t\r\n \u00a0\u2028 \ufeff\ufffd",
    "\U0001d518\U0001d52b\U0001d526 \U0010ffff",
    "  leading, trailing  and    inner spaces .  ,",
]
cuts_in_list = st.lists(st.integers(0, 400), max_size=8)


@functools.cache
def smollm2() -> TextModel:
    return load_text_model(DEFAULT_MODEL)


def in_pieces(detokenizer: Detokenizer, ids: list[int], cuts: list[int]) -> str:
    edges = [0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    return "".join(detokenizer.push(ids[start:end]) for start, end in pairwise(edges))


def llama_cpp_decode(vocab: Vocab, ids: list[int]) -> bytes:
    """The whole decode, by llama.cpp's own `llama_detokenize`."""
    buffer = ctypes.create_string_buffer(64 * len(ids) + 64)
    tokens = (ctypes.c_int32 * len(ids))(*ids)
    detokenize = library().llama_detokenize
    detokenize.argtypes = [
        ctypes.c_void_p,
        ctypes.POINTER(ctypes.c_int32),
        ctypes.c_int32,
        ctypes.c_char_p,
        ctypes.c_int32,
        ctypes.c_bool,
        ctypes.c_bool,
    ]
    size = detokenize(vocab._vocab, tokens, len(ids), buffer, len(buffer), False, False)
    assert size >= 0
    return buffer.raw[:size]


def without_incomplete_end(data: bytes) -> bytes:
    """`data` without the beginning of a character that it ends with."""
    for size in range(1, min(4, len(data) + 1)):
        try:
            data[-size:].decode()
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data" and error.start == 0:
                return data[:-size]
    return data


def has_tokens(character: str) -> bool:
    """False for a few control characters and for those that begin with byte F1 or F2.

    Those are unassigned or private, and llama.cpp leaves out bytes without a token.
    """
    return one_byte_tokens().keys() >= set(character.encode())


sayable = st.characters(codec="utf-8").filter(has_tokens)


@settings(deadline=None)
@given(st.text(sayable, max_size=200), cuts_in_list)
def test_any_text_comes_back_whatever_the_pieces(text: str, cuts: list[int]) -> None:
    ids = smollm2().tokenizer.encode(text)
    control = smollm2().encode("<|im_start|>")
    assert in_pieces(smollm2().detokenizer(), ids, cuts) == text
    assert in_pieces(smollm2().detokenizer(), control + ids + control, cuts) == text


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_hard_texts_token_by_token(text: str) -> None:
    """Every delta is valid text on its own: no half character, no replacement character."""
    detokenizer = smollm2().detokenizer()
    deltas = [detokenizer.push([token]) for token in smollm2().encode(text)]
    assert "".join(deltas) == text
    for delta in deltas:
        delta.encode()  # fails on half a surrogate pair


@settings(deadline=None)
@given(st.lists(st.integers(0, 49151), max_size=60), cuts_in_list)
def test_random_tokens_decode_as_llama_cpp_decodes_the_whole(
    ids: list[int], cuts: list[int]
) -> None:
    """A model may produce bytes that are no text; then the usual replacement rule holds."""
    whole = llama_cpp_decode(vocab(), ids)
    pieces = in_pieces(smollm2().detokenizer(), ids, cuts)
    assert pieces == without_incomplete_end(whole).decode(errors="replace")


@settings(deadline=None)
@given(st.binary(max_size=40), st.lists(st.integers(0, 40), max_size=6))
def test_random_bytes_as_tokens(data: bytes, cuts: list[int]) -> None:
    """The same with tokens of one byte each, which reach every broken sequence."""
    byte_tokens = one_byte_tokens()
    ids = [byte_tokens[byte] for byte in data if byte in byte_tokens]
    kept = bytes(byte for byte in data if byte in byte_tokens)
    pieces = in_pieces(smollm2().detokenizer(), ids, cuts)
    assert pieces == without_incomplete_end(kept).decode(errors="replace")


def test_incomplete_character_is_withheld_and_at_the_end_dropped() -> None:
    ids = smollm2().encode("🥐")
    detokenizer = smollm2().detokenizer()
    assert [detokenizer.push([token]) for token in ids[:-1]] == [""] * (len(ids) - 1)
    assert detokenizer.push(ids[-1:]) == "🥐"


@functools.cache
def vocab() -> Vocab:
    return Vocab(find_model(DEFAULT_MODEL))


@functools.cache
def one_byte_tokens() -> dict[int, int]:
    token_bytes = smollm2().tokenizer.token_bytes
    pairs = [(token_bytes(token), token) for token in range(smollm2().tokenizer.n_tokens)]
    return {data[0]: token for data, token in pairs if len(data) == 1}


@functools.cache
def sentencepiece_like() -> Tokenizer:
    """A Hugging Face tokenizer whose decoder turns bytes and spaces as SentencePiece does."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=["<s>", *(f"<0x{byte:02X}>" for byte in range(256))],
    )
    tokenizer.train_from_iterator(["the quick brown fox", "naïve café"] * 3, trainer)
    tokenizer = Tokenizer.from_str(tokenizer.to_str().replace('"special":true', '"special":false'))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


@settings(deadline=None)
@given(st.text(alphabet="the quickñé漢👩\u200d", max_size=40), cuts_in_list)
def test_decode_stream_for_other_tokenizers(text: str, cuts: list[int]) -> None:
    tokenizer = sentencepiece_like()
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    pieces = in_pieces(DecodeStreamDetokenizer(tokenizer), ids, cuts)
    assert pieces == tokenizer.decode(ids)


def test_work_per_token_does_not_grow_with_the_stream() -> None:
    """Each token's bytes are looked up once in the vocabulary and never decoded again."""
    looked_up: list[int] = []

    def lookup(token: int) -> bytes:
        looked_up.append(token)
        return b"x"

    detokenizer = ByteDetokenizer(TokenBytes(lookup))
    text = "".join(detokenizer.push([token % 10]) for token in range(1000))
    assert text == "x" * 1000
    assert looked_up == list(range(10))
