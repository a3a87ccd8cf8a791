#!/bin/sh
# etcd on its default ports, for a pipeline that is started by hand; more arguments go to
# etcd. Instances that an earlier run left in it would confuse a new one, so it starts empty.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
mkdir -p "$root/.cache"
# An etcd holds a lock on its folder; those without one are left from earlier runs.
for folder in "$root"/.cache/etcd.*; do
    [ ! -d "$folder" ] || flock -n "$folder" rm -rf "$folder" || true
done
folder=$(mktemp -d "$root/.cache/etcd.XXXXXX")
exec 9<"$folder"
flock 9
exec "$root/scripts/setup" base \
    "$root/.venv/bin/etcd" --data-dir "$folder" --log-level warn "$@"
