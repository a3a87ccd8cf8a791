"""The router component: token ids in, the engine to send them to out.

Knows what every engine has cached (KV events) and how busy it is (metrics), both over ZMQ from
the engines themselves, and from the processors what became of the requests it routed. A policy
chooses. Endpoints: `router.find_worker`; `router.report`, which hears of first tokens and ends;
`router.policy`, which says and changes the policy; `router.state`, what it believes about the
engines; `router.watch`, a few updates a second for the page /router; `router.replica_source` and
`router.replica_snapshot`, by which several routers learn of each other's decisions.
"""

import argparse
import os
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from chapter4.admission_arguments import add_admission_arguments, queue_settings
from chapter4.admission_gate import admitting, decision_of
from chapter4.admission_metrics import serving_metrics
from chapter4.canary import add_health_arguments, watching_health
from chapter4.decision import PolicyInUse, output, policy_state
from chapter4.disaggregation import (
    add_remote_prefill_arguments,
    is_prefill_id,
    prefill_rule,
)
from chapter4.feed import following
from chapter4.health import FleetHealth
from chapter4.policy_loader import DEFAULT_POLICY, POLICIES, load_policy
from chapter4.replicas import Others, sharing
from chapter4.selector import Selector
from chapter4.watch import Watched
from chapter4.worker_state import worker_state
from common.kv_arguments import kv_host
from common.protocol import PipelineError, from_wire, to_wire
from common.protocol_replicas import EngineFailed, Reported
from common.protocol_router import StateRequest
from common.protocol_routing import (
    PolicyRequest,
    PolicyState,
    RequestReport,
    RequestReports,
    RouteOutput,
    RouteRequest,
)
from common.telemetry import log, request_log
from common.worker import Lifecycle, add_common_arguments, run

from dynamo.runtime import Context, DistributedRuntime, dynamo_worker


@dynamo_worker()
async def worker(runtime: DistributedRuntime, args: argparse.Namespace, life: Lifecycle) -> None:
    selector = Selector(PolicyInUse.named(args.policy))
    selector.health = FleetHealth(args.slow_ratio, canaries=not args.no_canaries)
    if args.shadow:
        selector.shadow = PolicyInUse.named(args.shadow)
    selector.prefill_rule = prefill_rule(args)
    watched = Watched(selector)
    watched.router = runtime.endpoint(f"{args.namespace}.router.watch").connection_id()
    log.info("policy %s%s", args.policy, f", in its shadow {args.shadow}" if args.shadow else "")

    async def find_worker(request: Any, context: Context) -> AsyncGenerator[dict[str, Any], None]:
        try:
            wanted = from_wire(request, RouteRequest)
            for instance in wanted.failed:
                engine_failed(instance, wanted.request_id)
            if context.is_stopped():  # after a slow decision, many have given up
                raise PipelineError("unavailable", "The client has left.")
            ticket = gate.offer(wanted)
            async with aclosing(gate.wait(ticket, context)) as waiting:
                async for _ in waiting:
                    yield {}  # who asks learns that we are alive
            decision = decision_of(ticket)
            queued_ms = ticket.waited_s * 1e3
            watched.add(wanted.request_id, decision, queued_ms)
            found = output(decision, queued_ms=queued_ms)
            if context.is_stopped():
                # It will never be sent.
                for name in filter(None, (wanted.request_id, decision.prefill_id)):
                    take_report(RequestReport(name, 0, "failed"))
        except PipelineError as error:
            found = RouteOutput(error=error.info)
        request_log(context.id()).debug("worker %d: %s", found.worker_id, found.reason)
        yield to_wire(found)

    def engine_failed(instance: int, request_id: str) -> None:
        selector.health.failed(instance, request_id, time.monotonic())
        selector.fail(instance)
        replicas.tell(EngineFailed(instance, request_id))

    async def report(request: Any, context: Context) -> AsyncGenerator[dict[str, Any], None]:
        for known in from_wire(request, RequestReports).reports:
            take_report(known)
        yield {}

    def take_report(known: RequestReport) -> None:
        selector.report(known, time.monotonic())
        replicas.tell(Reported(known))
        # Who decodes goes on without a prefill engine that failed, so nobody asks for another one.
        if is_prefill_id(known.request_id) and known.kind == "failed" and known.instance_id:
            engine_failed(known.instance_id, known.request_id)
        gate.changed()

    async def policy(request: Any, context: Context) -> AsyncGenerator[dict[str, Any], None]:
        try:
            wanted = from_wire(request, PolicyRequest)
            change_policy(selector, wanted)
            if wanted.policy is not None or wanted.shadow is not None:
                replicas.tell(replicas.state.policy_changed(time.time()))
            yield to_wire(policy_state(selector.policy, selector.shadow))
        except PipelineError as error:
            yield to_wire(PolicyState(error=error.info))

    async def state(request: Any, context: Context) -> AsyncGenerator[dict[str, Any], None]:
        cached = selector.index.blocks() if from_wire(request, StateRequest).blocks else {}
        for known in list(selector.workers.values()):  # they come and go between two items
            blocks = cached.get(known.instance, [])
            yield to_wire(worker_state(selector, known, blocks, time.monotonic()))

    # Clients come first: endpoints that are made while another task uses one may block for ever.
    engines = await runtime.endpoint(f"{args.namespace}.engine.generate").client()
    source = runtime.endpoint(f"{args.namespace}.router.replica_source")
    snapshot = runtime.endpoint(f"{args.namespace}.router.replica_snapshot")
    others = Others(source.connection_id(), await source.client(), await snapshot.client())
    async with (
        admitting(selector, queue_settings(args)) as gate,
        serving_metrics(gate.metrics, args.metrics_host, args.metrics_port),
        following(runtime, args.namespace, selector) as feed,
        watching_health(engines, selector, feed.failed),
        sharing(selector, change_policy, kv_host(), others, feed.failed) as replicas,
    ):
        watched.queue = gate.watched
        await life.serve(
            runtime,
            {
                f"{args.namespace}.router.find_worker": find_worker,
                f"{args.namespace}.router.report": report,
                f"{args.namespace}.router.policy": policy,
                f"{args.namespace}.router.state": state,
                f"{args.namespace}.router.watch": watched.watch,
                f"{args.namespace}.router.replica_source": replicas.serve_source,
                f"{args.namespace}.router.replica_snapshot": replicas.serve_snapshot,
            },
            failed=feed.failed,
            draining=watched.aclose,
        )


