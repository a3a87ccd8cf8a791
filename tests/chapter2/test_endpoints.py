"""What the router's and the engine's endpoints answer, and how they refuse."""

import asyncio
from typing import Any

from common.kv import block_hashes
from common.protocol_router import WorkerState
from launch.pipeline import Pipeline
from tests.chapter1.helpers import MODEL, eventually
from tests.chapter2.helpers import Router

import httpx
import pytest


async def cache(api: httpx.AsyncClient, token_ids: list[int]) -> int:
    """Have an engine compute a prompt; its worker id."""
    body = {
        "model": MODEL,
        "prompt": token_ids,
        "max_tokens": 1,
        "nvext": {"extra_fields": ["worker_id"]},
    }
    response = await api.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    worker: int = response.json()["nvext"]["worker_id"]
    return worker


async def test_the_choice_and_why(api: httpx.AsyncClient, router: Router) -> None:
    """The chosen worker, the overlap in blocks and tokens, every candidate's score, a reason."""
    token_ids = list(range(1000, 1072))
    has_it = await cache(api, token_ids)
    await eventually(router.is_right)
    output = await router.find([*token_ids, *range(2000, 2056)])  # 128 tokens, 4.5 blocks cached
    assert output.error is None
    assert output.worker_id == has_it
    assert (output.overlap_blocks, output.overlap_tokens) == (4, 64)
    by_worker = {candidate.worker_id: candidate for candidate in output.candidates}
    assert sorted(by_worker) == [0, 1]
    best, other = by_worker[has_it], by_worker[1 - has_it]
    assert best.instance_id == output.instance_id != other.instance_id
    assert (best.overlap_blocks, other.overlap_blocks) == (4, 0)
    for candidate in by_worker.values():
        assert candidate.waiting == 0
        share = candidate.overlap_blocks / 8
        assert candidate.score == pytest.approx(2 * share - candidate.kv_usage)
    assert output.reason.startswith("best score of 2: 4 blocks cached, ")


async def test_a_prompt_of_less_than_a_block(router: Router) -> None:
    for token_ids in ([], [1], list(range(15))):
        output = await router.find(token_ids)
        assert output.error is None
        assert (output.overlap_blocks, output.overlap_tokens) == (0, 0)
        assert len(output.candidates) == 2


@pytest.mark.parametrize(
    ("request_body", "message"),
    [
        ({"model": MODEL}, "missing required field `token_ids`"),
        ({"token_ids": [1]}, "missing required field `model`"),
        ({"token_ids": "text", "model": MODEL}, "Expected `array`, got `str` - at `$.token_ids`"),
        ({"token_ids": [1, "2"], "model": MODEL}, "Expected `int`, got `str`"),
        ({"token_ids": [1, 2.5], "model": MODEL}, "$.token_ids[1]"),
        ({"token_ids": [1, -1], "model": MODEL}, "$.token_ids[1]"),
        ({"token_ids": [1, 2**32], "model": MODEL}, "$.token_ids[1]"),
        ({"token_ids": [1], "model": None}, "$.model"),
        ({"token_ids": [1], "model": MODEL, "failed": [None]}, "$.failed[0]"),
        ({"token_ids": [1], "model": MODEL, "wrong": 1}, "unknown field `wrong`"),
        ([], "Expected `object`, got `array`"),
        ("text", "Expected `object`, got `str`"),
        (None, "Expected `object`, got `null`"),
    ],
)
async def test_bad_input_is_named(router: Router, request_body: Any, message: str) -> None:
    output = await router.find_raw(request_body)
    assert output.error is not None
    assert output.error.kind == "invalid_request"
    assert message in output.error.message
    assert output.candidates == []


async def test_a_model_that_no_engine_has(router: Router) -> None:
    """After a moment in which an engine might have come; says who is there instead."""
    output = await router.find_raw({"token_ids": [1], "model": "other"})
    assert output.error is not None
    assert output.error.kind == "unavailable"
    assert "No engine with the model other is ready" in output.error.message
    assert f"worker 0 with {MODEL} is ready" in output.error.message


