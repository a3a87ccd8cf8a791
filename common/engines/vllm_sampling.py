"""What a request asks for in vLLM's words, and vLLM's log probabilities in ours."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from common.engines.json_schema import schema_error
from common.engines.llguidance_schema import engine_schema
from common.engines.scheduled_request import ScheduledRequest
from common.protocol import PipelineError, SamplingParams, TokenLogprobs

# vLLM's NixlConnector: "compute the prompt and keep its KV for another engine to fetch".
# Source: vllm/distributed/kv_transfer/kv_connector/v1/nixl.
REMOTE_DECODE = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


def prefill_params() -> Any:
    """The `SamplingParams` of a request whose prompt alone is to be computed."""
    import vllm

    # One token is the least vLLM makes. It must end by length: else the KV is not kept.
    return vllm.SamplingParams(
        max_tokens=1,
        temperature=0,
        ignore_eos=True,
        detokenize=False,
        extra_args={"kv_transfer_params": dict(REMOTE_DECODE)},
    )


def decode_params(request: ScheduledRequest, kv_transfer: dict[str, Any] | None) -> Any:
    """The `SamplingParams` of a request that was checked.

    Of an output that another engine began, vLLM knows nothing: to it, that is prompt. So the
    tokens in it count for `frequency_penalty` through a bias, and a request is refused whose
    random numbers (`seed`), `presence_penalty` or `json_schema` would have to go on.

    Raises:
        PipelineError: kind `invalid_request`, naming the field that vLLM refuses.
    """
    import vllm
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    sampling, generated = request.sampling, request.generated
    if generated:
        _check_can_go_on(sampling)
    structured = None
    if sampling.json_schema is not None:
        for name in ("min_tokens", "ignore_eos"):
            if getattr(sampling, name):
                message = f"{name} cannot be combined with a JSON schema"
                raise PipelineError("invalid_request", message, name)
        structured = StructuredOutputsParams(json=engine_schema(sampling.json_schema))
    try:
        return vllm.SamplingParams(
            max_tokens=request.max_tokens - generated,
            min_tokens=max(sampling.min_tokens - generated, 0),
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            # Not negative: -1 means no seed to vLLM.
            seed=None if sampling.seed is None else sampling.seed % 2**63,
            frequency_penalty=sampling.frequency_penalty,
            presence_penalty=sampling.presence_penalty,
            logit_bias=_logit_bias(request) or None,
            stop_token_ids=sampling.stop_token_ids,
            ignore_eos=sampling.ignore_eos,
            logprobs=sampling.logprobs,
            structured_outputs=structured,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args={"kv_transfer_params": kv_transfer} if kv_transfer else None,
        )
    except Exception as error:
        raise refusal(error, sampling) from error


def refusal(error: BaseException, sampling: SamplingParams) -> PipelineError:
    """The reason of vLLM to refuse a request; it names the field, in an attribute or in words."""
    message = " ".join(str(error).split())
    field = getattr(error, "parameter", None) or message.partition(" ")[0]
    if field in sampling.__struct_fields__:
        return PipelineError("invalid_request", f"vLLM refuses the request: {message:.300}", field)
    if sampling.json_schema is not None:
        return schema_error(message)
    return PipelineError("invalid_request", f"vLLM refuses the request: {message:.300}")


def token_logprobs(
    token_ids: Sequence[int], positions: Sequence[dict[int, Any]], count: int
) -> list[TokenLogprobs]:
    """The log probabilities of vLLM: a dict for each position, the chosen token in it."""
    result = []
    for token, position in zip(token_ids, positions, strict=True):
        best = sorted((entry.rank, other) for other, entry in position.items())[:count]
        top = [(other, position[other].logprob) for _, other in best]
        result.append(TokenLogprobs(position[token].logprob, top))
    return result


def _check_can_go_on(sampling: SamplingParams) -> None:
    needed = {
        "seed": sampling.seed is not None and sampling.temperature > 0,
        "presence_penalty": sampling.presence_penalty != 0,
        "json_schema": sampling.json_schema is not None,
    }
    if names := [name for name, is_needed in needed.items() if is_needed]:
        message = f"vLLM cannot go on with what another engine began if {names[0]} is set"
        raise PipelineError("invalid_request", message, "generated")


def _logit_bias(request: ScheduledRequest) -> dict[int, float]:
    sampling = request.sampling
    bias: defaultdict[int, float] = defaultdict(float)
    for token, value in sampling.logit_bias:
        bias[token] += value
    if sampling.frequency_penalty:
        for token, count in Counter(request.output).items():
            bias[token] -= count * sampling.frequency_penalty
    return dict(bias)
