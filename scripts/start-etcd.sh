#!/bin/sh
# etcd on its default ports, for a pipeline that is started by hand; more arguments go to
# etcd. Instances that an earlier run left in it would confuse a new one, so it starts empty.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
"$root/scripts/setup"
rm -rf "$root/.cache/etcd"
exec "$root/.venv/bin/etcd" --data-dir "$root/.cache/etcd" --log-level warn "$@"
