"""A prompt that one SGLang computes for another: `--disaggregation-mode prefill` and `decode`.

The two find each other by themselves: each is told the address of the prefill engine's bootstrap
server and a room, the same random number for both. That is what our descriptor carries. The decode
engine reserves memory, the prefill engine writes the KV there, and the first token comes from the
decode engine.
"""

import logging
import random
from typing import Any

from common.engines.scheduled_request import ScheduledRequest
from common.protocol import GenerateRequest, PipelineError
from common.protocol_transfer import KvDescriptor

KIND = "sglang"
_FIELDS = {"bootstrap_host": str, "bootstrap_port": int, "bootstrap_room": int}

_log = logging.getLogger(__name__)


def check_mode(request: GenerateRequest, mode: str) -> None:
    """Refuse what an SGLang that was started with `--disaggregation-mode` `mode` cannot do.

    Raises:
        PipelineError: kind `invalid_request`.
    """
    if request.prefill_only and mode != "prefill":
        message = "SGLang was not started with --disaggregation-mode prefill"
        raise PipelineError("invalid_request", message, "prefill_only")
    if not request.prefill_only and mode == "prefill":
        message = "SGLang was started with --disaggregation-mode prefill and generates nothing"
        raise PipelineError("invalid_request", message, "prefill_only")
    if mode == "decode" and not (request.kv is not None and _is_usable(request.kv)):
        message = (
            "SGLang was started with --disaggregation-mode decode: another SGLang must compute "
            "the prompt"
        )
        raise PipelineError("invalid_request", message, "kv")
    if mode == "null" and request.kv is not None:
        _log.warning("computing a prompt that was handed over: this SGLang does not fetch KV")


def new_room(request: ScheduledRequest, host: str, port: int) -> KvDescriptor:
    """Where a decode engine will get the KV of a prompt that is computed here."""
    room = random.getrandbits(63)
    data = {"bootstrap_host": host, "bootstrap_port": port, "bootstrap_room": room}
    return KvDescriptor(KIND, request.prompt_length, data)


def room_arguments(kv: KvDescriptor) -> dict[str, Any]:
    """Arguments of `Engine.async_generate`, on both sides."""
    return {name: kv.data[name] for name in _FIELDS}


def bootstrap_address(server_args: Any) -> tuple[str, int]:
    """Host and port of the bootstrap server of a prefill engine, as other machines reach it."""
    from sglang.srt.utils.network import get_local_ip_auto

    host: str = server_args.host
    if host in ("", "0.0.0.0", "::"):  # noqa: S104 (not bound to)
        host = get_local_ip_auto()
    return host, server_args.disaggregation_bootstrap_port


def _is_usable(kv: KvDescriptor) -> bool:
    return kv.kind == KIND and all(
        isinstance(kv.data.get(name), kind) for name, kind in _FIELDS.items()
    )
