"""Start an engine by the name of its backend."""

import argparse
import importlib.util
import inspect
import os
import shlex
import sys
from collections.abc import Sequence
from typing import Any, TypeVar

from common.engines.base import Engine
from common.kv_transfer.start import KvTransfer
from common.model_files import DEFAULT_MODEL

import msgspec

# Those with a parser of their own for what they are told, and the name by which they are installed.
EXTERNAL_BACKENDS = ("sglang", "vllm")
BACKENDS = ("llamacpp", "simulated", *EXTERNAL_BACKENDS)

T = TypeVar("T")


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that choose an engine; `parse_engine_arguments` reads them."""
    # Defaults stay strings, because argparse checks those as it does what is typed.
    env = os.environ.get
    parser.add_argument(
        "--worker-id",
        type=int,
        default=env("WORKER_ID", "0"),
        help="tells the engines of one pipeline apart (env WORKER_ID, %(default)s)",
    )
    parser.add_argument(
        "--backend",
        type=_backend,
        metavar=f"{{{','.join(BACKENDS)}}}",
        default=env("ENGINE_BACKEND", "llamacpp"),
        help="llamacpp runs the model, simulated only keeps its time; sglang and vllm run it where "
        "they are installed, best on a GPU (env ENGINE_BACKEND, %(default)s)",
    )
    parser.add_argument(
        "--model",
        default=env("MODEL", DEFAULT_MODEL),
        help="a .gguf file, or the model that comes with the project; for sglang and vllm a name "
        "on Hugging Face or a folder in its format, which simulated takes as well (env MODEL, "
        "%(default)s)",
    )
    parser.add_argument(
        "--engine-arg",
        action="append",
        default=env("ENGINE_ARGS", "").split(),
        metavar="NAME=VALUE",
        help="a setting of llamacpp or simulated, block_size=32 for example; may repeat (env "
        "ENGINE_ARGS, separated by blanks)",
    )
    parser.add_argument_group(
        "flags of SGLang and vLLM",
        "What follows -- goes to sglang or vllm untouched: --backend sglang -- --tp 2 (env "
        "ENGINE_FLAGS, quoted as in a shell)",
    )


def parse_engine_arguments(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None
) -> argparse.Namespace:
    """Parse the flags before `--`; those after it are `engine_flags`."""
    own = list(sys.argv[1:] if arguments is None else arguments)
    flags: list[str] | None = None
    if "--" in own:
        end = own.index("--")
        own, flags = own[:end], own[end + 1 :]
    parsed = parser.parse_args(own)
    if flags is None:
        try:
            flags = shlex.split(os.environ.get("ENGINE_FLAGS", ""))
        except ValueError as error:
            parser.error(f"ENGINE_FLAGS: {error}")
    parsed.engine_flags = flags
    return parsed


async def start_engine(args: argparse.Namespace, transfer: KvTransfer | None = None) -> Engine:
    """The engine that the flags describe, ready to generate.

    `transfer` is for llama.cpp; SGLang and vLLM move KV by themselves, as their flags say.

    Raises:
        OSError: the model cannot be found or read.
        ValueError: a setting is wrong (the message names it), the backend is not installed, or it
            cannot run the model.
    """
    if args.backend in EXTERNAL_BACKENDS:
        return await _start_external(args)
    if args.engine_flags:
        raise ValueError(
            f"{shlex.join(args.engine_flags)!r} after --: {args.backend} takes its settings with "
            "--engine-arg NAME=VALUE; only sglang and vllm have flags of their own"
        )
    settings: dict[str, Any] = {"model": args.model, "worker_id": args.worker_id}
    for argument in args.engine_arg:
        name, _, value = argument.partition("=")
        settings[name] = value
    if args.backend == "simulated":
        from common.engines.simulated import SimulatedEngine, SimulatedSettings

        return await SimulatedEngine.start(_convert(settings, SimulatedSettings))
    # Imported when needed: the simulated engine must not load llama.cpp.
    from common.engines.llama_capi import LlamaCppError
    from common.engines.llamacpp import LlamaCppEngine, LlamaCppSettings

    try:
        return await LlamaCppEngine.start(_convert(settings, LlamaCppSettings), transfer)
    except LlamaCppError as error:
        raise ValueError(str(error)) from error


async def _start_external(args: argparse.Namespace) -> Engine:
    backend: str = args.backend
    if args.engine_arg:
        raise ValueError(
            f"--engine-arg {args.engine_arg[0]}: {backend} has flags of its own, which go after "
            f"--: --backend {backend} -- --flag value"
        )
    if args.model == DEFAULT_MODEL or args.model.lower().endswith(".gguf"):
        raise ValueError(
            f"--model {args.model} is a GGUF file; {backend} needs a name on Hugging Face, like "
            "Qwen/Qwen3-0.6B, or a folder in its format"
        )
    if importlib.util.find_spec(backend) is None:
        raise ValueError(f'{backend} is not installed: pip install ".[{backend}]"')
    if backend == "sglang":
        from common.engines.sglang import SGLangEngine

        return await SGLangEngine.start(args.model, args.worker_id, args.engine_flags)
    from common.engines.vllm import VllmEngine

    return await VllmEngine.start(args.model, args.worker_id, args.engine_flags)


def _backend(name: str) -> str:
    if name not in BACKENDS:
        raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(BACKENDS)}")
    return name


def _convert(settings: dict[str, Any], settings_type: type[T]) -> T:
    names = list(inspect.signature(settings_type).parameters)
    for name in settings:
        if name not in names:
            raise ValueError(f"--engine-arg {name}: not one of {', '.join(names)}")
    try:
        return msgspec.convert(settings, settings_type, strict=False)
    except msgspec.ValidationError as error:
        raise ValueError(f"--engine-arg: {error}") from error