async def test_a_failed_engine_is_left_out_and_comes_back(
    api: httpx.AsyncClient, router: Router
) -> None:
    """Its blocks are forgotten at once; as it lives, a snapshot brings them back."""
    token_ids = list(range(3000, 3064))
    has_it = await cache(api, token_ids)
    await eventually(router.is_right)
    chosen = await router.find(token_ids)
    assert chosen.worker_id == has_it
    other = await router.find(token_ids, failed=[chosen.instance_id])
    assert other.worker_id == 1 - has_it
    assert [candidate.worker_id for candidate in other.candidates] == [1 - has_it]

    async def is_ready_again() -> bool:
        return all(state.state == "ready" for state in await router.state())

    await eventually(is_ready_again)
    await eventually(router.is_right)
    for candidate in (await router.find(token_ids)).candidates:
        assert candidate.worker_id != has_it or candidate.overlap_blocks == 4


async def test_an_instance_that_never_was_among_the_failed(router: Router) -> None:
    output = await router.find(list(range(32)), failed=[1, 2**63])
    assert output.error is None
    assert len(output.candidates) == 2


async def test_the_state(api: httpx.AsyncClient, router: Router) -> None:
    token_ids = list(range(4000, 4048))
    has_it = await cache(api, token_ids)
    await eventually(router.is_right)
    await eventually(lambda: has_figures(router))
    first, second = await router.state(blocks=True)
    assert (first.worker_id, second.worker_id) == (0, 1)
    for state in (first, second):
        assert (state.model, state.state) == (MODEL, "ready")
        assert state.blocks == len(state.block_hashes)
        assert state.metrics is not None
        assert state.metrics.total_blocks == 4096
    expected = set(block_hashes(token_ids, 16))
    assert expected <= set((first, second)[has_it].block_hashes)
    assert not expected & set((first, second)[1 - has_it].block_hashes)
    without = await router.state()
    assert [state.block_hashes for state in without] == [[], []]
    assert [state.blocks for state in without] == [first.blocks, second.blocks]


async def has_figures(router: Router) -> bool:
    return all(state.metrics is not None for state in await router.state())


@pytest.mark.parametrize(
    ("request_body", "message"),
    [({"blocks": 3}, "`bool`.*blocks"), ({"block": True}, "block"), ([], "`object`")],
)
async def test_a_wrong_question_for_the_state_is_named(
    router: Router, request_body: Any, message: str
) -> None:
    path = f"{router.running.namespace}.router.state"
    with pytest.raises(RuntimeError, match=f"StateRequest.*{message}"):
        await router.caller.call(path, request_body, WorkerState)


async def test_where_an_engine_publishes(shared_pipeline: Pipeline, router: Router) -> None:
    """Address, block size and model come from the engine, and no two have a topic in common."""
    sources = [await router.source(instance) for instance in await router.engines()]
    assert len(sources) == 2
    assert sorted(source.info.worker_id for source in sources) == [0, 1]
    assert {(source.info.model, source.info.block_size) for source in sources} == {(MODEL, 16)}
    addresses = {address for source in sources for address in (source.events, source.metrics)}
    assert len(addresses) == 4
    assert all(address.startswith("tcp://127.0.0.1:") for address in addresses)
    assert len({source.topic for source in sources}) == 2
    assert "--kv" not in " ".join(shared_pipeline.commands["router"])


async def test_a_snapshot(api: httpx.AsyncClient, router: Router) -> None:
    """Parents before children, tokens with every block, in parts that fit into a message."""
    prompts = [list(range(first, first + 40)) for first in range(5000, 15000, 100)]
    await asyncio.gather(*[cache(api, token_ids) for token_ids in prompts])
    await eventually(router.is_right)
    known: set[int | None] = {None}
    for instance in await router.engines():
        for event in await router.snapshot(instance):
            assert event.parent_block_hash in known
            assert len(event.token_ids) == len(event.block_hashes) * event.block_size
            known.update(event.block_hashes)
    assert len(known) > 200
