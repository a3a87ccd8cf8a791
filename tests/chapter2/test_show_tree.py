"""`scripts/show_tree`: the tree it draws, and what it says where router and engine differ."""

import asyncio
import os
import sys
from asyncio.subprocess import PIPE
from collections.abc import Mapping
from pathlib import Path

from chapter2.show_tree import Known, agreement, draw, merged
from common.kv import BlockStored, block_hashes
from common.kv_mirror import KvMirror
from common.model_files import DEFAULT_MODEL
from common.protocol import EngineInfo
from common.text import TextModel, load_text_model
from tests.chapter1.helpers import chat, eventually, http_client
from tests.conftest import StartPipeline

import pytest
import tokenizers
from rich.console import Console
from rich.tree import Tree

BLOCK = 4
LONG_LEASE = {"ETCD_LEASE_TTL": "60"}  # what is killed is listed until a busy test has looked


@pytest.fixture(scope="module")
def model() -> TextModel:
    return load_text_model(DEFAULT_MODEL)


def engine(worker_id: int, *prompts: list[int], unknown: int = 0, gone: int = 0) -> Known:
    """An engine that has computed `prompts`.

    The router does not know its last `unknown` blocks, and believes in `gone` that it has not.
    """
    cached = KvMirror()
    for prompt in prompts:
        hashes = block_hashes(prompt, BLOCK)
        cached.apply([BlockStored(hashes, None, prompt[: len(hashes) * BLOCK], BLOCK)])
    info = EngineInfo("m", "simulated", 100, BLOCK, 512, worker_id)
    blocks = list(cached.blocks)
    believed = set(blocks[: len(blocks) - unknown]) | set(range(gone))
    return Known(info, cached, believed, "ready")


def drawn(model: TextModel, *engines: Known) -> list[str]:
    tree = Tree("root")
    draw(merged(list(engines)), tree, model)
    console = Console(width=120, color_system=None)
    with console.capture() as capture:
        console.print(tree)
    return [line.rstrip() for line in capture.get().splitlines()]


def tokens(model: TextModel, blocks: int) -> list[int]:
    """A long text, cut to some blocks."""
    return model.encode("one two three four go to my home " * 4)[: blocks * BLOCK]


def test_a_chain_of_blocks_is_one_line(model: TextModel) -> None:
    assert drawn(model, engine(0, tokens(model, 2))) == [
        "root",
        '└── 2 blocks in worker 0: "one two three four go to my home"',
    ]


def test_prompts_with_a_common_beginning_branch(model: TextModel) -> None:
    one, other = tokens(model, 3), [*tokens(model, 2), *model.encode(" and so on it")]
    assert drawn(model, engine(0, one), engine(1, other)) == [
        "root",
        '└── 2 blocks in worker 0, worker 1: "one two three four go to my home"',
        '    ├── 1 block in worker 1: " and so on it"',
        '    └── 1 block in worker 0: " one two three four"',
    ]


def test_what_only_one_engine_has_of_a_chain_is_a_branch(model: TextModel) -> None:
    assert drawn(model, engine(0, tokens(model, 1)), engine(1, tokens(model, 2))) == [
        "root",
        '└── 1 block in worker 0, worker 1: "one two three four"',
        '    └── 1 block in worker 1: " go to my home"',
    ]


def test_long_text_loses_its_middle(model: TextModel) -> None:
    assert drawn(model, engine(0, tokens(model, 6)))[1] == (
        '└── 6 blocks in worker 0: "one two three four … four go to my home"'
    )


def test_tokens_that_the_model_lacks_have_no_text(model: TextModel) -> None:
    assert drawn(model, engine(0, [2**31] * 4))[1] == '└── 1 block in worker 0: ""'


def test_blocks_unknown_to_the_router_are_marked(model: TextModel) -> None:
    assert drawn(model, engine(0, tokens(model, 2), unknown=1)) == [
        "root",
        '└── 1 block in worker 0: "one two three four"',
        '    └── 1 block in worker 0 (unknown to the router): " go to my home"',
    ]


def test_agreement_and_disagreement_are_told(model: TextModel) -> None:
    prompt = tokens(model, 2)
    assert agreement(engine(0, prompt)) == (
        "worker 0: 2 blocks cached of 512; the router agrees (ready)"
    )
    assert agreement(engine(1, prompt, unknown=1, gone=2)) == (
        "worker 1: 2 blocks cached of 512; the router DISAGREES (ready): it does not know "
        "1 block, and believes in 2 blocks that the engine does not have"
    )
    unknown = engine(0)
    unknown.state = None
    assert agreement(unknown) == (
        "worker 0: 0 blocks cached of 512; the router does not know this engine"
    )


