"""The engine component with a bad link: some of its batches of KV events are never sent.

python -m tests.chapter2.lossy_engine SHARE FILE [the engine's own arguments]

Loses SHARE of all batches at random, with the seed of the worker id, and while FILE exists
every batch that has events in it.
"""

import random
import sys
from pathlib import Path

from chapter2 import engine
from common.kv import KvEventBatch
from common.kv_publisher import KvPublisher
from common.telemetry import log
from common.worker import run

import msgspec
import zmq

share, outage = float(sys.argv.pop(1)), Path(sys.argv.pop(1))
args = engine.parse_args()
rng = random.Random(args.worker_id)
original = KvPublisher._send


def send_some(
    self: KvPublisher, socket: "zmq.Socket[bytes]", seq: int, batch: msgspec.Struct
) -> None:
    if isinstance(batch, KvEventBatch) and (
        rng.random() < share or (batch.events and outage.exists())
    ):
        log.info("lost batch %d of %d events", seq, len(batch.events))
        return
    original(self, socket, seq, batch)


if __name__ == "__main__":
    KvPublisher._send = send_some  # type: ignore[method-assign]
    run(engine.worker, args, f"engine-{args.worker_id}")
