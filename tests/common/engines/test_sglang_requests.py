"""What SGLang is asked for and what is made of its answers; runs without SGLang."""

from types import SimpleNamespace
from typing import Any

from common.engines.llguidance_schema import engine_schema
from common.engines.scheduled_request import ScheduledRequest, schedule
from common.engines.sglang_output import Generated, read_output, refusal
from common.engines.sglang_sampling import generate_arguments
from common.engines.sglang_settings import SGLangSettings
from common.protocol import GenerateRequest, PipelineError, SamplingParams, TokenLogprobs
from tests.common.engines.engine_helpers import FakeContext

import pytest


def settings(**flags: Any) -> SGLangSettings:
    values = {"enable_deterministic_inference": False, "grammar_backend": "xgrammar", **flags}
    return SGLangSettings(SimpleNamespace(**values), "", "", "")


def scheduled(token_ids: list[int], generated: int = 0, **sampling: Any) -> ScheduledRequest:
    request = GenerateRequest(token_ids, SamplingParams(**sampling), generated)
    limits: Any = {"context_length": 100, "vocab_size": 1000, "eog_ids": frozenset()}
    return schedule(request, FakeContext(), **limits)


def arguments(token_ids: list[int], generated: int = 0, **sampling: Any) -> dict[str, Any]:
    return generate_arguments(scheduled(token_ids, generated, **sampling), settings())


def test_every_parameter_is_passed_on() -> None:
    """A new field of `SamplingParams` must be mapped, or refused, too."""
    given: dict[str, Any] = {
        "max_tokens": 20,
        "min_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "seed": 3,
        "frequency_penalty": 0.2,
        "presence_penalty": 0.3,
        "logit_bias": [(5, 1.5)],
        "stop_token_ids": [9],
        "ignore_eos": True,
        "logprobs": 2,
    }
    assert {*given, "json_schema"} == set(SamplingParams.__struct_fields__)
    deterministic = settings(enable_deterministic_inference=True)
    asked = generate_arguments(scheduled([1, 2, 3], **given), deterministic)
    assert asked == {
        "input_ids": [1, 2, 3],
        "return_logprob": True,
        "top_logprobs_num": 2,
        "sampling_params": {
            "max_new_tokens": 20,
            "min_new_tokens": 2,
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 7,
            "min_p": 0.1,
            "sampling_seed": 3,
            "frequency_penalty": 0.2,
            "presence_penalty": 0.3,
            "logit_bias": {"5": 1.5},
            "stop_token_ids": [9],
            "ignore_eos": True,
            "json_schema": None,
        },
    }
    null = '{"type": "null"}'
    schema = arguments([1], json_schema=null)["sampling_params"]
    assert schema["json_schema"] == engine_schema(null)
    assert (schema["top_k"], schema["max_new_tokens"]) == (-1, 99)


def test_what_another_engine_generated_counts() -> None:
    asked = arguments(
        [1, 2, 3, 4, 4],
        generated=3,
        max_tokens=10,
        min_tokens=5,
        logit_bias=[(4, 1.0)],
        frequency_penalty=0.5,
        presence_penalty=0.25,
    )
    sampling = asked["sampling_params"]
    assert asked["input_ids"] == [1, 2, 3, 4, 4]
    assert (sampling["max_new_tokens"], sampling["min_new_tokens"]) == (7, 2)
    assert sampling["logit_bias"] == {"3": -0.75, "4": 1.0 - 2 * 0.5 - 0.25}


def test_requests_without_a_seed_differ() -> None:
    """SGLang would give all of them the same one."""
    deterministic = settings(enable_deterministic_inference=True)
    seeds = {
        generate_arguments(scheduled([1]), deterministic)["sampling_params"]["sampling_seed"]
        for _ in range(3)
    }
    assert len(seeds) == 3


