"""Choosing the next token of one request from the model's logits.

The logits are edited in place, then llama.cpp's samplers run on them in the order of vLLM and
SGLang: temperature, top_k, top_p, min_p.
"""

import ctypes as c
import random
import secrets
from collections import Counter

from common.engines.grammar import matcher_error
from common.engines.json_schema import schema_error
from common.engines.llama_context import LlamaContext
from common.engines.llama_structs import TokenData, TokenDataArray
from common.engines.scheduled_request import ScheduledRequest
from common.protocol import SamplingParams, TokenLogprobs

import numpy as np
from llguidance import LLMatcher
from numpy.typing import NDArray

# Below it the scaled logits leave the range of a float; the choice is greedy long before.
_MIN_TEMPERATURE = 1e-4


class Sampler:
    """One request's sampler; `close` frees what it has in llama.cpp."""

    def __init__(
        self, context: LlamaContext, request: ScheduledRequest, matcher: LLMatcher | None
    ) -> None:
        params = request.sampling
        self._context = context
        self._request = request
        self._params = params
        self._matcher = matcher
        self._mask = np.zeros((context.vocab.n_tokens + 31) // 32, np.int32)
        self._bias_ids = np.array([token for token, _ in params.logit_bias], np.int64)
        self._biases = np.array([bias for _, bias in params.logit_bias], np.float32)
        self._stop_ids = np.array(sorted(request.stop_ids), np.int64)
        self._counts = Counter(request.output)
        self._penalised = params.frequency_penalty != 0 or params.presence_penalty != 0
        self._chain = (
            _sampler_chain(context, params, request.output_length)
            if params.temperature >= _MIN_TEMPERATURE
            else None
        )

    @property
    def is_complete(self) -> bool:
        """Whether the JSON document is finished, so that nothing may follow."""
        return self._matcher is not None and self._matcher.is_stopped()

    def sample(self, index: int) -> tuple[int, TokenLogprobs | None]:
        """The next token, from the logits that the last batch has at `index`.

        Raises:
            PipelineError: kind `invalid_request`, the JSON schema allows no token, or llguidance
                gave up on it.
        """
        logits = self._context.logits(index)
        raw = None if self._params.logprobs is None else _log_softmax(logits)
        self._edit(logits)
        if self._chain is None:
            token = int(logits.argmax())
        else:
            lib, handle = self._context.lib, self._context.handle
            token = lib.llama_sampler_sample(self._chain, handle, index)
        self._accept(token)
        return token, None if raw is None else _top(raw, token, self._params.logprobs or 0)

    def close(self) -> None:
        if self._chain is not None:
            self._context.lib.llama_sampler_free(self._chain)
            self._chain = None

    def _edit(self, logits: NDArray[np.float32]) -> None:
        if self._penalised and self._counts:
            # OpenAI: logit -= count * frequency_penalty + (count > 0) * presence_penalty
            ids = np.fromiter(self._counts.keys(), np.int64)
            counts = np.fromiter(self._counts.values(), np.float32)
            logits[ids] -= counts * self._params.frequency_penalty + self._params.presence_penalty
        np.add.at(logits, self._bias_ids, self._biases)
        if self._matcher is not None:
            self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
            if self._matcher.is_error():
                raise schema_error(matcher_error(self._matcher))
            allowed = np.unpackbits(self._mask.view(np.uint8), bitorder="little")
            logits[allowed[: logits.size] == 0] = -np.inf
        elif self._request.output_length < self._params.min_tokens:
            logits[self._stop_ids] = -np.inf

    def _accept(self, token: int) -> None:
        if self._penalised:
            self._counts[token] += 1
        if self._matcher is not None and not self._matcher.consume_token(token):
            raise schema_error(matcher_error(self._matcher))


def _sampler_chain(context: LlamaContext, params: SamplingParams, drawn: int) -> int:
    lib = context.lib
    chain: int = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
    if params.temperature != 1:
        lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_temp(params.temperature))
    if params.top_k > 0:
        lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_top_k(params.top_k))
    if params.top_p < 1:
        lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_top_p(params.top_p, 1))
    if params.min_p > 0:
        lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_min_p(params.min_p, 1))
    last = lib.llama_sampler_init_dist(_seed(params.seed))
    _skip_draws(context, last, drawn)
    lib.llama_sampler_chain_add(chain, last)
    return chain


def _skip_draws(context: LlamaContext, dist: int, count: int) -> None:
    """Go to the random number of a later token: the sampler draws one each, whatever its choice."""
    only = TokenData()
    for _ in range(count):
        candidates = TokenDataArray(c.pointer(only), 1, -1, False)
        context.lib.llama_sampler_apply(dist, c.byref(candidates))


def _seed(seed: int | None) -> int:
    """32 bits for llama.cpp, to which 2**32 - 1 would mean a random seed."""
    if seed is None:
        return secrets.randbelow(2**32 - 1)
    return random.Random(seed).randrange(2**32 - 1)


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    shifted = logits - logits.max()
    result: NDArray[np.float32] = shifted - np.log(np.exp(shifted).sum())
    return result


def _top(logprobs: NDArray[np.float32], token: int, k: int) -> TokenLogprobs:
    best: list[int] = []
    if k > 0:
        candidates = np.argpartition(logprobs, -k)[-k:]
        best = candidates[np.argsort(-logprobs[candidates])].tolist()
    return TokenLogprobs(float(logprobs[token]), [(i, float(logprobs[i])) for i in best])
