"""Runs at the start of every Python process of the rig: lets torchvision be imported.

SGLang wants torchvision for images. Its wheel on the package index is built for CUDA: with a CPU
build of torch its operators cannot be loaded, and the import fails when it describes them to
torch. Operators that are declared, though nothing implements them, are enough for text.
"""

import importlib.abc
import importlib.metadata
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_NMS = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            if not importlib.metadata.version("torchvision").endswith("+cpu"):
                _declare_operators()
        return None  # the real one is found as usual


def _declare_operators() -> None:
    import torch

    if torch.__version__.endswith("+cpu"):
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", _NMS)


sys.meta_path.insert(0, _BeforeTorchvision())
