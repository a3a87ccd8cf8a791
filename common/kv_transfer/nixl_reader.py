"""Reads other processes' memory over NIXL."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from common.kv_transfer.errors import KvTransferError
from common.kv_transfer.nixl_agent import register
from common.telemetry import log

import numpy as np
from numpy.typing import NDArray

READ_BYTES = 8 * 2**20  # in one go; a read that nobody waits for ends after it
POLL_S = 0.0002
MAX_READS = 4  # at once; one of a peer that hangs lasts until the fetch times out
MAX_PEERS = 64  # that are remembered, the dead ones among them


class NixlReader:
    """For one event loop; the copying and waiting is done in threads."""

    def __init__(self, agent: Any) -> None:
        self._agent = agent
        self._using = threading.Lock()  # the agent, by one thread at a time
        self._peers: dict[bytes, str] = {}
        self._threads = ThreadPoolExecutor(MAX_READS, "kv-borrower")
        self._closing = threading.Event()
        self._unfinished: list[Any] = []

    def knows(self, process: bytes) -> bool:
        """Whether its metadata is needed no more."""
        return process in self._peers

    async def read(
        self, process: bytes, metadata: bytes | None, address: int, size: int
    ) -> NDArray[np.uint8]:
        """A copy of another process's memory.

        Raises:
            KvTransferError: it cannot be read.
        """
        given_up = threading.Event()
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(
                self._threads, self._read, process, metadata, address, size, given_up
            )
        finally:
            given_up.set()

    def close(self) -> None:
        """End what is being read."""
        self._closing.set()
        self._threads.shutdown()
        self._agent = None  # it ends with its last user

    def _read(
        self,
        process: bytes,
        metadata: bytes | None,
        address: int,
        size: int,
        given_up: threading.Event,
    ) -> NDArray[np.uint8]:
        buffer = np.empty(size, np.uint8)
        try:
            with self._using:
                peer = self._peer(process, metadata)
                registration = register(self._agent, buffer)
            try:
                for offset in range(0, size, READ_BYTES):
                    part = buffer[offset : offset + READ_BYTES]
                    self._read_part(peer, address + offset, part, given_up)
            finally:
                with self._using:
                    self._agent.deregister_memory(registration)
        except KvTransferError:
            raise
        except Exception as error:  # of its bindings' own types
            with self._using:
                self._forget(process)
            raise KvTransferError(f"NIXL cannot read the other engine's memory: {error}") from error
        return buffer

    def _read_part(
        self, peer: str, address: int, part: NDArray[np.uint8], given_up: threading.Event
    ) -> None:
        agent, state = self._agent, "PROC"
        with self._using:
            own = agent.get_xfer_descs([(part.ctypes.data, part.nbytes, 0)], "DRAM")
            theirs = agent.get_xfer_descs([(address, part.nbytes, 0)], "DRAM")
            transfer = agent.initialize_xfer("READ", own, theirs, peer)
        try:
            with self._using:
                state = agent.transfer(transfer)
            while state == "PROC" and not self._closing.is_set() and not given_up.wait(POLL_S):
                with self._using:
                    state = agent.check_xfer_state(transfer)
        finally:
            self._release(transfer, part)
        if state != "DONE" or given_up.is_set() or self._closing.is_set():
            raise KvTransferError(f"NIXL did not read the other engine's memory: {state}")

    def _release(self, transfer: Any, part: NDArray[np.uint8]) -> None:
        with self._using:
            try:
                self._agent.release_xfer_handle(transfer)
            except Exception as error:  # of its bindings' own types
                log.warning("NIXL cannot end a transfer: %s", error)
                self._unfinished.append((transfer, part))  # it may still write there

    def _peer(self, process: bytes, metadata: bytes | None) -> str:
        if process not in self._peers:
            if metadata is None:
                raise KvTransferError("the other engine did not introduce its NIXL agent")
            while len(self._peers) >= MAX_PEERS:
                self._forget(next(iter(self._peers)))
            name = self._agent.add_remote_agent(metadata)
            self._peers[process] = name if isinstance(name, str) else name.decode()
        return self._peers[process]

    def _forget(self, process: bytes) -> None:
        peer = self._peers.pop(process, None)
        if peer is not None:
            self._agent.remove_remote_agent(peer)
