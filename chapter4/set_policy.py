"""Show or change the policy of a running pipeline's routers, and the one in its shadow.

scripts/set_policy                              what is in use, and how it does
scripts/set_policy kv                           from the next request on, this one
scripts/set_policy my_policy.py:best            a function of yours; the file is run anew
scripts/set_policy --shadow dynamo              score every decision with a second one, too
"""

import argparse
import asyncio
import os
import sys
from pathlib import Path

from chapter4.policy_loader import POLICIES
from common.errors import ComponentError
from common.protocol import from_wire, to_wire
from common.protocol_routing import PolicyRequest, PolicyState
from common.visitor import find, visit

from dynamo.runtime import Client, DistributedRuntime, dynamo_worker

ANSWER_S = 3.0


def absolute(name: str) -> str:
    """The policy's name as a router in any folder understands it."""
    path, colon, function = name.rpartition(":")
    return f"{Path(path).absolute()}:{function}" if colon and path.endswith(".py") else name


def described(state: PolicyState) -> list[str]:
    """How the policies do, in a few lines."""
    lines = [f"policy {state.policy}"]
    if state.failures:
        lines.append(f"  failed {times(state.failures)}, the last time because {state.failure}")
    if not state.shadow:
        return [*lines, "no shadow"]
    lines.append(
        f"shadow {state.shadow}: would have chosen otherwise in {state.disagreed} of "
        f"{state.shadowed} decisions; by its own score that is better by {state.regret:.4g} on "
        "average"
    )
    if state.shadow_failures:
        lines.append(
            f"  failed {times(state.shadow_failures)}, the last time because {state.shadow_failure}"
        )
    return lines


def times(number: int) -> str:
    return "once" if number == 1 else f"{number} times"


async def ask(router: Client, instance: int, wanted: PolicyRequest) -> PolicyState:
    """One router's answer.

    Raises:
        Exception: what the runtime raised: its process may be gone, and its lease not yet over.
    """
    async with asyncio.timeout(ANSWER_S):
        stream = await router.direct(to_wire(wanted), instance, annotated=False)
        (state,) = [from_wire(item, PolicyState) async for item in stream]
        return state


@dynamo_worker()
async def set_policy(runtime: DistributedRuntime, namespace: str, wanted: PolicyRequest) -> None:
    try:
        router = await find(runtime, namespace, "router.policy")
        instances = sorted(router.instance_ids())
        answers = await asyncio.gather(
            *(ask(router, instance, wanted) for instance in instances), return_exceptions=True
        )
    finally:
        runtime.shutdown()
    states: list[PolicyState] = []
    for instance, answer in zip(instances, answers, strict=True):
        if isinstance(answer, BaseException):
            print(f"router {instance:x} does not answer: {answer!r}", file=sys.stderr)
            continue
        states.append(answer)
        if answer.error is None:
            heading = [f"router {instance:x}:"] if len(instances) > 1 else []
            print("\n".join([*heading, *described(answer)]))
    errors = {state.error.message for state in states if state.error is not None}
    if errors:
        raise ComponentError("; ".join(sorted(errors)))
    if not states:
        raise ComponentError("no router answers")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="set_policy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "policy",
        nargs="?",
        type=absolute,
        metavar="NAME|FILE.py:FUNCTION",
        help=f"one of {', '.join(POLICIES)}, or a function of yours (default: stays as it is)",
    )
    shadow = parser.add_mutually_exclusive_group()
    shadow.add_argument(
        "--shadow",
        type=absolute,
        metavar="NAME|FILE.py:FUNCTION",
        help="a second policy that scores every decision, but routes nothing",
    )
    shadow.add_argument(
        "--no-shadow", dest="shadow", action="store_const", const="", help="end the shadow"
    )
    parser.add_argument(
        "--namespace",
        default=os.environ.get("DYN_NAMESPACE", "inference"),
        help="the pipeline's (env DYN_NAMESPACE, %(default)s)",
    )
    return parser.parse_args()


if __name__ == "__main__":
    args = parse_args()
    try:
        visit(set_policy, args.namespace, PolicyRequest(args.policy, args.shadow))
    except ComponentError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
