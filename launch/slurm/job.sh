# What the jobs share; they source it.
#
# Everything of a job is in $results, by default results/JOB: its log, and what it makes. A requeued job has the
# same folder. Set by the user, all of it optional: DEJAVU_RESULTS (the folder of all jobs), DEJAVU_RANKS (ranks
# a node; by default its GPUs, or one), DEJAVU_REQUEUES (how often a job may be told to stop and go on; 20).
set -euo pipefail
export PYTHONSAFEPATH=1

# an array's task has a number of its own, but for one of them, which has the whole array's
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
results=$(realpath -m "${DEJAVU_RESULTS:-results}/$job")
attempt=${SLURM_RESTART_COUNT:-0}
mkdir -p "$results"
echo "job $job: its log and results are in $results"
exec >>"$results/log.txt" 2>&1

# srun asks for one CPU a task, whatever the job has, unless it is told
[[ ! ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

fail() {
  echo "error: $1" >&2
  exit 2
}

under=() # what each node's launcher runs under: a profiler
warned= cancelled=
# Slurm's warning comes to this shell alone (--signal=B:USR1@120); it goes on to the ranks.
trap 'warned=yes; scancel --quiet --signal=USR1 "$job" || true' USR1
# Cancelled, or preempted by Slurm, which gives the signal to the ranks itself, and then decides what becomes of it.
trap 'cancelled=yes' TERM

# ranks COMMAND ...: `dejavu COMMAND ...` on every rank of every node. If it fails, the job does; if it was told to
# stop, the job is queued again.
ranks() {
  local head step status=0
  head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  [[ ! $warned ]] || requeue # too late to begin anything
  rm -f "$results/preempted"
  # A node's number is known on the node. A node whose ranks were told to stop leaves a file and ends well, for
  # Slurm kills the other nodes when one ends badly, and they may not have said all yet.
  # shellcheck disable=SC2016
  srun --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --kill-on-bad-exit=1 bash -c '
    trap : USR1 TERM
    export PET_NODE_RANK=$SLURM_NODEID
    status=0
    "${@:2}" || status=$?
    if ((status == 75)); then
      touch "$1/preempted"
      exit 0
    fi
    exit "$status"
  ' bash "$results" "${under[@]}" python -m dejavu.launch.cli launch --nnodes "$SLURM_NNODES" \
    --master-addr "$head" --master-port "$((20000 + SLURM_JOB_ID % 20000))" \
    --nproc-per-node "${DEJAVU_RANKS:-${SLURM_GPUS_ON_NODE:-1}}" "$@" &
  step=$!
  while kill -0 "$step" 2>/dev/null; do
    wait "$step" || true # a signal ends a wait, not the step
  done
  wait "$step" || status=$?
  # (Slurm tells the other nodes to stop when one has failed, too: that is a failure.)
  if [[ ! $cancelled && ((-e $results/preempted && $status == 0) || ($warned && $status != 0)) ]]; then
    requeue
  fi
  ((status == 0)) || exit "$status"
}

keep() { :; } # what the ranks have made, where there is more to it: Slurm kills a job that it queues again
requeue() {
  echo "job $job was told to stop; attempt $attempt" >&2
  keep
  if ((attempt < ${DEJAVU_REQUEUES:-20})); then
    scontrol requeue "$job"
  fi
  exit 75
}
