import math
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

from common.engines.llama_context import ContextSize, LlamaContext
from common.engines.sampling import Sampler
from common.engines.scheduled_request import ScheduledRequest
from common.model_files import DEFAULT_MODEL, find_model
from common.protocol import SamplingParams
from tests.common.engines.engine_helpers import FakeContext

import numpy as np
import pytest
from numpy.typing import NDArray


def a_request(**sampling: Any) -> ScheduledRequest:
    return ScheduledRequest(
        tokens=[1],
        max_tokens=100,
        stop_ids=frozenset(sampling.get("stop_token_ids", [])),
        sampling=SamplingParams(**sampling),
        context=FakeContext(),
    )


class FixedLogits:
    """A context whose model always says the same; enough for greedy sampling."""

    def __init__(self, logits: list[float]) -> None:
        self.model_says = np.array(logits, np.float32)
        self.edited: NDArray[np.float32] = self.model_says
        self.vocab = SimpleNamespace(n_tokens=len(logits))

    def logits(self, index: int) -> NDArray[np.float32]:
        self.edited = self.model_says.copy()
        return self.edited


def greedy(logits: list[float], steps: int, **sampling: Any) -> tuple[list[int], list[float]]:
    """The tokens chosen, and the logits as they were edited for the last one."""
    context = FixedLogits(logits)
    request = a_request(temperature=0, **sampling)
    sampler = Sampler(cast(LlamaContext, context), request, None)
    for _ in range(steps):
        request.tokens.append(sampler.sample(0)[0])
    return request.tokens[1:], context.edited.tolist()


def test_penalties_follow_the_formula_of_openai() -> None:
    tokens, edited = greedy([5.0, 4.0, 1.0], 5, frequency_penalty=0.5, presence_penalty=0.75)
    # 5.0 | 3.75 4.0 | 3.75 2.75 | 3.25 2.75 | 2.75 2.75 -> the lower id
    assert tokens == [0, 1, 0, 0, 0]
    assert edited == [5.0 - 3 * 0.5 - 0.75, 4.0 - 0.5 - 0.75, 1.0]


def test_negative_penalties_reward_repetition() -> None:
    tokens, edited = greedy([1.0, 1.5], 3, frequency_penalty=-1.0)
    assert tokens == [1, 1, 1]
    assert edited == [1.0, 3.5]


def test_logit_bias_adds_up_also_for_a_token_named_twice() -> None:
    tokens, edited = greedy([1.0, 2.0, 3.0], 1, logit_bias=[(0, 1.5), (0, 1.0), (2, -2.0)])
    assert tokens == [0]
    assert edited == [3.5, 2.0, 1.0]


def test_stop_ids_are_masked_until_min_tokens() -> None:
    tokens, _ = greedy([1.0, 2.0, 3.0], 4, min_tokens=2, stop_token_ids=[1, 2])
    assert tokens == [0, 0, 2, 2]


@pytest.fixture(scope="module")
def llama() -> Iterator[LlamaContext]:
    size = ContextSize(cells=256, sequences=1, batch=32, threads=1, batch_threads=2)
    context = LlamaContext(find_model(DEFAULT_MODEL), size)
    yield context
    context.close()


@pytest.mark.parametrize(
    ("sampling", "scale", "kept"),
    [
        ({}, 1.0, None),
        ({"temperature": 0.5}, 2.0, None),
        ({"temperature": 2.0, "top_k": 3}, 0.5, 3),
        ({"top_p": 0.4}, 1.0, "top_p"),
        ({"min_p": 0.3}, 1.0, "min_p"),
    ],
)
def test_tokens_are_drawn_with_the_probability_that_the_parameters_ask_for(
    llama: LlamaContext, sampling: dict[str, Any], scale: float, kept: Any
) -> None:
    """Guards the C signatures, the order of the samplers and the seeding at once."""
    llama.clear()
    prompt = llama.vocab.encode("Once upon a time there was a")
    for position, token in enumerate(prompt):
        index = llama.add(token, position, 0, logits=position == len(prompt) - 1)
    llama.decode()
    logits = llama.logits(index).astype(np.float64)
    scaled = np.exp((logits - logits.max()) * scale)
    order = np.argsort(-scaled)
    p = scaled / scaled.sum()
    if isinstance(kept, int):
        p[order[kept:]] = 0
    elif kept == "top_p":
        p[order[int(np.searchsorted(p[order].cumsum(), 0.4)) + 1 :]] = 0
    elif kept == "min_p":
        p[p < 0.3 * p.max()] = 0
    p /= p.sum()
    draws: Counter[int] = Counter()
    for seed in range(600):
        sampler = Sampler(llama, a_request(seed=seed, **sampling), None)
        draws[sampler.sample(index)[0]] += 1
        sampler.close()
    assert all(p[token] > 0 for token in draws)
    for token in order[:3]:
        sigma = math.sqrt(p[token] * (1 - p[token]) / 600)
        assert draws[int(token)] / 600 == pytest.approx(p[token], abs=4.5 * sigma + 1e-9)


@pytest.mark.parametrize("seed", [0, -1, 2**32 - 1, 2**63, -(2**63)])
def test_any_integer_is_a_reproducible_seed(llama: LlamaContext, seed: int) -> None:
    llama.clear()
    index = llama.add(1000, 0, 0, logits=True)
    llama.decode()

    def sample() -> list[int]:
        sampler = Sampler(llama, a_request(seed=seed), None)
        tokens = [sampler.sample(index)[0] for _ in range(10)]
        sampler.close()
        return tokens

    assert sample() == sample()


def test_a_temperature_close_to_zero_is_greedy(llama: LlamaContext) -> None:
    llama.clear()
    index = llama.add(1000, 0, 0, logits=True)
    llama.decode()
    best = int(llama.logits(index).argmax())
    for temperature in (1e-30, 1e-5, 1e-3):
        sampler = Sampler(llama, a_request(temperature=temperature, seed=1), None)
        assert sampler.sample(index)[0] == best
        sampler.close()
