"""The launcher's command line. Runs without .venv, for `scripts/run --help`."""

import argparse
import os
import re

from launch.chapters import CHAPTERS, Options

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
        help="a .gguf file to use instead of the model that comes with the project",
    )
    parser.add_argument(
        "--backend",
        choices=("llamacpp", "simulated"),
        help="what generates the tokens: a real model (default), or a timing model that only "
        "takes the time a real one would",
    )
    parser.add_argument(
        "--engines",
        metavar="N",
        type=_positive,
        help="number of engine processes (default: 1, or 2 where there is a router)",
    )
    parser.add_argument(
        "--policy",
        choices=("kv", "least_loaded", "round_robin", "random"),
        help="how the router chooses an engine, from chapter 2 on (default: kv)",
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
    return parser.parse_args(arguments)


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
