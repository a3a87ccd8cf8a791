"""Telling a supervisor how a process is: systemd's sd_notify protocol.

Source: https://www.freedesktop.org/software/systemd/man/latest/sd_notify.html
"""

import os
import socket

from common.telemetry import log


def notify(message: str) -> None:
    """Tell the supervisor, if any; one that has gone away is no reason to stop serving."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            # A leading "@" is sd_notify's notation for an abstract socket.
            sock.connect("\0" + address[1:] if address.startswith("@") else address)
            sock.sendall(message.encode())
    except OSError as error:
        log.warning("cannot notify the supervisor at %s: %s", address, error)
