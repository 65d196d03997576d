#!/bin/sh
# Starts splitserve on the Ray cluster whose head this is, and returns once it serves.
set -eu
export RAY_AUTH_MODE=token
exec splitserve up "${1:-/etc/splitserve/cluster.yaml}" --detach
