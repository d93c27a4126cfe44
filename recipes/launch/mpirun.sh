#!/usr/bin/env bash
# Train under an MPI launcher (Open MPI's options). Ranks and their meeting point come from MPI through
# mpi4py (pip install 'ebt-megatron[mpi]'), so nothing but the number of ranks is needed:
#
#   RANKS=16 HOSTS=node1:8,node2:8 recipes/launch/mpirun.sh recipes/text/s1_xxs.yaml parallel.tensor=8
#
# RANKS          all ranks together                        default 1
# HOSTS          host:slots,... or empty for this machine
# MPIRUN         the launcher                              default mpirun
# MPIRUN_OPTIONS more options for it, e.g. "--oversubscribe"
#
# --dry-run prints the command instead of running it.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

COMMAND=("${MPIRUN:-mpirun}" -n "${RANKS:-1}")
if [ -n "${HOSTS:-}" ]; then COMMAND+=(--host "$HOSTS"); fi
if [ -n "${OMP_NUM_THREADS:-}" ]; then COMMAND+=(-x OMP_NUM_THREADS); fi
# shellcheck disable=SC2206  # several words on purpose
COMMAND+=(${MPIRUN_OPTIONS:-})
run "${COMMAND[@]}" "${PYTHON:-python}" -m ebt_megatron.train "${ARGUMENTS[@]}"