def change_policy(selector: Selector, wanted: PolicyRequest) -> None:
    """Use other policies from the next request on.

    Raises:
        PipelineError: kind `invalid_request`, a policy cannot be loaded; nothing is changed.
    """
    new, shadow = selector.policy, selector.shadow
    param = "policy"
    try:
        if wanted.policy is not None:
            new = PolicyInUse.named(wanted.policy)
            if shadow is not None:  # what it disagreed with is over
                shadow = PolicyInUse(shadow.name, shadow.policy)
        param = "shadow"
        if wanted.shadow is not None:
            shadow = PolicyInUse.named(wanted.shadow) if wanted.shadow else None
    except ValueError as error:
        raise PipelineError("invalid_request", f"{param}: {error}", param) from error
    selector.policy, selector.shadow = new, shadow
    log.info("policy %s, in its shadow %s", new.name, shadow.name if shadow else "none")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_arguments(parser)
    parser.add_argument(
        "--policy",
        type=policy_name,
        metavar="NAME|FILE.py:FUNCTION",
        default=os.environ.get("ROUTER_POLICY", DEFAULT_POLICY),
        help=f"how to choose an engine: {', '.join(POLICIES)}, or a function of yours (env "
        "ROUTER_POLICY, %(default)s)",
    )
    parser.add_argument(
        "--shadow",
        type=policy_name,
        metavar="NAME|FILE.py:FUNCTION",
        default=os.environ.get("ROUTER_SHADOW") or None,
        help="a second policy that scores every decision, but routes nothing (env ROUTER_SHADOW)",
    )
    add_admission_arguments(parser)
    add_health_arguments(parser)
    add_remote_prefill_arguments(parser)
    return parser.parse_args()


def policy_name(text: str) -> str:
    try:
        load_policy(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


if __name__ == "__main__":
    run(worker, parse_args(), "router")
