#!/usr/bin/env bash
# extract-features on a SLURM cluster: an array job, one GPU per task. All tasks run the same command and take shards as they come:
#   sbatch examples/slurm-extract.sh /data/imagenet/train /cache/in1k --views 2
# Adapt the #SBATCH lines. Two minutes before its time limit, or when it is pre-empted, a task is stopped and queued again; what is
# committed stays. The images, the cache and any weights files must be seen under the same paths on every node.
#SBATCH --job-name=extract
#SBATCH --array=0-7
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=16
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
set -uo pipefail

stopping= job=
trap 'stopping=1; [ -z "$job" ] || kill -TERM "$job" 2>/dev/null' USR1 TERM

srun extract-features "$@" &
job=$!
[ -z "$stopping" ] || kill -TERM "$job" 2>/dev/null   # a signal that came before this line
wait "$job"; status=$?
while kill -0 "$job" 2>/dev/null; do wait "$job"; status=$?; done   # the first wait ends when the trap has run

if [ -n "$stopping" ] && [ "$status" -ne 0 ]; then
    scontrol requeue "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
    exit 0
fi
exit "$status"
