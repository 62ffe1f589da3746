#!/usr/bin/env bash
# MR-MAE on one node with 8 GPUs under SLURM, surviving time limits and pre-emption: two minutes before the end SLURM sends USR1, the
# trainer finishes its update, saves and exits, and the job queues itself again until it is finished. Adapt the #SBATCH lines, then
#   sbatch examples/slurm.sh /cache/in1k runs/mr-mae --recipe mr-mae --epochs 200 --batch-size 2048 --compile
#SBATCH --job-name=mr-mae
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=96
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
set -uo pipefail

stopping= job=
# B: sends USR1 to this script, which hands it to srun, srun to torchrun, and torchrun to every rank: hence --signals-to-handle.
# Without it USR1 would end torchrun at once. torchrun waits 30 s for its ranks (newer ones: --shutdown-timeout): one update and one
# checkpoint must fit. Checkpoints are written every ten minutes besides (--save-minutes).
trap 'stopping=USR1; [ -z "$job" ] || kill -USR1 "$job" 2>/dev/null' USR1
trap 'stopping=TERM; [ -z "$job" ] || kill -TERM "$job" 2>/dev/null' TERM

master=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((30000 + SLURM_JOB_ID % 10000))                                # another one for every job: two may share a node
srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}" \
    --rdzv-backend c10d --rdzv-endpoint "$master:$port" --rdzv-id "$SLURM_JOB_ID" \
    --signals-to-handle SIGTERM,SIGINT,SIGUSR1 \
    -m mrmae.train.cli "$@" &
job=$!
[ -z "$stopping" ] || kill -s "$stopping" "$job" 2>/dev/null          # a signal that came before this line
wait "$job"; status=$?
while kill -0 "$job" 2>/dev/null; do wait "$job"; status=$?; done   # the first wait ends when the trap has run

if [ -n "$stopping" ]; then
    scontrol requeue "$SLURM_JOB_ID"                                  # the same command continues from the checkpoint
    exit 0
fi
exit "$status"
