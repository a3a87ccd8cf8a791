"""What the replicas of a router tell each other, over ZMQ in the frames of KV events.

Frames: topic, sequence number (8 bytes, big-endian), payload (a msgpack `ReplicaBatch`).

router --{}--> router.replica_source    <--ReplicaSource--
router --{}--> router.replica_snapshot  <--ReplicaSnapshotPart-- (a stream)
"""

from common.protocol_routing import RequestReport

import msgspec


class Routed(msgspec.Struct, array_like=True, tag=True):
    """A request was sent to an engine, `age_s` ago.

    `names` are those of its full blocks (`index.prefix_name`, alike in all routers that run the
    same Python), of which the engine has the first `overlap`. Of its prompt, `own_tokens` are
    to be computed, and with those sent there before it `tokens`. It takes `own_blocks` that no
    other request can share. It `waits` if others do. `router` is the topic of the one that
    chose, if that is not the one that says so. Before it comes, another engine is to compute
    `elsewhere` tokens. Its `session` is expected back `next_turn_s` after its end, and its blocks
    are kept for `retain_s`.
    """

    request_id: str
    instance: int
    names: list[int]
    overlap: int
    own_tokens: int
    tokens: int
    own_blocks: int
    waits: bool = False
    age_s: float = 0.0
    router: str = ""
    elsewhere: int = 0
    session: str = ""
    next_turn_s: float | None = None
    retain_s: float = 0.0


class Reported(msgspec.Struct, array_like=True, tag=True):
    """What a processor said became of a request."""

    report: RequestReport


class EngineFailed(msgspec.Struct, array_like=True, tag=True):
    """An engine failed a request; this is its next attempt's id, or empty."""

    instance: int
    request_id: str = ""


class PolicyChanged(msgspec.Struct, array_like=True, tag=True):
    """The policies since `time` (seconds since 1970); the latest change counts everywhere."""

    time: float
    policy: str
    shadow: str = ""


ReplicaMessage = Routed | Reported | EngineFailed | PolicyChanged


class ReplicaBatch(msgspec.Struct, array_like=True):
    """Some messages, in order; an empty one is a sign of life."""

    messages: list[ReplicaMessage]


class ReplicaSource(msgspec.Struct, omit_defaults=True):
    """Where a router publishes: a ZMQ address, and the topic, which is this process's own."""

    topic: str
    address: str


class ReplicaSnapshotPart(msgspec.Struct, omit_defaults=True):
    """Some of what a router knows in the state after batch `seq`: a msgpack `ReplicaBatch`.

    All parts have the same `seq`; there is at least one.
    """

    seq: int
    batch: bytes
