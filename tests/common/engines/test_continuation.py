"""An output that another engine began: with `generated` it goes on as if nothing had happened."""

import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

from common.engines.base import Engine
from common.engines.llama_capi import Vocab
from common.engines.llamacpp import LlamaCppEngine, LlamaCppSettings
from common.engines.simulated import SimulatedEngine, SimulatedSettings
from common.model_files import DEFAULT_MODEL, find_model
from common.protocol import EngineOutput, GenerateRequest, PipelineError, SamplingParams
from tests.common.engines.engine_helpers import ONE_THREAD, FakeContext, Result, collect

import pytest
import pytest_asyncio

pytestmark = pytest.mark.asyncio(loop_scope="module")

FAST = {"prefill_tokens_per_s": 1e6, "decode_base_ms": 0.1, "decode_ms_per_request": 0.01}
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 12},
            "population": {"type": "integer", "minimum": 1000, "maximum": 99999999},
            "tags": {"type": "array", "items": {"enum": ["old", "big"]}, "maxItems": 2},
        },
        "required": ["city", "population", "tags"],
        "additionalProperties": False,
    }
)


async def go_on(engine: Engine, prompt: list[int], generated: list[int], **sampling: Any) -> Result:
    """What the engine adds to an output that began with `generated`."""
    request = GenerateRequest(
        [*prompt, *generated], SamplingParams(**sampling), generated=len(generated)
    )
    return Result([item async for item in engine.generate(request, FakeContext())])


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=[False, True])
async def simulated(request: pytest.FixtureRequest) -> AsyncIterator[SimulatedEngine]:
    """One that takes its time, and one with zero delay."""
    fast: dict[str, Any] = {**FAST, "context_length": 512, "mean_output_tokens": 40}
    engine = await SimulatedEngine.start(SimulatedSettings(**fast, zero_delay=request.param))
    yield engine
    await engine.close()


