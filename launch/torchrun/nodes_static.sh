#!/usr/bin/env bash
# Several nodes that know their places: run it on each of them, with
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node-a nodes_static.sh generate --model facebook/opt-66b --prompt "Paris is"
# NODE_RANK counts from 0, on the node called MASTER_ADDR. Optional: MASTER_PORT, NPROC (ranks a node).
set -euo pipefail
export PYTHONSAFEPATH=1
exec python -m dejavu.launch.cli launch \
  --nnodes "${NNODES:?how many nodes}" --node-rank "${NODE_RANK:?which of them this is, from 0}" \
  --master-addr "${MASTER_ADDR:?the node of rank 0}" --master-port "${MASTER_PORT:-29500}" \
  --nproc-per-node "${NPROC:-gpu}" "$@"
