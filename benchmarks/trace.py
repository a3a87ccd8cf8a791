"""Request traces in the format of Mooncake's FAST'25 release: one JSON object a line.

    {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, 2353]}

`timestamp` is in milliseconds, lengths are in tokens, and a hash id stands for a block of 512
prompt tokens and all before it; the last one may be of a block in part. Source:
https://github.com/kvcache-ai/Mooncake (FAST25-release).
"""

from pathlib import Path
from typing import Annotated

import msgspec

BLOCK_SIZE = 512

HashId = Annotated[int, msgspec.Meta(ge=0, lt=2**32 - 2**20)]  # what is above marks events


class TraceRequest(msgspec.Struct, frozen=True):
    """One request; `timestamp` in ms. Recorded traces do not tell tenant and session."""

    timestamp: Annotated[float, msgspec.Meta(ge=0)]
    input_length: int
    output_length: int
    hash_ids: list[HashId]
    tenant: str = ""
    session: str = ""

    @property
    def full_blocks(self) -> list[int]:
        """The blocks that another prompt can share: only a full one is reused."""
        return self.hash_ids[: self.input_length // BLOCK_SIZE]


def load_trace(path: Path, limit: int | None = None) -> list[TraceRequest]:
    """The requests in the order of their arrival, at most `limit` of them.

    Raises:
        ValueError: a line is not in the format; the message names it.
    """
    requests: list[TraceRequest] = []
    decode = msgspec.json.Decoder(TraceRequest).decode
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            request = decode(line)
        except msgspec.DecodeError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        blocks = -(-request.input_length // BLOCK_SIZE)
        if request.input_length < 1 or request.output_length < 1:
            raise ValueError(f"{path}, line {number}: a length is below 1")
        if len(request.hash_ids) != blocks:
            raise ValueError(
                f"{path}, line {number}: {len(request.hash_ids)} hash ids for {blocks} blocks of "
                f"{BLOCK_SIZE} tokens"
            )
        if len(set(request.hash_ids)) < blocks:
            raise ValueError(f"{path}, line {number}: a hash id occurs twice")
        requests.append(request)
    requests.sort(key=lambda request: request.timestamp)
    return requests[:limit]
