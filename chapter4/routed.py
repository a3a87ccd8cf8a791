"""A decision as what it means for the load of the engine that was chosen."""

from chapter4.decision import Decision
from chapter4.disaggregation import is_prefill_id
from common.protocol_replicas import Routed


def routed_as(request_id: str, decision: Decision, names: list[int], *, waits: bool) -> Routed:
    """What the routers count; `names` are those of the prompt's blocks."""
    view, request = decision.worker, decision.snapshot.request
    own_tokens, elsewhere = round(view.new_tokens), 0
    if decision.prefill is not None:
        own_tokens, elsewhere = 0, own_tokens
    return Routed(
        request_id,
        view.instance_id,
        names,
        view.overlap_blocks,
        own_tokens=own_tokens,
        tokens=view.prefill_tokens + own_tokens,
        own_blocks=1 + round(request.output_tokens / view.block_size),
        waits=waits,
        elsewhere=elsewhere,
        session="" if is_prefill_id(request_id) else request.session,
        next_turn_s=request.next_turn_s,
        retain_s=request.retain_s,
    )
