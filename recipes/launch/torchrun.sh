#!/usr/bin/env bash
# Train on one or several nodes with torchrun. Run the same line on every node:
#
#   NODES=4 HEAD=node1:29400 recipes/launch/torchrun.sh recipes/text/s1_xxs.yaml parallel.tensor=8
#
# NODES          number of nodes, or MIN:MAX to go on with fewer (elastic)   default 1
# RANKS_PER_NODE ranks on each node: a number, or gpu, cpu, auto             default auto
# HEAD           host:port where the nodes meet; one node's agent serves it  default localhost:29400
# RUN_ID         must be the same on all nodes, different for each run       default ebt
# RESTARTS       how often a failed run is started again from its checkpoint default 3
# LOCAL_ADDRESS  this node's address, if the others cannot resolve its name
#
# SIGTERM and Ctrl-C give the ranks TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds (default 300; torchrun's own: 30) to
# finish the step and save.
#
# --dry-run prints the command instead of running it.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}"

COMMAND=(
    "${PYTHON:-python}" -m torch.distributed.run
    --nnodes "${NODES:-1}"
    --nproc-per-node "${RANKS_PER_NODE:-auto}"
    --rdzv-backend c10d
    --rdzv-endpoint "${HEAD:-localhost:29400}"
    --rdzv-id "${RUN_ID:-ebt}"
    --max-restarts "${RESTARTS:-3}"
)
if [ -n "${LOCAL_ADDRESS:-}" ]; then COMMAND+=(--local-addr "$LOCAL_ADDRESS"); fi
run "${COMMAND[@]}" -m ebt_megatron.train "${ARGUMENTS[@]}"
