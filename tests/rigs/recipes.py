"""What it takes to run SGLang and vLLM on a machine without a GPU.

Another engine is another `Recipe` in `RECIPES`; `tests.rigs.build` makes a rig of it, and
`scripts/test-engines NAME` runs the tests of `tests/contract` there.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

TORCH = "torch==2.13.0"

# Reads GGUF files of the llama family; newer releases refuse SmolLM2's.
TRANSFORMERS = "transformers==5.12.1"


@dataclass(frozen=True)
class Recipe:
    """How a rig is built, and how the tests run in it.

    `installs` are the arguments of one `pip install` each, before the project itself is
    installed. They and the project obey constraints.txt, but for the packages that are `unpinned`
    because the engine needs another version. `python_path` names folders beside this file that
    every Python process of the rig has before all others. `flags` are the engine's own.
    """

    installs: tuple[tuple[str, ...], ...]
    unpinned: tuple[str, ...] = ()
    python_path: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    flags: tuple[str, ...] = ()


# Of SGLang's dependencies those that are imported without a GPU, and for text alone.
_SGLANG_NEEDS = (
    "IPython",
    "apache-tvm-ffi==0.1.11",
    "compressed-tensors==0.18.0",
    "dill",
    "einops",
    "interegular",
    "llguidance",
    "nvidia-ml-py",
    "openai-harmony==0.0.4",
    "orjson",
    "partial_json_parser",
    "pybase64",
    "pydantic",
    "python-multipart",
    "regex",
    "requests",
    "scipy",
    "sentencepiece==0.2.1",
    "setproctitle",
    "tiktoken",
    "tqdm",
    "triton",
    "xxhash",
    "zstandard",
)

_SGLANG = Recipe(
    installs=(
        (TORCH, "torchvision==0.28.0"),
        (TRANSFORMERS, "accelerate", "gguf", *_SGLANG_NEEDS),
        ("--no-deps", "sglang==0.5.21", "xgrammar==0.2.7"),
    ),
    unpinned=("huggingface-hub", "tokenizers"),
    python_path=("sglang_cpu",),
    environment={"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1"},
    flags=(
        *("--device", "cpu", "--dtype", "bfloat16"),
        *("--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
        *("--disable-cuda-graph", "--disable-overlap-schedule"),
        *("--context-length", "2048", "--max-total-tokens", "4096"),
        *("--max-running-requests", "8", "--max-queued-requests", "8"),
        *("--mem-fraction-static", "0.3"),
    ),
)

RECIPES: dict[str, Recipe] = {"sglang": _SGLANG}
