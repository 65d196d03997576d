#!/bin/sh
# Joins this machine to a Ray cluster by hand: on_premise.sh head | prefill | decode [HEAD_ADDRESS]
#
#   on the head:          on_premise.sh head
#   on each GPU machine:  on_premise.sh prefill 10.0.0.1     or     on_premise.sh decode 10.0.0.1
#   then on the head:     splitserve up deploy/ray/cluster.yaml
#
# Copy the head's token (~/.ray/auth_token) to the other machines first. The labels are what cluster.yaml's pools ask for.
set -eu
role=${1:?head, prefill or decode}
head=${2:-}
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
labels="splitserve/role=$role"
if command -v nvidia-smi >/dev/null; then # Ray labels the accelerator by itself; say what it found
  nvidia-smi --query-gpu=name --format=csv,noheader | sort | uniq -c
fi
if [ "$role" = head ]; then
  [ -s "$HOME/.ray/auth_token" ] || ray get-auth-token --generate >/dev/null
  exec ray start --head --port=6379 --labels "$labels" --dashboard-host=127.0.0.1
fi
exec ray start --address "${head:?the address of the head}:6379" --labels "$labels"
