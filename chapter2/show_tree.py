"""Draw what the engines of a running pipeline have cached, by prefix.

    scripts/show_tree

The text comes from the engines' own snapshots, which have the token ids; the router, which has
hashes alone, is asked what it believes, and where the two differ the drawing says so.
"""

import argparse
import json
import os
import sys
from dataclasses import dataclass, field

from chapter2.feed import ask
from common.errors import ComponentError
from common.kv import BlockStored
from common.kv_mirror import KvMirror
from common.model_files import DEFAULT_MODEL
from common.protocol import EngineInfo, from_wire
from common.protocol_router import KvSnapshotPart, KvSource, WorkerState
from common.text import TextModel, load_text_model
from common.visitor import find, visit

import msgspec
from dynamo.runtime import DistributedRuntime, dynamo_worker
from rich.console import Console
from rich.text import Text
from rich.tree import Tree

SHOWN_CHARACTERS = 36


@dataclass
class Known:
    """An engine's own blocks, by its hashes, and those the router believes it has.

    `state` is the router's; None: the router does not know this engine.
    """

    info: EngineInfo
    cached: KvMirror
    believed: set[int] = field(default_factory=set)
    state: str | None = None

    @property
    def name(self) -> str:
        return f"worker {self.info.worker_id}"


@dataclass
class Node:
    """A block of tokens after those on the way to it, and who has that prefix."""

    holders: set[str] = field(default_factory=set)
    children: dict[tuple[int, ...], "Node"] = field(default_factory=dict)


def merged(engines: list[Known]) -> Node:
    """The blocks of all engines as one tree; the tokens decide which are the same."""
    root = Node()
    for engine in engines:
        nodes: dict[int | None, Node] = {None: root}
        for event in engine.cached.events():
            parent, size = event.parent_block_hash, event.block_size
            for i, block in enumerate(event.block_hashes):
                tokens = tuple(event.token_ids[i * size : (i + 1) * size])
                node = nodes[parent].children.setdefault(tokens, Node())
                unknown = "" if block in engine.believed else " (unknown to the router)"
                node.holders.add(engine.name + unknown)
                nodes[block] = node
                parent = block
    return root


def draw(node: Node, tree: Tree, model: TextModel) -> None:
    """Add a line for each branch; blocks that follow each other alone share one.

    The order is that of the token ids, so that it does not depend on who came first.
    """
    for tokens, child in sorted(node.children.items()):
        blocks, token_ids, last = 1, list(tokens), child
        while len(last.children) == 1:
            ((following, after),) = last.children.items()
            if after.holders != last.holders:
                break
            blocks, last = blocks + 1, after
            token_ids += following
        line = f"{count(blocks)} in {', '.join(sorted(child.holders))}: {text(token_ids, model)}"
        draw(last, tree.add(Text(line, no_wrap=True, overflow="ellipsis")), model)


def text(token_ids: list[int], model: TextModel) -> str:
    """The tokens' text in quotes, its middle left out if it is long."""
    known = [token for token in token_ids if 0 <= token < model.tokenizer.n_tokens]
    decoded = b"".join(map(model.tokenizer.token_bytes, known)).decode(errors="replace")
    if len(decoded) > SHOWN_CHARACTERS:
        half = SHOWN_CHARACTERS // 2
        decoded = f"{decoded[:half].rstrip()} … {decoded[-half:].lstrip()}"
    return json.dumps(decoded, ensure_ascii=False)


def agreement(engine: Known) -> str:
    """What the router believes about an engine, and whether it is so."""
    cached = set(engine.cached.blocks)
    line = f"{engine.name}: {count(len(cached))} cached of {engine.info.total_blocks}; "
    if engine.state is None:
        return f"{line}the router does not know this engine"
    missing, extra = len(cached - engine.believed), len(engine.believed - cached)
    if not missing and not extra:
        return f"{line}the router agrees ({engine.state})"
    return (
        f"{line}the router DISAGREES ({engine.state}): it does not know {count(missing)}, "
        f"and believes in {count(extra)} that the engine does not have"
    )


def count(blocks: int) -> str:
    return f"{blocks} block" if blocks == 1 else f"{blocks} blocks"


async def ask_router(runtime: DistributedRuntime, namespace: str) -> dict[int, WorkerState]:
    """What the router believes, by instance."""
    router = await find(runtime, namespace, "router.state")
    try:
        stream = await router.round_robin({"blocks": True}, annotated=False)
        states = [from_wire(item, WorkerState) async for item in stream]
    except Exception as error:  # its process may be gone, and its lease not yet over
        raise ComponentError(f"the router does not answer: {error}") from error
    return {state.instance_id: state for state in states}


async def ask_engines(runtime: DistributedRuntime, namespace: str) -> dict[int, Known]:
    """What every engine that answers has cached, by instance."""
    sources = await find(runtime, namespace, "engine.kv_source")
    snapshots = await find(runtime, namespace, "engine.kv_snapshot")
    engines: dict[int, Known] = {}
    for instance in snapshots.instance_ids():
        try:
            (source,) = await ask(sources, instance, KvSource)
            parts = await ask(snapshots, instance, KvSnapshotPart)
        except Exception as error:  # its process may be gone, and its lease not yet over
            print(f"engine instance {instance:x} does not answer: {error}", file=sys.stderr)
            continue
        cached = KvMirror()
        for part in parts:
            cached.apply(msgspec.msgpack.decode(part.events, type=list[BlockStored]))
        engines[instance] = Known(source.info, cached)
    return engines


@dynamo_worker()
async def show(runtime: DistributedRuntime, namespace: str, model: TextModel) -> None:
    try:
        engines = await ask_engines(runtime, namespace)
        states = await ask_router(runtime, namespace)
    finally:
        runtime.shutdown()
    for instance, state in states.items():
        if instance in engines:
            engines[instance].state = state.state
            engines[instance].believed = set(state.block_hashes)
    known = sorted(engines.values(), key=lambda engine: engine.info.worker_id)
    for engine in known:
        if engine.info.model != model.name:
            raise ComponentError(
                f"{engine.name} has the model {engine.info.model}, not {model.name}; name the "
                "one it was started with: --model"
            )
    console = Console(highlight=False, markup=False)
    tree = Tree("cached, by prefix")
    draw(merged(known), tree, model)
    console.print(tree if tree.children else "nothing is cached")
    for engine in known:
        console.print(agreement(engine), soft_wrap=True)
    for state in states.values():
        if state.instance_id not in engines:
            console.print(
                f"worker {state.worker_id}: the router believes it has {count(state.blocks)} "
                f"({state.state}), but it does not answer",
                soft_wrap=True,
            )


def parse_args() -> argparse.Namespace:
    env = os.environ.get
    parser = argparse.ArgumentParser(
        prog="show_tree", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--namespace",
        default=env("DYN_NAMESPACE", "inference"),
        help="the pipeline's (env DYN_NAMESPACE, %(default)s)",
    )
    parser.add_argument(
        "--model",
        default=env("MODEL", DEFAULT_MODEL),
        help="the same as the engines': a .gguf file, a Hugging Face folder, or the model that "
        "comes with the project (env MODEL, %(default)s)",
    )
    return parser.parse_args()


if __name__ == "__main__":
    args = parse_args()
    try:
        visit(show, args.namespace, load_text_model(args.model))
    except (ComponentError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
