"""What no engine can do is refused with the field's name and its limits, and harms nothing."""

from typing import Any

from common.engines.base import Engine
from common.protocol import GenerateRequest, PipelineError, SamplingParams
from common.protocol_transfer import KvDescriptor
from tests.common.engines.engine_helpers import FakeContext
from tests.contract.requests import COUNT, ask, refused

import pytest

pytestmark = pytest.mark.asyncio(loop_scope="session")

NO_TOKEN = 2**40


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("max_tokens", {"max_tokens": 0}),
        ("max_tokens", {"max_tokens": -1}),
        ("max_tokens", {"max_tokens": 10**9}),
        ("min_tokens", {"min_tokens": -1}),
        ("min_tokens", {"min_tokens": 6, "max_tokens": 5}),
        ("stop_token_ids", {"stop_token_ids": [NO_TOKEN]}),
        ("stop_token_ids", {"stop_token_ids": [-1]}),
        ("logit_bias", {"logit_bias": [(NO_TOKEN, 1.0)]}),
        ("logprobs", {"logprobs": -1}),
        ("logprobs", {"logprobs": 10**9}),
        ("generated", {"generated": -1}),
        ("generated", {"generated": 14}),
        ("generated", {"generated": 3, "max_tokens": 3}),
    ],
)
async def test_a_field_out_of_range(engine: Engine, param: str, fields: dict[str, Any]) -> None:
    await refused(engine, COUNT, param, **fields)


async def test_prompts(engine: Engine) -> None:
    await refused(engine, [], "token_ids")
    await refused(engine, [*COUNT, NO_TOKEN], "token_ids")
    await refused(engine, [-1], "token_ids")
    length = engine.info.context_length
    message = await refused(engine, [100] * length, "token_ids")
    assert str(length) in message
    await refused(engine, [100] * (length - 2), "max_tokens", max_tokens=3)


async def test_schemas_leave_no_room_for_other_rules(engine: Engine) -> None:
    schema = '{"type": "boolean"}'
    for fields in ({"min_tokens": 2}, {"ignore_eos": True}):
        with pytest.raises(PipelineError) as error:
            await ask(engine, COUNT, max_tokens=5, json_schema=schema, **fields)
        assert error.value.info.kind == "invalid_request"
        assert error.value.info.param in (*fields, "json_schema")


async def test_kv_that_this_engine_cannot_fetch(engine: Engine) -> None:
    """It computes the prompt itself."""
    plain = (await ask(engine, COUNT, max_tokens=3, ignore_eos=True)).token_ids
    request = GenerateRequest(
        COUNT,
        SamplingParams(max_tokens=3, temperature=0, ignore_eos=True),
        kv=KvDescriptor("of another kind", 5, {"address": "nowhere"}),
    )
    items = [item async for item in engine.generate(request, FakeContext())]
    assert [token for item in items for token in item.token_ids] == plain
