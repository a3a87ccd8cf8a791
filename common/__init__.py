"""Wire types and leaf helpers shared by every chapter; no chapter's lesson lives here.

The runtime takes its settings from the environment, some of them as soon as it is imported.
This module gives it our defaults, so imports of `common` stand above those of `dynamo`. It
also completes the addresses of NATS and etcd, of which the runtime wants every part.
"""

import os
from urllib.parse import urlsplit

RUNTIME_DEFAULTS = {
    "NATS_SERVER": "nats://127.0.0.1:4222",
    "ETCD_ENDPOINTS": "http://127.0.0.1:2379",
    "DYN_REQUEST_PLANE": "nats",
    "DYN_EVENT_PLANE": "nats",
    "DYN_DISCOVERY_BACKEND": "etcd",
    # Short, for a crashed worker to be forgotten soon; long enough to outlive an etcd restart.
    "ETCD_LEASE_TTL": "10",
    "DYN_LOG": "error",
    # The lines end up in files and behind prefixes, where escape sequences are in the way.
    "DYN_SDK_DISABLE_ANSI_LOGGING": "1",
}


def complete_address(address: str, default: str) -> str:
    """`address` with the scheme and the port of `default` where it has none.

    What is not an address at all stays as it is.
    """
    scheme, _, default_host = default.partition("://")
    address = address.strip()
    with_scheme = address if "://" in address else f"{scheme}://{address}"
    try:
        parts = urlsplit(with_scheme)
        if parts.hostname is None:
            return address
        if parts.port is None:
            default_port = default_host.rpartition(":")[2]
            parts = parts._replace(netloc=f"{parts.netloc.rstrip(':')}:{default_port}")
    except ValueError:  # a port that is no number, half an IPv6 address
        return address
    return parts.geturl().rstrip("/")


for _name in ("NATS_SERVER", "ETCD_ENDPOINTS"):
    _default = RUNTIME_DEFAULTS[_name]
    os.environ[_name] = ",".join(
        complete_address(address, _default)
        for address in (os.environ.get(_name) or _default).split(",")
    )
if os.environ.get("LOG_JSON", "") not in ("", "0"):
    RUNTIME_DEFAULTS["DYN_LOGGING_JSONL"] = "1"
if os.environ["NATS_SERVER"].startswith(("nats://127.0.0.1:", "nats://localhost:")):
    # All on one machine: do not depend on the name or the address of its network card.
    RUNTIME_DEFAULTS["DYN_TCP_RESPONSE_STREAM_HOST"] = "127.0.0.1"
    RUNTIME_DEFAULTS["DYN_TCP_RPC_HOST"] = "127.0.0.1"
for _name, _value in RUNTIME_DEFAULTS.items():
    os.environ.setdefault(_name, _value)
