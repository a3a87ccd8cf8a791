"""Requests made from chapter 4's OpenAPI document never make it fail, nor the document lie."""

import uuid
from collections.abc import AsyncIterator
from typing import Any

from launch.chapters import Options
from launch.children import Children
from launch.pipeline import Pipeline, pipeline
from launch.ports import free_port
from tests.chapter1.helpers import CHAT, MODEL, engine_settings

import pytest
import pytest_asyncio
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance

generated = settings(
    max_examples=15,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def running(servers: dict[str, str]) -> AsyncIterator[Pipeline]:
    lines: list[str] = []
    with Children(lambda name, line: lines.append(f"{name:>10} | {line}")) as children:
        options = Options(
            namespace=f"test-{uuid.uuid4().hex[:12]}",
            engines=1,
            backend="simulated",
            port=free_port(),
        )
        arguments = {"engine": engine_settings(decode_base_ms=1)}
        async with pipeline(children, servers, "chapter4", options, arguments=arguments) as running:
            await running.wait_ready()
            yield running
            running.kill()
    print(*lines[-200:], sep="\n")


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize("path", [CHAT, "/v1/responses", "/v1/conversations"])
def test_no_request_makes_it_fail(running: Pipeline, path: str, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_url(f"{running.url}/openapi.json")
    operation = schema[path]["POST"]

    @generated
    @given(case=operation.as_strategy(generation_mode=mode))
    def send(case: schemathesis.Case[Any]) -> None:
        if isinstance(case.body, dict) and path != "/v1/conversations":
            limit = "max_tokens" if path == CHAT else "max_output_tokens"
            case.body |= {"model": MODEL, limit: 2}
        response = case.call(timeout=30)
        case.validate_response(response, checks=[not_a_server_error])
        if str(response.status_code) in case.operation.definition.raw["responses"]:
            checks = [response_schema_conformance, content_type_conformance]
            case.validate_response(response, checks=checks)

    send()
