"""Start an engine by the name of its backend."""

import argparse
import inspect
import os
from typing import Any, TypeVar

from common.engines.base import Engine
from common.model_files import DEFAULT_MODEL

import msgspec

BACKENDS = ("llamacpp", "simulated")

T = TypeVar("T")


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that choose an engine."""
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
        help="llamacpp runs the model, simulated only keeps its time (env ENGINE_BACKEND, "
        "%(default)s)",
    )
    parser.add_argument(
        "--model",
        default=env("MODEL", DEFAULT_MODEL),
        help="a .gguf file, or the model that comes with the project; the simulated backend takes "
        "a Hugging Face folder as well (env MODEL, %(default)s)",
    )
    parser.add_argument(
        "--engine-arg",
        action="append",
        default=env("ENGINE_ARGS", "").split(),
        metavar="NAME=VALUE",
        help="a setting of the backend, block_size=32 for example; may repeat (env ENGINE_ARGS, "
        "separated by blanks)",
    )


async def start_engine(args: argparse.Namespace) -> Engine:
    """The engine that the flags describe, ready to generate.

    Raises:
        OSError: the model cannot be found or read.
        ValueError: a setting is wrong (the message names it), or llama.cpp cannot run the model.
    """
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
        return await LlamaCppEngine.start(_convert(settings, LlamaCppSettings))
    except LlamaCppError as error:
        raise ValueError(str(error)) from error


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
