"""How an engine learns where another one has left the KV cache of a prompt."""

from typing import Any, Literal

import msgspec

Role = Literal["aggregated", "prefill", "decode"]
ROLES: tuple[Role, ...] = ("aggregated", "prefill", "decode")

# Received KV waits in memory until its request runs; so many prompts' at most.
MAX_RECEIVED = 16


class KvDescriptor(msgspec.Struct, omit_defaults=True):
    """The KV of a prompt's first `tokens` tokens, for engines of the same `model` to fetch.

    `kind` names the way of transfer; what `data` means is its own affair. Bytes of the cache
    never travel in here.
    """

    kind: str
    tokens: int
    data: dict[str, Any] = {}
    model: str = ""
