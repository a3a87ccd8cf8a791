"""SGLang's flags: those that its use here asks for, and what it says about those of a user."""

import contextlib
import io
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# A user's flags come after these, and win.
_DEFAULTS = (
    *("--page-size", "16"),  # a page is a block
    *("--log-level", "warning"),
    *("--decode-log-interval", "8"),  # decode steps between two reports of KV events and load
    *("--grammar-backend", "llguidance"),  # SGLang's own, xgrammar, refuses most schemas of tools
)
_NEEDED = ("--skip-tokenizer-init", "--incremental-streaming-output", "--enable-metrics")


@dataclass(frozen=True)
class SGLangSettings:
    """SGLang's `ServerArgs`, and the addresses and the topic of its KV events."""

    server_args: Any
    events: str
    replay: str
    topic: str

    @property
    def has_seeds(self) -> bool:
        return bool(self.server_args.enable_deterministic_inference)

    @property
    def has_tokenizer(self) -> bool:
        """Whether its scheduler has one, for JSON schemas and `min_tokens`."""
        return bool(self.server_args.grammar_backend != "none")

    @property
    def mode(self) -> str:
        """The one of disaggregation: "prefill", "decode" or "null"."""
        return str(self.server_args.disaggregation_mode)


def sglang_settings(model: str, flags: list[str], folder: Path) -> SGLangSettings:
    """Read a user's flags; the sockets for KV events are in `folder` unless they name others.

    Raises:
        ValueError: SGLang does not take a flag (in its words), or it makes no sense here.
    """
    # What the model says, whatever the temperature: the other engines' logprobs are that.
    os.environ.setdefault("SGLANG_RETURN_ORIGINAL_LOGPROB", "1")
    events = {
        "publisher": "zmq",
        "endpoint": f"ipc://{folder}/events",
        "replay_endpoint": f"ipc://{folder}/replay",
    }
    own = [*_DEFAULTS, "--kv-events-config", json.dumps(events), *_NEEDED]
    server_args = _parse([*own, *flags, "--model-path", model])
    for name in ("dp_size", "nnodes", "tokenizer_worker_num"):
        if (value := getattr(server_args, name)) != 1:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} {value}: an engine here is one replica; start more engines")
    try:
        events = json.loads(server_args.kv_events_config)
        if events["publisher"] != "zmq":
            raise KeyError("publisher")
        return SGLangSettings(
            server_args,
            _reachable(events["endpoint"]),
            _reachable(events.get("replay_endpoint") or ""),
            events.get("topic", ""),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            '--kv-events-config: with "publisher": "zmq" and an "endpoint"; routers need the events'
        ) from error


@contextlib.contextmanager
def own_logging() -> Iterator[None]:
    """Keep this process's log as it is: SGLang sets up its own when it starts."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


def _parse(flags: list[str]) -> Any:
    # Imported when needed: it takes seconds, and most machines have no SGLang.
    from sglang.srt.server_args import prepare_server_args

    said = io.StringIO()
    try:
        with own_logging(), contextlib.redirect_stderr(said):
            return prepare_server_args(flags)
    except SystemExit as error:
        if error.code in (None, 0):
            raise  # --help
        raise ValueError(said.getvalue().strip().splitlines()[-1]) from error


def _reachable(endpoint: str) -> str:
    """An address to connect to, of one to bind to."""
    for wildcard in ("*", "0.0.0.0", "[::]"):  # noqa: S104 (not bound to)
        endpoint = endpoint.replace(f"tcp://{wildcard}:", "tcp://127.0.0.1:")
    return endpoint
