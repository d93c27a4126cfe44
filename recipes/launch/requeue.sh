# Sourced by Slurm's batch scripts: runs a command that SIGUSR1, Slurm's warning, makes save and stop, and puts the job
# back into the queue then.

run_or_requeue() {
    local requeue=0 code=0 step job
    "$@" &
    step=$!
    # Signals to the batch script do not reach the command: pass them on.
    trap 'requeue=1; kill -USR1 "$step"' USR1
    trap 'kill -TERM "$step"' TERM
    wait "$step" || code=$?
    # A signal that arrives ends the first wait before the step itself has ended.
    while kill -0 "$step" 2>/dev/null; do code=0; wait "$step" || code=$?; done
    # Of an array, this task alone: one of its tasks has the array's own number as its job's.
    job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
    if [ "$requeue" = 1 ]; then scontrol requeue "${job:-$SLURM_JOB_ID}"; fi
    exit "$code"
}
