"""A model whose download fails without saying why."""

from pathlib import Path
from typing import Any

from common.model_files import tokenizer_folder

import pytest


@pytest.mark.parametrize(
    ("error", "reason"), [(OSError(), r"OSError\(\)"), (OSError("no route\nat all"), "no route$")]
)
def test_the_reason_is_one_line(
    error: OSError, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def snapshot_download(*args: Any, **kwargs: Any) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(FileNotFoundError, match=f"could be had from Hugging Face: {reason}"):
        tokenizer_folder("no/such")
