"""Messages of the router and of the engine's side that feeds it.

processor --FindWorkerRequest--> router    <--FindWorkerOutput--
router    --{}-----------------> engine.kv_source    <--KvSource--
router    --{}-----------------> engine.kv_snapshot  <--KvSnapshotPart-- (a stream)
scripts   --StateRequest-----> router.state        <--WorkerState----- (a stream)
"""

from typing import Annotated, Literal

from common.protocol import EngineInfo, EngineMetrics, ErrorInfo
from common.protocol_transfer import Role

import msgspec

Policy = Literal["kv", "least_loaded", "round_robin", "random"]
State = Literal["starting", "ready", "silent", "failed"]
TokenId = Annotated[int, msgspec.Meta(ge=0, lt=2**32)]  # what the runtime's hash takes


class FindWorkerRequest(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    """Asks which engine is to run this prompt.

    `excluded` names instances that are not to have this request. `failed` names those that have
    just failed it: the router forgets what they had cached, and nobody is sent there until they
    have given a new snapshot.
    """

    token_ids: list[TokenId]
    model: str
    excluded: list[int] = []
    failed: list[int] = []


class Candidate(msgspec.Struct, omit_defaults=True):
    """An engine at the moment of a decision, with what was just routed to it counted in.

    `kv_usage` (0 to 1) is the share of its blocks that running requests hold. `score` is the
    policy's, higher is better, and only the `kv` and `least_loaded` policies have one.
    """

    instance_id: int
    worker_id: int
    overlap_blocks: int
    kv_usage: float
    running: int
    waiting: int
    score: float | None = None


class FindWorkerOutput(msgspec.Struct, omit_defaults=True):
    """The choice and why, or the `error`; `candidates` holds every engine considered.

    `overlap_blocks` and `overlap_tokens` are the part of the prompt that the chosen engine has
    cached, or will have when what was just routed to it is computed.
    """

    instance_id: int = 0
    worker_id: int = 0
    overlap_blocks: int = 0
    overlap_tokens: int = 0
    reason: str = ""
    candidates: list[Candidate] = []
    error: ErrorInfo | None = None


class KvSource(msgspec.Struct, omit_defaults=True):
    """Where an engine publishes: ZMQ addresses, and the topic, which is this process's own.

    `tags` are words that say what kind of engine it is, for policies. One whose `role` is
    `prefill` computes prompts for those whose role is `decode`.
    """

    info: EngineInfo
    topic: str
    events: str
    metrics: str
    tags: list[str] = []
    role: Role = "aggregated"


class KvSnapshotPart(msgspec.Struct, omit_defaults=True):
    """Some of what is cached, in the state after event batch `seq`; all parts have the same.

    `events` is a msgpack list of `BlockStored`; a block never stands before its parent.
    """

    seq: int
    events: bytes


class StateRequest(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    """Asks what the router believes; with `blocks`, also which blocks each engine has cached."""

    blocks: bool = False


class WorkerState(msgspec.Struct, omit_defaults=True):
    """What the router believes about an engine; `state` says whether it would be chosen."""

    instance_id: int
    worker_id: int
    model: str
    state: State
    blocks: int
    metrics: EngineMetrics | None = None
    block_hashes: list[int] = []
