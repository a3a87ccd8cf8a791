"""The router's command-line arguments about its queue and its metrics."""

import argparse
import os
from typing import get_args

from chapter4.admission import QueueSettings
from chapter4.fair_queue import QueueOrder
from chapter4.saturation import Limits
from common.arguments import port_number, positive_seconds


def add_admission_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what may wait, in which order, and when an engine is saturated."""
    env, settings, limits = os.environ.get, QueueSettings(), Limits()
    parser.add_argument(
        "--max-queue",
        type=_count,
        metavar="N",
        default=env("MAX_QUEUE", str(settings.size)),
        help="while all engines are saturated, so many requests wait in the router; more get a "
        "429 (env MAX_QUEUE, %(default)s)",
    )
    parser.add_argument(
        "--queue-timeout",
        type=positive_seconds,
        metavar="SECONDS",
        default=env("QUEUE_TIMEOUT", str(settings.timeout_s)),
        help="who has waited for so long gets a 429 (env QUEUE_TIMEOUT, %(default)s)",
    )
    parser.add_argument(
        "--queue-order",
        type=_order,
        metavar="fifo|shortest",
        default=env("QUEUE_ORDER", settings.order),
        help="which of a tenant's requests of one priority goes first: the first to come, or the "
        "one with the fewest tokens to prefill (env QUEUE_ORDER, %(default)s)",
    )
    parser.add_argument(
        "--engine-queue",
        type=_count,
        metavar="N",
        default=env("ENGINE_QUEUE", str(limits.engine_queue)),
        help="an engine is saturated when it has so many requests more than it runs at once; the "
        "more, the less there is for the router to put in order (env ENGINE_QUEUE, %(default)s)",
    )
    parser.add_argument(
        "--max-kv-usage",
        type=_share,
        metavar="SHARE",
        default=env("MAX_KV_USAGE", str(limits.kv_usage)),
        help="it is so, too, when running requests hold more than this share of its KV blocks, "
        "from 0 to 1 (env MAX_KV_USAGE, %(default)s)",
    )
    parser.add_argument(
        "--max-prefill-wait",
        type=positive_seconds,
        metavar="SECONDS",
        default=env("MAX_PREFILL_WAIT", str(limits.prefill_s)),
        help="or when the prompts sent there take longer than this to compute (env "
        "MAX_PREFILL_WAIT, %(default)s)",
    )
    parser.add_argument(
        "--no-queue",
        action="store_true",
        default=env("NO_QUEUE", "") not in ("", "0"),
        help="nothing waits in the router, all of it in the engines, first come first served "
        "(env NO_QUEUE=1)",
    )
    parser.add_argument(
        "--metrics-port",
        type=port_number,
        metavar="N",
        default=env("ROUTER_METRICS_PORT") or None,
        help="serve Prometheus metrics at /metrics on this port, 0 for a free one (env "
        "ROUTER_METRICS_PORT; default: not at all)",
    )
    parser.add_argument(
        "--metrics-host",
        metavar="ADDRESS",
        default=env("ROUTER_METRICS_HOST", "127.0.0.1"),
        help="the address that --metrics-port is on (env ROUTER_METRICS_HOST, %(default)s)",
    )


def queue_settings(args: argparse.Namespace) -> QueueSettings:
    """What the arguments say."""
    limits = Limits(args.engine_queue, args.max_kv_usage, args.max_prefill_wait)
    return QueueSettings(
        args.max_queue, args.queue_timeout, args.queue_order, None if args.no_queue else limits
    )


def _order(text: str) -> str:
    if text not in get_args(QueueOrder):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not one of {', '.join(get_args(QueueOrder))}"
        )
    return text


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 0")
    return int(text)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and up to 1")
    return share