@pytest.mark.parametrize(
    "sampling",
    [
        {"max_tokens": 60},
        {"max_tokens": None},
        {"max_tokens": None, "min_tokens": 50},
        {"max_tokens": None, "ignore_eos": True},
    ],
)
async def test_a_simulated_output_goes_on_from_every_point(
    simulated: SimulatedEngine, sampling: dict[str, Any]
) -> None:
    """Also one that ends by itself, and one that ends where the context does."""
    prompt = [17, 4, 2]
    whole = await collect(simulated, prompt, **sampling)
    tokens = whole.token_ids
    step = max(7, len(tokens) // 10)
    for done in sorted({*range(0, len(tokens), step), 1, len(tokens) - 1}):
        rest = await go_on(simulated, prompt, tokens[:done], **sampling)
        assert tokens[:done] + rest.token_ids == tokens
        assert rest.finish_reason == whole.finish_reason


async def test_a_simulated_output_stops_where_it_would_have(simulated: SimulatedEngine) -> None:
    """`min_tokens` counts over both engines: here it lets the first stop token id pass."""
    tokens = (await collect(simulated, [5], max_tokens=40)).token_ids
    sampling = {"max_tokens": 40, "min_tokens": 12, "stop_token_ids": [tokens[8], tokens[20]]}
    for done in (3, 8, 9, 15, 20):
        rest = await go_on(simulated, [5], tokens[:done], **sampling)
        assert tokens[:done] + rest.token_ids == tokens[:20]
        assert rest.finish_reason == "stop"


@pytest.mark.parametrize(
    ("generated", "sampling", "message"),
    [
        (-1, {}, "generated is -1; of 6 token ids it must be from 0 to 5"),
        (6, {}, "generated is 6; of 6 token ids it must be from 0 to 5"),
        (4, {"max_tokens": 4}, "generated is 4; with room for 4 tokens of output nothing is left"),
    ],
)
async def test_how_much_is_generated_is_checked(
    simulated: SimulatedEngine, generated: int, sampling: dict[str, Any], message: str
) -> None:
    request = GenerateRequest([1, 2, 3, 4, 5, 6], SamplingParams(**sampling), generated)
    with pytest.raises(PipelineError, match=message) as caught:
        simulated.generate(request, FakeContext())
    assert (caught.value.info.kind, caught.value.info.param) == ("invalid_request", "generated")


async def test_the_prompt_of_a_continuation_is_all_that_comes_with_it(
    simulated: SimulatedEngine,
) -> None:
    """In the cache and in the metrics a generated token is one that has to be computed."""
    prompt = list(range(300, 340))
    tokens = (await collect(simulated, prompt, max_tokens=48)).token_ids
    before = simulated.metrics()
    rest = await go_on(simulated, prompt, tokens[:40], max_tokens=48)
    after = simulated.metrics()
    assert rest.items[0].cached_tokens == 64  # of 80 in blocks of 16: one token is always left
    assert after.prompt_tokens - before.prompt_tokens == 80
    assert after.output_tokens - before.output_tokens == 8


@dataclass
class Llama:
    """An engine, and another one that has not seen what the first did."""

    first: LlamaCppEngine
    second: LlamaCppEngine
    vocab: Vocab

    def chat(self, question: str) -> list[int]:
        return self.vocab.encode(
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        )

    def text(self, tokens: list[int]) -> str:
        return b"".join(map(self.vocab.token_bytes, tokens)).decode()


@pytest.fixture(scope="module")
def vocab() -> Iterator[Vocab]:
    vocab = Vocab(find_model(DEFAULT_MODEL))
    yield vocab
    vocab.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def llama(vocab: Vocab) -> AsyncIterator[Llama]:
    small = LlamaCppSettings(cache_tokens=512, max_sequences=8, max_running=2, **ONE_THREAD)
    first = await LlamaCppEngine.start(small)
    try:
        second = await LlamaCppEngine.start(small)
        try:
            yield Llama(first, second, vocab)
        finally:
            await second.close()
    finally:
        await first.close()


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0},
        {"temperature": 0, "frequency_penalty": 1.5, "presence_penalty": 0.5},
        {"temperature": 0, "max_tokens": 30, "min_tokens": 30},
        {"seed": 11},
        {"seed": 12, "temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
        {"seed": 13, "top_k": 1, "frequency_penalty": 0.7},
    ],
    ids=str,
)
async def test_an_answer_goes_on_as_if_unbroken(llama: Llama, sampling: dict[str, Any]) -> None:
    """Penalties count what is there, random numbers go on with the next, limits hold for all."""
    sampling = {"max_tokens": 24, **sampling}
    prompt = llama.chat("Name some colours, one per line.")
    whole = await collect(llama.first, prompt, **sampling)
    tokens = whole.token_ids
    for done in (1, len(tokens) // 2):
        rest = await go_on(llama.second, prompt, tokens[:done], **sampling)
        assert tokens[:done] + rest.token_ids == tokens
        assert rest.finish_reason == whole.finish_reason


async def test_without_generated_penalties_and_seeds_would_begin_anew(llama: Llama) -> None:
    """What the field is for: the same tokens as a mere prompt give another answer."""
    prompt = llama.chat("Name some colours, one per line.")
    for sampling in ({"temperature": 0, "frequency_penalty": 1.5}, {"seed": 11}):
        tokens = (await collect(llama.first, prompt, max_tokens=24, **sampling)).token_ids
        rest = await collect(llama.second, prompt + tokens[:12], max_tokens=12, **sampling)
        assert tokens[:12] + rest.token_ids != tokens


async def test_log_probabilities_go_on(llama: Llama) -> None:
    prompt = llama.chat("What is the capital of France?")
    sampling: dict[str, Any] = {"temperature": 0, "max_tokens": 7, "logprobs": 3}
    whole = await collect(llama.first, prompt, **sampling)
    rest = await go_on(llama.second, prompt, whole.token_ids[:4], **sampling)
    assert [entry.logprob for entry in whole.logprobs[4:]] == pytest.approx(
        [entry.logprob for entry in rest.logprobs], abs=0.05
    )
    assert [entry.top[0][0] for entry in rest.logprobs] == whole.token_ids[4:]


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"seed": 5}], ids=str)
async def test_a_document_goes_on_in_the_middle_of_its_schema(
    llama: Llama, sampling: dict[str, Any]
) -> None:
    prompt = llama.chat("Describe Paris in JSON.")
    sampling = {"max_tokens": 60, "json_schema": SCHEMA, **sampling}
    whole = await collect(llama.first, prompt, **sampling)
    tokens = whole.token_ids
    document = json.loads(llama.text(tokens))
    assert whole.finish_reason == "stop"
    for done in (1, len(tokens) // 2, len(tokens) - 1):
        rest = await go_on(llama.second, prompt, tokens[:done], **sampling)
        assert json.loads(llama.text(tokens[:done] + rest.token_ids)) == document
        assert rest.finish_reason == "stop"


async def test_a_finished_document_is_not_gone_on_with(llama: Llama) -> None:
    """The engine died between the last token and the finish reason."""
    prompt = llama.chat("Describe Paris in JSON.")
    sampling: dict[str, Any] = {"max_tokens": 60, "json_schema": SCHEMA, "temperature": 0}
    tokens = (await collect(llama.first, prompt, **sampling)).token_ids
    rest = await go_on(llama.second, prompt, tokens, **sampling)
    assert rest.items == [
        EngineOutput([], worker_id=0, cached_tokens=0, finish_reason="stop",
                     timings=rest.items[0].timings)
    ]  # fmt: skip


async def test_tokens_that_the_schema_does_not_allow_are_refused(llama: Llama) -> None:
    prompt = llama.chat("Describe Paris in JSON.")
    with pytest.raises(PipelineError, match="JSON schema") as caught:
        await go_on(
            llama.second, prompt, llama.vocab.encode("Paris is"), json_schema=SCHEMA, max_tokens=9
        )
    assert caught.value.info.kind == "invalid_request"
