"""How a transfer fails."""


class KvTransferError(Exception):
    """The KV did not arrive, or cannot be trusted; the message says why."""