async def shown(*arguments: str, environment: Mapping[str, str]) -> tuple[str, str, int]:
    """The script's output, what it wrote to stderr, and its status."""
    command = (sys.executable, "-m", "chapter2.show_tree", *arguments)
    process = await asyncio.create_subprocess_exec(
        *command, env={**os.environ, **environment}, stdout=PIPE, stderr=PIPE
    )
    try:
        output, errors = await asyncio.wait_for(process.communicate(), 60)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return output.decode(), errors.decode(), process.returncode


async def shown_in_step(namespace: str, servers: Mapping[str, str], branches: int = 0) -> list[str]:
    """The output for a pipeline of two, once router and engines agree on so many branches."""
    output = ""

    async def agree() -> bool:
        nonlocal output
        output, _, status = await shown("--namespace", namespace, environment=servers)
        assert status == 0
        branched = output.count(" in worker ") == branches
        return branched and output.count("the router agrees (ready)") == 2

    await eventually(agree)
    return output.splitlines()


async def test_a_running_pipeline_is_drawn(
    start_pipeline: StartPipeline, servers: dict[str, str]
) -> None:
    """Two engines in turn: both have the system prompt, each has its own question."""
    arguments = {"router": ["--policy", "round_robin"]}
    async with start_pipeline(chapter="chapter2", engines=2, arguments=arguments) as p:
        assert await shown_in_step(p.namespace, servers) == [
            "nothing is cached",
            "worker 0: 0 blocks cached of 4096; the router agrees (ready)",
            "worker 1: 0 blocks cached of 4096; the router agrees (ready)",
        ]
        system = {"role": "system", "content": "You know much about animals. " * 8}
        async with http_client(p.url) as client:
            for animal in ("cats", "dogs"):
                body = chat(f"What are {animal} and why, tell me much. " * 2, max_tokens=1)
                body["messages"].insert(0, system)
                assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
        lines = await shown_in_step(p.namespace, servers, branches=3)
        assert lines[0] == "cached, by prefix"
        assert 'in worker 0, worker 1: "system\\nYou know mu' in lines[1]
        assert lines[2].startswith("    ├── ")
        assert lines[3].startswith("    └── ")
        assert sum("in worker 0:" in line for line in lines[2:4]) == 1
        assert sum("in worker 1:" in line for line in lines[2:4]) == 1
        assert len(lines) == 6


async def test_a_dead_engine_a_wrong_model_and_a_dead_router(
    start_pipeline: StartPipeline, servers: dict[str, str], tmp_path: Path
) -> None:
    """What is dead is listed until its lease expires."""
    start = ("engine0", "engine1", "router")
    environment = {**servers, **LONG_LEASE}
    async with start_pipeline(
        chapter="chapter2", engines=2, start=start, environment=environment
    ) as p:
        await shown_in_step(p.namespace, servers)
        p.processes["engine1"].kill()
        await p.processes["engine1"].wait()
        output, errors, status = await shown("--namespace", p.namespace, environment=servers)
        assert status == 0
        assert "does not answer" in errors
        assert "worker 0: 0 blocks cached of 4096; the router agrees (ready)" in output
        assert "worker 1: the router believes it has 0 blocks" in output

        other = tmp_path / "Other-1B"
        other.mkdir()
        words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"hi": 0}, "hi"))
        words.decoder = tokenizers.decoders.ByteLevel()
        words.save(str(other / "tokenizer.json"))
        flags = ("--namespace", p.namespace, "--model", str(other))
        _, errors, status = await shown(*flags, environment=servers)
        assert status == 1
        assert "error: worker 0 has the model SmolLM2-135M-Instruct, not Other-1B; name" in errors

        p.processes["router"].kill()
        await p.processes["router"].wait()
        _, errors, status = await shown("--namespace", p.namespace, environment=servers)
        assert status == 1
        assert "error: the router does not answer: " in errors


async def test_without_a_router_it_says_so(
    start_pipeline: StartPipeline, servers: dict[str, str]
) -> None:
    async with start_pipeline(chapter="chapter2", engines=1, start=("engine0",)) as p:
        output, errors, status = await shown("--namespace", p.namespace, environment=servers)
        assert status == 1
        assert not output
        assert (
            f"error: no router with the endpoint router.state is up in the namespace {p.namespace}"
            in errors
        )


async def test_without_an_engine_it_says_so(namespace: str, servers: dict[str, str]) -> None:
    output, errors, status = await shown("--namespace", namespace, environment=servers)
    assert status == 1
    assert not output
    assert (
        f"error: no engine with the endpoint engine.kv_source is up in the namespace {namespace}"
        in errors
    )


async def test_a_model_that_does_not_exist(servers: dict[str, str]) -> None:
    _, errors, status = await shown("--model", "nothing.gguf", environment=servers)
    assert status == 1
    assert errors.startswith("error: ")
    assert "nothing.gguf" in errors
