"""What policies are graded on: three workloads of several tenants each, drawn anew by a seed.

Each is made of `benchmarks.trace_workloads`, and no two tenants share a prefix:

- `chats`: three tenants with conversations, one with six times the requests of another;
- `documents`: two with questions about long documents, and one with few conversations;
- `rush`: conversations beside prompts of up to 100,000 tokens that nobody shares, on engines of
  which two have half the speed.
"""

import random
from dataclasses import dataclass

from benchmarks.trace import TraceRequest
from benchmarks.trace_engine import EngineSettings
from benchmarks.trace_workloads import WORKLOADS

import msgspec

ENGINES = 8
ENGINE = EngineSettings(cache_blocks=1000)
IDS_PER_TENANT = 10_000_000


@dataclass(frozen=True)
class Tenant:
    """One that has `share` of all requests, of a kind in `trace_workloads`."""

    name: str
    kind: str
    share: float


@dataclass(frozen=True)
class Workload:
    """`rate` in requests a second; `speeds` of the engines, 1 being that of `ENGINE`."""

    tenants: tuple[Tenant, ...]
    rate: float
    speeds: tuple[float, ...] = (1.0,) * ENGINES


GRADED = {
    "chats": Workload(
        (
            Tenant("shop", "chats", 0.6),
            Tenant("school", "chats", 0.3),
            Tenant("club", "chats", 0.1),
        ),
        rate=6.5,
    ),
    "documents": Workload(
        (
            Tenant("press", "documents", 0.6),
            Tenant("court", "documents", 0.3),
            Tenant("club", "chats", 0.1),
        ),
        rate=6.0,
    ),
    "rush": Workload(
        (
            Tenant("shop", "chats", 0.7),
            Tenant("press", "documents", 0.15),
            Tenant("batch", "mixed", 0.15),
        ),
        rate=5.5,
        speeds=(0.5, 0.5, *(1.0,) * (ENGINES - 2)),
    ),
}


def graded_trace(name: str, seed: int, count: int) -> list[TraceRequest]:
    """About `count` requests, in the order of their arrival."""
    graded = GRADED[name]
    made = []
    for number, tenant in enumerate(graded.tenants):
        rng = random.Random(f"{name}/{tenant.name}/{seed}")
        requests = round(count * tenant.share)
        for request in WORKLOADS[tenant.kind](rng, requests, count / graded.rate):
            made.append(
                msgspec.structs.replace(
                    request,
                    hash_ids=[number * IDS_PER_TENANT + block for block in request.hash_ids],
                    tenant=tenant.name,
                    session=request.session and f"{tenant.name}/{request.session}",
                )
            )
    return sorted(made, key=lambda request: request.timestamp)
