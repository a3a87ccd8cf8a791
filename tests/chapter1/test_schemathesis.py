"""Requests made from our own OpenAPI document never make the server fail, nor the document lie."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from launch.pipeline import Pipeline
from tests.chapter1.helpers import CHAT, MODEL

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.schemas import APIOperation
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance

Case = schemathesis.Case[Any]
Operation = APIOperation[Any, Any, Any, Any]

NOT_SIMULATED = (
    *("max_completion_tokens", "stream_options", "stop_token_ids"),
    *("logit_bias", "response_format", "logprobs", "top_logprobs"),
)
generated = settings(
    max_examples=50,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(params=[CHAT, "/v1/completions"])
def operation(shared_pipeline: Pipeline, request: pytest.FixtureRequest) -> Operation:
    schema = schemathesis.openapi.from_url(f"{shared_pipeline.url}/openapi.json")
    return schema[request.param]["POST"]


def send(case: Case) -> int:
    response = case.call(timeout=30)
    case.validate_response(response, checks=[not_a_server_error])
    documented = case.operation.definition.raw["responses"]
    if str(response.status_code) in documented:  # else no route of ours answered
        case.validate_response(
            response, checks=[response_schema_conformance, content_type_conformance]
        )
    return response.status_code


def run(
    operation: Operation,
    mode: GenerationMode,
    change: Callable[[Case], None] = lambda case: None,
) -> Counter[int]:
    """Send what is generated, changed by `change`; how often each status came."""
    statuses: Counter[int] = Counter()

    @generated
    @given(case=operation.as_strategy(generation_mode=mode))
    def send_generated(case: Case) -> None:
        change(case)
        statuses[send(case)] += 1

    send_generated()
    return statuses


def test_requests_that_fit_the_schema(operation: Operation) -> None:
    """Most are answered, given a model that exists and nothing it or its engine has not got."""

    def answerable(case: Case) -> None:
        assert isinstance(case.body, dict)
        case.body |= {"model": MODEL, "max_tokens": 2, "min_tokens": 0}
        for name in NOT_SIMULATED:
            case.body.pop(name, None)
        if isinstance(case.body.get("prompt"), list):
            case.body["prompt"] = [100]

    statuses = run(operation, GenerationMode.POSITIVE, answerable)
    assert set(statuses) <= {200, 400}
    assert statuses[200] >= 25, statuses


def test_requests_as_generated(operation: Operation) -> None:
    assert set(run(operation, GenerationMode.POSITIVE)) <= {200, 400, 404}


def test_requests_that_break_the_schema(operation: Operation) -> None:
    statuses = run(operation, GenerationMode.NEGATIVE)
    assert set(statuses) <= {200, 400, 404, 405, 415}
    assert statuses[400] >= 10, statuses
