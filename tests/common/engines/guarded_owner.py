"""Starts a process under guard, says what it has, and closes the guard when its input ends."""

import json
import multiprocessing
import sys
import time
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory

from common.engines.child_guard import ChildGuard


def child(sending: Connection) -> None:
    memory = SharedMemory(create=True, size=4096)
    # Nobody but the guard is to remove it.
    resource_tracker.unregister(f"/{memory.name}", "shared_memory")
    sending.send(memory.name)
    # It is there to be killed; should nobody do it, it does not stay for ever.
    time.sleep(600)


if __name__ == "__main__":
    resource_tracker.ensure_running()
    guard = ChildGuard("guarded")
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe()
    process = context.Process(target=child, args=(sending,))
    process.start()
    memory = receiving.recv()
    guard.watch()
    print(json.dumps([process.pid, f"/dev/shm/{memory}", guard.folder]), flush=True)  # noqa: S108
    sys.stdin.read()
    guard.close()
    process.join()
    print("closed", flush=True)
