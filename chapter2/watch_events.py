"""Print the KV events that engines publish, as they come.

    scripts/watch_events tcp://127.0.0.1:5557     what is published there
    scripts/watch_events                          every engine that is up now

Ctrl-C ends it.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from chapter2.feed import ask
from common.errors import ComponentError
from common.kv import AllBlocksCleared, BlockRemoved, KvEvent, KvEventBatch
from common.protocol_router import KvSource
from common.visitor import find, visit

import msgspec
import zmq
from dynamo.runtime import DistributedRuntime, dynamo_worker


def watch(addresses: list[str], workers: dict[str, str], *, heartbeats: bool) -> None:
    """Print what is published at `addresses`, without end; `workers` has names by topic."""
    with zmq.Context() as context, context.socket(zmq.SUB) as socket:
        socket.linger = 0
        socket.ipv6 = True  # takes IPv4 addresses, too
        socket.subscribe("")
        for address in addresses:
            socket.connect(address)
        print("watching", ", ".join(addresses), flush=True)
        while True:
            topic, seq, payload = socket.recv_multipart()
            batch = msgspec.msgpack.decode(payload, type=KvEventBatch)
            show(workers.get(topic.decode(), topic.decode()), seq, batch, heartbeats=heartbeats)


def show(worker: str, seq: bytes, batch: KvEventBatch, *, heartbeats: bool) -> None:
    """Print a batch, a line for each event; one without events is a heartbeat."""
    for line in map(described, batch.events) if batch.events else ["heartbeat"] * heartbeats:
        print(f"{worker} #{int.from_bytes(seq, 'big')} {line}", flush=True)


def described(event: KvEvent) -> str:
    """The event in a line; blocks go by the first digits of their hashes, in hexadecimal."""
    if isinstance(event, AllBlocksCleared):
        return "AllBlocksCleared"
    blocks = beginning([f"{block % 2**64:016x}"[:6] for block in event.block_hashes], 8)
    if isinstance(event, BlockRemoved):
        return f"BlockRemoved {blocks}"
    parent = event.parent_block_hash
    after = "nothing" if parent is None else f"{parent % 2**64:016x}"[:6]
    return f"BlockStored {blocks} after {after}, tokens {beginning(event.token_ids, 5)}"


def beginning(items: Sequence[object], most: int) -> str:
    more = f" … {len(items)} in all" if len(items) > most else ""
    return " ".join(map(str, items[:most])) + more


@dynamo_worker()
async def ask_engines(runtime: DistributedRuntime, namespace: str, sources: list[KvSource]) -> None:
    """Append where every engine of the namespace publishes."""
    client = await find(runtime, namespace, "engine.kv_source")
    for instance in client.instance_ids():
        try:
            sources += await ask(client, instance, KvSource)
        except Exception as error:  # its process may be gone, and its lease not yet over
            print(f"engine instance {instance:x} does not answer: {error}", file=sys.stderr)
    runtime.shutdown()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="watch_events",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "address",
        nargs="?",
        metavar="ADDRESS",
        help="ZMQ address of an engine's events; it stands in the engine's log (default: ask the "
        "engines of the namespace)",
    )
    parser.add_argument(
        "--namespace",
        default=os.environ.get("DYN_NAMESPACE", "inference"),
        help="where to look for engines (env DYN_NAMESPACE, %(default)s)",
    )
    parser.add_argument(
        "--heartbeats",
        action="store_true",
        help="also print the empty batches that are sent in quiet times",
    )
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    sources: list[KvSource] = []
    if args.address is None:
        visit(ask_engines, args.namespace, sources)
        if not sources:
            raise ComponentError("no engine says where it publishes")
    sources.sort(key=lambda source: source.info.worker_id)
    workers = {source.topic: f"worker {source.info.worker_id}" for source in sources}
    addresses = [source.events for source in sources] or [args.address]
    try:
        watch(addresses, workers, heartbeats=args.heartbeats)
    except zmq.ZMQError as error:
        raise ComponentError(f"{error}; an address is like tcp://127.0.0.1:5557") from error
    except (msgspec.DecodeError, ValueError) as error:
        raise ComponentError(f"what came is no batch of KV events: {error}") from error


if __name__ == "__main__":
    try:
        main(parse_args())
    except ComponentError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        pass
