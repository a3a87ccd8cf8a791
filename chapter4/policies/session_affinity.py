"""A session's requests go to one engine, whatever is cached: what a plain load balancer can do.

The engine is the one with the highest hash of session and engine together (rendezvous hashing),
so that when one leaves, only its sessions move. A request without a session goes where the
fewest requests are. Source: Thaler and Ravishankar, A Name-Based Mapping Scheme for Rendezvous
(1996).
"""

import zlib

from chapter4.snapshot import Snapshot


def policy(snapshot: Snapshot) -> list[dict[str, float]]:
    session = snapshot.request.session
    if not session:
        return [{"load": -float(worker.running + worker.waiting)} for worker in snapshot.workers]
    return [
        {"hash": zlib.crc32(f"{session}/{worker.worker_id}".encode()) / 2**32}
        for worker in snapshot.workers
    ]
