#!/usr/bin/env bash
# One rank a GPU of this machine; NPROC=2 one_node.sh ... takes two.
#   one_node.sh generate --model facebook/opt-66b --prompt "Paris is"
set -euo pipefail
export PYTHONSAFEPATH=1
exec python -m dejavu.launch.cli launch --standalone --nproc-per-node "${NPROC:-gpu}" "$@"
