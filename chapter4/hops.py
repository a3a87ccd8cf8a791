"""What lies behind the processor."""

from dataclasses import dataclass

from chapter4.remote_prefill import RemotePrefill
from chapter4.reports import Reporter

from dynamo.runtime import Client


@dataclass(frozen=True)
class Hops:
    """With `fallback`, engines take turns if no router is up."""

    model: str
    engine: Client
    router: Client
    router_state: Client
    reporter: Reporter
    prefill: RemotePrefill
    fallback: bool
