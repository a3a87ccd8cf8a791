"""Wire types and leaf helpers shared by every chapter; no chapter's lesson lives here.

The runtime takes its settings from the environment, some of them as soon as it is imported.
This module gives it our defaults, so imports of `common` stand above those of `dynamo`.
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
}
if os.environ.get("LOG_JSON", "") not in ("", "0"):
    RUNTIME_DEFAULTS["DYN_LOGGING_JSONL"] = "1"
_nats_host = urlsplit(os.environ.get("NATS_SERVER", RUNTIME_DEFAULTS["NATS_SERVER"])).hostname
if _nats_host in ("127.0.0.1", "localhost"):
    # All on one machine: do not depend on the name or the address of its network card.
    RUNTIME_DEFAULTS["DYN_TCP_RESPONSE_STREAM_HOST"] = "127.0.0.1"
    RUNTIME_DEFAULTS["DYN_TCP_RPC_HOST"] = "127.0.0.1"
for _name, _value in RUNTIME_DEFAULTS.items():
    os.environ.setdefault(_name, _value)
