"""Disaggregated prefill: when another engine is to compute a prompt, and when it does not pay.

An engine that computes a long prompt makes every answer that it generates at the same time wait,
chunk after chunk. With engines of two roles it does not: one of those for prefill computes the
prompt and its first token, and the KV cache of the prompt moves to the one that generates the
rest. That costs a hop and the transfer, so a short prompt, or one that is mostly cached where it
will be generated, is computed there; and so is one for which the prefill engines are too busy, or
the decode engine: KV that has arrived holds memory until its request runs, and what nobody
fetches in time is lost.
"""

import argparse
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from chapter4.snapshot import WorkerView
from common.arguments import non_negative_int, positive_seconds
from common.protocol_router import KvSource
from common.protocol_transfer import MAX_RECEIVED, ROLES

DEFAULT_MIN_TOKENS = 64
DEFAULT_MAX_WAIT_S = 30.0


@dataclass(frozen=True)
class PrefillRule:
    """The conditions: so many tokens to compute at least, so long a wait for it at most."""

    min_tokens: int = DEFAULT_MIN_TOKENS
    max_wait_s: float = DEFAULT_MAX_WAIT_S

    def pays(self, decode: WorkerView, prefill: WorkerView) -> bool:
        """Whether the prefill engine is to compute what the decode engine has not cached."""
        if decode.new_tokens < max(self.min_tokens, 1) or _would_wait(decode) > MAX_RECEIVED:
            return False
        return prefill.place_s + prefill.prefill_s <= self.max_wait_s

    def applies(self, engine: KvSource, decode: WorkerView, prefill: WorkerView) -> bool:
        """Whether it does; `engine`, which decodes, may depend on it."""
        return not stands_alone(engine) or self.pays(decode, prefill)

    def computing(
        self, engines: Iterable[tuple[KvSource, WorkerView]], prefill: Sequence[WorkerView]
    ) -> tuple[WorkerView, ...]:
        """Those that would compute the prompt if one of `engines` answered the request."""
        found: dict[int, WorkerView] = {}
        for engine, view in engines:
            asked = prefill if engine.role == "decode" else ()
            others = [other for other in asked if self.applies(engine, view, other)]
            found |= {each.instance_id: each for each in others or [view]}
        return tuple(found.values())


def _would_wait(decode: WorkerView) -> int:
    """How many requests would wait there for a place, with this one and those still to come."""
    waiting = decode.waiting + 1 if decode.waiting else 0
    if decode.max_running is None:
        return waiting
    in_flight = decode.prefill_requests + decode.decode_requests
    return max(waiting, in_flight + 1 - decode.max_running)


def stands_alone(engine: KvSource) -> bool:
    """Whether it can answer without another engine; of SGLang's, those with a role cannot."""
    return engine.role == "aggregated" or engine.info.backend != "sglang"


def prefill_id(request_id: str) -> str:
    """The name by which a request's computation by a prefill engine is reported."""
    return f"{request_id}/prefill" if request_id else ""


def is_prefill_id(request_id: str) -> bool:
    return request_id.endswith("/prefill")


def decode_id(prefill_id: str) -> str:
    """The request for which it is computed; of another request's id, that id."""
    return prefill_id.removesuffix("/prefill")


def add_role_argument(parser: argparse.ArgumentParser) -> None:
    """Add the flag that says what an engine is for."""
    parser.add_argument(
        "--role",
        type=_role,
        metavar="|".join(ROLES),
        default=os.environ.get("ENGINE_ROLE", "aggregated"),
        help="prefill: compute prompts for the engines of the role decode, to which the KV cache "
        "then moves; aggregated: do both (env ENGINE_ROLE, %(default)s)",
    )


def _role(text: str) -> str:
    if text not in ROLES:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(ROLES)}")
    return text


def add_remote_prefill_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say when a prompt is computed elsewhere; see `prefill_rule`."""
    env = os.environ.get
    parser.add_argument(
        "--remote-prefill-tokens",
        type=non_negative_int,
        metavar="N",
        default=env("REMOTE_PREFILL_TOKENS", str(DEFAULT_MIN_TOKENS)),
        help="where there are engines of --role prefill, they compute the prompts of which the "
        "decode engine has so many tokens not cached; 0: all of them (env "
        "REMOTE_PREFILL_TOKENS, %(default)s)",
    )
    parser.add_argument(
        "--remote-prefill-wait",
        type=positive_seconds,
        metavar="SECONDS",
        default=env("REMOTE_PREFILL_WAIT", f"{DEFAULT_MAX_WAIT_S:g}"),
        help="unless a prompt would wait there for longer than this (env REMOTE_PREFILL_WAIT, "
        "%(default)s)",
    )


def prefill_rule(args: argparse.Namespace) -> PrefillRule:
    """The conditions that the flags describe."""
    return PrefillRule(args.remote_prefill_tokens, args.remote_prefill_wait)
