"""Requests that the contract's tests have in common."""

import itertools
import random
from typing import Any

from common.engines.base import Engine
from common.protocol import EngineMetrics, GenerateRequest, PipelineError, SamplingParams
from tests.chapter1.helpers import eventually
from tests.common.engines.engine_helpers import FakeContext, Result

import pytest

CAPITAL = [504, 3575, 282, 4649, 314]  # "The capital of France is", in SmolLM2's vocabulary
PARIS = 7042

# "1, 2, 3, 4, 5,", less than a block: the model is sure how to go on, and rounding, which differs
# with what else is in a batch, does not decide.
COUNT = [33, 28, 216, 34, 28, 216, 35, 28, 216, 36, 28, 216, 37, 28]

_numbers = itertools.count()


async def ask(engine: Engine, token_ids: list[int], generated: int = 0, **sampling: Any) -> Result:
    """The whole answer; greedy unless a temperature is given."""
    sampling.setdefault("temperature", 0)
    request = GenerateRequest(token_ids, SamplingParams(**sampling), generated)
    return Result([item async for item in engine.generate(request, FakeContext())])


def new_prompt(length: int) -> list[int]:
    """A prompt that no test has used before."""
    numbers = random.Random(f"prompt {next(_numbers)}")
    return [numbers.randrange(1000, 3000) for _ in range(length)]


async def refused(engine: Engine, token_ids: list[int], param: str, **fields: Any) -> str:
    """Assert that a request is refused for a field; why, in words."""
    with pytest.raises(PipelineError) as error:
        await ask(engine, token_ids, **fields)
    assert error.value.info.kind == "invalid_request"
    assert error.value.info.param == param
    return error.value.info.message


async def idle(engine: Engine) -> EngineMetrics:
    """The load, once nothing is in the engine."""

    def is_idle() -> bool:
        load = engine.metrics()
        return (load.running, load.waiting, load.used_blocks) == (0, 0, 0)

    await eventually(is_idle, timeout=60)
    return engine.metrics()
