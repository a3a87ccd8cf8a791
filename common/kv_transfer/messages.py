"""What borrowers and lenders say to each other: one msgpack frame, over DEALER and ROUTER.

    borrower --Pull-->     lender    the pieces from a block on, please
    borrower <--Pulled--   lender    ZMQ: they are the next frame; NIXL: they are at `address`
    borrower --Release-->  lender    they are read
    borrower <--Released-- lender    and were the right ones until now: they may be used

The lender answers `Refused` to what it does not have (any more).
"""

from typing import Any

from common.kv_transfer.errors import KvTransferError
from common.protocol_transfer import KvDescriptor

import msgspec


class Place(msgspec.Struct, forbid_unknown_fields=True):
    """`KvDescriptor.data`: where pieces are lent, and the token that opens them.

    `process` is another one after a restart, when someone else has the address.
    """

    address: str
    process: bytes
    transfer: bytes
    first: int
    piece_bytes: int
    size: int


class Pull(msgspec.Struct, tag=True):
    """`known`: no need to introduce the NIXL agent, that has been done."""

    process: bytes
    transfer: bytes
    first: int
    known: bool = False


class Release(msgspec.Struct, tag=True):
    process: bytes
    transfer: bytes


class Pulled(msgspec.Struct, tag=True):
    size: int
    address: int = 0
    agent: bytes | None = None  # its metadata


class Released(msgspec.Struct, tag=True):
    pass


class Refused(msgspec.Struct, tag=True):
    reason: str


Request = Pull | Release
Answer = Pulled | Released | Refused

encode = msgspec.msgpack.Encoder().encode
decode_request = msgspec.msgpack.Decoder[Request](Request).decode
decode_answer = msgspec.msgpack.Decoder[Answer](Answer).decode


def to_descriptor(kind: str, tokens: int, place: Place) -> KvDescriptor:
    data: dict[str, Any] = msgspec.structs.asdict(place)
    return KvDescriptor(kind, tokens, data)


def from_descriptor(descriptor: KvDescriptor) -> Place:
    """The checked data of a descriptor.

    Raises:
        KvTransferError: it is not one of ours.
    """
    try:
        place = msgspec.convert(descriptor.data, Place)
    except msgspec.ValidationError as error:
        raise KvTransferError(f"not a descriptor of lent KV: {error}") from error
    if min(place.first, place.piece_bytes - 1, place.size - 1) < 0:
        raise KvTransferError(f"not a descriptor of lent KV: {place.size} bytes, {place}")
    return place
