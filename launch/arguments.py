"""The launcher's command line. Runs without .venv, for `scripts/run --help`."""

import argparse
import os
import re
import sys
from pathlib import Path

from launch.chapters import BACKENDS, CHAPTERS, EXTERNAL_BACKENDS, POLICIES, Options

HTTP_PORT = 8000


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/run",
        description="Start a chapter's pipeline on this machine; Ctrl-C stops it.",
        epilog="NATS and etcd are started too, unless the environment variables NATS_SERVER "
        "(nats://host:port) or ETCD_ENDPOINTS (http://host:port) name running ones.",
    )
    parser.add_argument("chapter", metavar="CHAPTER", help=f"one of: {', '.join(CHAPTERS)}")
    parser.add_argument(
        "--ask",
        metavar="QUESTION",
        action="append",
        default=[],
        help="ask this, print the answer and stop; may be given several times",
    )
    parser.add_argument(
        "--model",
        metavar="PATH",
        help="a .gguf file to use instead of the model that comes with the project; sglang and "
        "vllm need a name on Hugging Face or a folder in its format",
    )
    parser.add_argument(
        "--backend",
        choices=("llamacpp", "simulated", *EXTERNAL_BACKENDS),
        help="what generates the tokens: a real model (default, but for chapter 3), a timing "
        "model that only takes the time a real one would, or an engine for GPUs with a real model, "
        "whose own flags go after --",
    )
    parser.add_argument(
        "--engines",
        metavar="N",
        type=_positive,
        help="number of engine processes (default: 1; chapters 2 and 4 have 2, chapter 3 has 4)",
    )
    parser.add_argument(
        "--real",
        metavar="N",
        type=_positive,
        help="so many engines that run a real model: --engines N --backend llamacpp",
    )
    parser.add_argument(
        "--prefill",
        metavar="N",
        type=_positive,
        default=Options.prefill,
        help="so many of the engines compute prompts for the others, which generate the answers "
        "(chapters 3 and 4; default: each engine does both)",
    )
    parser.add_argument(
        "--routers",
        metavar="N",
        type=_positive,
        default=Options.routers,
        help="number of routers, which know of each other's decisions (chapters 3 and 4; default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--policy",
        metavar="NAME",
        help="how the router chooses an engine: "
        + "; ".join(f"in {chapter} {', '.join(names)}" for chapter, names in POLICIES.items())
        + " or FILE.py:FUNCTION (default: the router's own)",
    )
    parser.add_argument(
        "--shadow",
        metavar="NAME",
        help="a second policy for the router of chapters 3 and 4, which only says what it would "
        "have chosen",
    )
    parser.add_argument(
        "--port",
        metavar="N",
        type=_port,
        help=f"HTTP port (default: {HTTP_PORT}, or a free one if that is taken)",
    )
    parser.add_argument(
        "--namespace",
        metavar="NAME",
        type=_namespace,
        default=os.environ.get("DYN_NAMESPACE", Options.namespace),
        help="where the components find each other; keeps pipelines that share NATS and etcd "
        "apart (default: %(default)s, environment variable: DYN_NAMESPACE)",
    )
    parser.add_argument(
        "--verbose", action="store_true", help="show every log line, also while asking"
    )
    own, flags = _split(sys.argv[1:] if arguments is None else arguments)
    parsed = parser.parse_args(own)
    parsed.engine_flags = flags
    try:
        _use_real_engines(parsed)
        for option in ("policy", "shadow"):
            _check_policy(parsed, option)
    except ValueError as error:
        parser.error(str(error))
    if parsed.backend is None:
        parsed.backend = os.environ.get("ENGINE_BACKEND") or BACKENDS.get(parsed.chapter)
    return parsed


def _split(arguments: list[str]) -> tuple[list[str], list[str] | None]:
    """What stands before and after the first `--`, if there is one."""
    if "--" not in arguments:
        return arguments, None
    end = arguments.index("--")
    return arguments[:end], arguments[end + 1 :]


def _use_real_engines(arguments: argparse.Namespace) -> None:
    if arguments.real is None:
        return
    if arguments.backend == "simulated" or arguments.engines is not None:
        other = "--backend simulated" if arguments.engines is None else "--engines"
        raise ValueError(f"--real {arguments.real} and {other} contradict each other")
    arguments.engines, arguments.backend = arguments.real, "llamacpp"


def _check_policy(arguments: argparse.Namespace, option: str) -> None:
    """Make the path of a policy in a file absolute.

    Raises:
        ValueError: there is no such policy in the chapter.
    """
    name, names = getattr(arguments, option), POLICIES.get(arguments.chapter, ())
    taken = {option for part in CHAPTERS.get(arguments.chapter, ()) for option in part.options}
    if name is None or name in names or option not in taken:
        return
    choices = ", ".join(map(repr, names)) + (" or FILE.py:FUNCTION" if "shadow" in taken else "")
    path, colon, function = name.rpartition(":")
    if "shadow" not in taken or not colon or not path.endswith(".py") or not function:
        raise ValueError(f"argument --{option}: {name!r} is none of {choices}")
    if not Path(path).is_file():
        raise ValueError(f"argument --{option}: there is no file {path}")
    setattr(arguments, option, f"{Path(path).absolute()}:{function}")


def _namespace(text: str) -> str:
    # NATS has it in subjects, where dots and spaces separate.
    if not re.fullmatch(r"[A-Za-z0-9_-]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not of letters, digits, '_' and '-'")
    return text


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port number (1 to 65535)")
    return int(text)


if __name__ == "__main__":
    parse_arguments()
