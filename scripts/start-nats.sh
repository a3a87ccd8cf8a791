#!/bin/sh
# NATS with JetStream on its default port, for a pipeline that is started by hand; more
# arguments go to nats-server.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
exec "$root/scripts/setup" base \
    "$root/.venv/bin/nats-server" -a 127.0.0.1 -js -sd "$root/.cache/nats" "$@"
