#!/usr/bin/env bash
# Train on this machine with one process per GPU, or with N processes.
#
#   launch/local.sh experiment=demo parallel=fsdp             every GPU (without any: one process)
#   launch/local.sh 4 experiment=demo parallel=hsdp_ep        4 processes
#
#   RESTARTS=0 launch/local.sh 4 ...                          a crash ends it (otherwise 3 restarts)
#   PREFLIGHT=1 launch/local.sh 4 ...                         first asks every device: triquetra preflight
#
# Ctrl-C (or SIGTERM): every process finishes its step, saves and leaves; the same command continues. A process that
# dies (out of memory, a hang, an exception) starts all again from the last checkpoint, so that a night is not lost;
# not so if its exit code says that it would end the same way again. The exit code is that of the first to fail.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=python3
[[ -x .venv/bin/python ]] && python=.venv/bin/python

if [[ "${1:-}" =~ ^[0-9]+$ ]]; then
    num_ranks=$1
    shift
else
    num_ranks=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)
    ((num_ranks > 0)) || num_ranks=1
fi
((num_ranks > 0)) || { echo "usage: launch/local.sh [N] experiment=demo parallel=hsdp_ep ..." >&2; exit 2; }

# The processes share the cores; torchrun alone would give each of them one thread.
threads=$(($(nproc) / num_ranks))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}

launch=("$python" -m trainer.torchrun --standalone --nproc-per-node "$num_ranks" --shutdown-timeout 600)
[[ "${PREFLIGHT:-0}" == 0 ]] || "${launch[@]}" -m trainer preflight "$@"
exec "${launch[@]}" --max-restarts "${RESTARTS:-3}" -m trainer.train "$@"
