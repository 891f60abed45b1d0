#!/usr/bin/env bash
# Several nodes that find each other: run the same command on each of them.
#   NNODES=2 RDZV_ENDPOINT=node-a:29500 nodes_c10d.sh generate --model facebook/opt-66b --prompt "Paris is"
# RDZV_ENDPOINT is one of the nodes, with a free port. Optional: RDZV_ID (one for each job), NPROC (ranks a node).
set -euo pipefail
export PYTHONSAFEPATH=1
exec python -m dejavu.launch.cli launch \
  --nnodes "${NNODES:?how many nodes}" --rdzv-backend c10d --rdzv-id "${RDZV_ID:-dejavu}" \
  --rdzv-endpoint "${RDZV_ENDPOINT:?HOST:PORT of one of the nodes}" \
  --nproc-per-node "${NPROC:-gpu}" "$@"
