#!/usr/bin/env bash
# One trainrun on the nodes of one Slurm job, one Ray node per machine:
#
#   sbatch cluster/slurm.sh TRAINRUN [options of `cuvis-dist run`]
#
# The Ray cluster, its token and the job begin and end together. Submit from a folder that all
# nodes see; the environment is .venv there, or the folder that CUVIS_DIST_VENV names.
#SBATCH --job-name=cuvis-dist
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=1
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --output=cuvis-dist-%j.log
set -euo pipefail

: "${1:?usage: sbatch cluster/slurm.sh TRAINRUN [options of cuvis-dist run]}"
# shellcheck source=/dev/null
source "${CUVIS_DIST_VENV:-$PWD/.venv}/bin/activate"

# A token for this job alone, in a file that only its owner can read (mktemp makes it so).
export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN_PATH=$(mktemp "$HOME/.cuvis-dist-token.XXXXXXXX")
export RAY_AUTH_TOKEN_PATH
trap 'rm -f "$RAY_AUTH_TOKEN_PATH"' EXIT
od -An -N32 -tx1 /dev/urandom | tr -d ' \n' > "$RAY_AUTH_TOKEN_PATH"

read -r head_ip _ < <(hostname -I) # this script runs on the first node
address="$head_ip:$((20000 + SLURM_JOB_ID % 10000))" # above the ports of Ray's workers

# Starts Ray on every node, runs the command on the first, stops Ray, and ends with its exit code.
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300 RAY_USAGE_STATS_ENABLED=0
srun ray symmetric-run --address "$address" --min-nodes "$SLURM_JOB_NUM_NODES" \
  --num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" \
  --dashboard-host=127.0.0.1 \
  -- cuvis-dist run --address "$address" "$@"
