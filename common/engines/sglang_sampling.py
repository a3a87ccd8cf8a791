"""Our sampling parameters in SGLang's words.

A request that continues an output differs from one that was not interrupted in one thing:
SGLang counts for its penalties only what it generated itself. So the tokens that came before have
their penalties as a bias, which is the same but for `presence_penalty` of a token that comes
again: that is charged twice. Random numbers depend on seed and position alone and go on.
"""

import random
from collections import Counter
from typing import Any

from common.engines.llguidance_schema import engine_schema
from common.engines.scheduled_request import ScheduledRequest
from common.engines.sglang_settings import SGLangSettings
from common.protocol import PipelineError, SamplingParams

_SEEDS = range(-(2**63), 2**63)


def generate_arguments(request: ScheduledRequest, settings: SGLangSettings) -> dict[str, Any]:
    """The arguments of `Engine.async_generate` for a request.

    Raises:
        PipelineError: kind `invalid_request`: SGLang cannot do that, as it was started or at all.
    """
    sampling = request.sampling
    _check(request, settings)
    json_schema = sampling.json_schema
    if json_schema is not None:
        json_schema = engine_schema(json_schema)
    seed = sampling.seed
    if settings.has_seeds and seed is None:
        seed = random.getrandbits(63)  # SGLang would give every request the same
    # With `ignore_eos` stop ids are ignored, too: the engine looks for them itself.
    min_tokens = max(sampling.min_tokens - request.generated, 0)
    if sampling.ignore_eos and not sampling.stop_token_ids:
        min_tokens = 0
    arguments: dict[str, Any] = {
        "input_ids": request.tokens,
        "sampling_params": {
            "max_new_tokens": request.max_tokens - request.generated,
            "min_new_tokens": min_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "min_p": sampling.min_p,
            "sampling_seed": seed,
            "frequency_penalty": sampling.frequency_penalty,
            "presence_penalty": sampling.presence_penalty,
            "logit_bias": _logit_bias(sampling, request.output) or None,
            "stop_token_ids": sampling.stop_token_ids or None,
            "ignore_eos": sampling.ignore_eos,
            "json_schema": json_schema,
        },
    }
    if sampling.logprobs is not None:
        arguments |= {"return_logprob": True, "top_logprobs_num": sampling.logprobs}
    return arguments


def _check(request: ScheduledRequest, settings: SGLangSettings) -> None:
    sampling = request.sampling
    if sampling.json_schema is not None:
        for name in ("min_tokens", "ignore_eos"):
            if getattr(sampling, name):
                raise _refused(name, f"{name} cannot be combined with a JSON schema")
        if request.generated:
            raise _refused("generated", "SGLang begins a JSON document only at its beginning")
    if not settings.has_tokenizer:
        why = "SGLang was started with --grammar-backend none, which leaves its tokenizer out"
        for name in ("json_schema", "min_tokens"):
            if getattr(sampling, name):
                raise _refused(name, f"{name} is not possible: {why}")
    if sampling.seed is not None:
        if sampling.temperature > 0 and not settings.has_seeds:
            needed = "SGLang has seeds only when started with --enable-deterministic-inference"
            raise _refused("seed", f"seed is not possible: {needed}")
        if sampling.seed not in _SEEDS:
            limits = f"from {_SEEDS.start} to {_SEEDS.stop - 1}"
            raise _refused("seed", f"seed is {sampling.seed}; it must be {limits}")


def _logit_bias(sampling: SamplingParams, generated: list[int]) -> dict[str, float]:
    bias = dict(sampling.logit_bias)
    if sampling.frequency_penalty or sampling.presence_penalty:
        for token, count in Counter(generated).items():
            penalty = sampling.frequency_penalty * count + sampling.presence_penalty
            bias[token] = bias.get(token, 0.0) - penalty
    return {str(token): value for token, value in bias.items()}


def _refused(name: str, message: str) -> PipelineError:
    return PipelineError("invalid_request", message, name)