@pytest.mark.parametrize(
    ("param", "sampling", "flags"),
    [
        ("seed", {"seed": 1}, {}),
        ("seed", {"seed": 2**63}, {"enable_deterministic_inference": True}),
        ("json_schema", {"json_schema": "{}"}, {"grammar_backend": "none"}),
        ("min_tokens", {"min_tokens": 1}, {"grammar_backend": "none"}),
        ("min_tokens", {"min_tokens": 1, "json_schema": "{}"}, {}),
        ("ignore_eos", {"ignore_eos": True, "json_schema": "{}"}, {}),
        ("generated", {"generated": 1, "json_schema": "{}"}, {}),
    ],
)
def test_what_it_cannot_do(param: str, sampling: dict[str, Any], flags: dict[str, Any]) -> None:
    with pytest.raises(PipelineError) as error:
        generate_arguments(scheduled([1, 2], **sampling), settings(**flags))
    assert (error.value.info.kind, error.value.info.param) == ("invalid_request", param)


def test_a_greedy_request_may_have_a_seed() -> None:
    assert arguments([1], seed=1, temperature=0)["sampling_params"]["sampling_seed"] == 1


def output(tokens: list[int], finish: dict[str, Any] | None = None, **meta: Any) -> dict[str, Any]:
    return {"output_ids": tokens, "meta_info": {"finish_reason": finish, **meta}}


@pytest.mark.parametrize(
    ("tokens", "finish", "generated"),
    [
        ([5, 6], None, Generated([5, 6], None, None)),
        ([5, 2], {"type": "stop", "matched": 2}, Generated([5], None, "stop")),
        ([5], {"type": "stop", "matched": "text"}, Generated([5], None, "stop")),
        ([5], {"type": "length", "length": 1}, Generated([5], None, "length")),
        ([5], {"type": "abort", "status_code": None}, Generated([], None, "cancelled")),
    ],
)
def test_outputs(tokens: list[int], finish: dict[str, Any] | None, generated: Generated) -> None:
    assert read_output(scheduled([1]), output(tokens, finish)) == generated


def test_a_schema_that_sglang_could_not_keep_to() -> None:
    """It gives such a request up in the midst, and does not say why."""
    request = scheduled([1], json_schema="{}")
    given_up = output([5], {"type": "abort", "status_code": None})
    with pytest.raises(PipelineError) as error:
        read_output(request, given_up)
    assert (error.value.info.kind, error.value.info.param) == ("invalid_request", "json_schema")
    assert isinstance(request.context, FakeContext)
    request.context.stop()
    assert read_output(request, given_up) == Generated([], None, "cancelled")


def test_stop_ids_that_sglang_ignores() -> None:
    """It takes `ignore_eos` for every stop id."""
    request = scheduled([1], ignore_eos=True, stop_token_ids=[7])
    assert read_output(request, output([5, 7, 8])) == Generated([5], None, "stop")


def test_logprobs_of_what_is_left() -> None:
    meta = {
        "output_token_logprobs": [(-0.5, 5, None), (-0.1, 2, None)],
        "output_top_logprobs": [[(-0.5, 5, None), (-1.5, 6, None)], [(-0.1, 2, None)]],
    }
    stop = {"type": "stop", "matched": 2}
    generated = read_output(scheduled([1], logprobs=2), output([5, 2], stop, **meta))
    assert generated.logprobs == [TokenLogprobs(-0.5, [(5, -0.5), (6, -1.5)])]


@pytest.mark.parametrize(
    ("message", "status", "kind", "param"),
    [
        ("top_p must be in (0, 1], got 0.0.", 400, "invalid_request", "top_p"),
        ("max_new_tokens must be at least 0", 400, "invalid_request", "max_tokens"),
        ("Failed to compile json grammar: no", 400, "invalid_request", "json_schema"),
        ("Input length (9 tokens) exceeds", 400, "invalid_request", "token_ids"),
        ("The request queue is full.", 503, "overloaded", None),
        ("KV transfer failed", 500, "internal", None),
    ],
)
def test_refusals(message: str, status: int, kind: str, param: str | None) -> None:
    info = refusal(message, status).info
    assert (info.kind, info.param, info.message) == (kind, param, f"SGLang: {message}")
    if status != 200:
        finish = {"type": "abort", "message": message, "status_code": status}
        with pytest.raises(PipelineError) as error:
            read_output(scheduled([1]), output([29], finish))
        assert error.value.info == info
