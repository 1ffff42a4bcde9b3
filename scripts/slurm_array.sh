#!/usr/bin/env bash
#SBATCH --job-name=lora-one
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
# A sweep as a Slurm array: one task for each line of a file, a line holds the overrides of one run.
#
#   scripts/slurm_array.sh [sbatch's --option=value ...] sweep.txt [overrides for every line]
#   sbatch --array=1-$(wc -l < sweep.txt) scripts/slurm_array.sh sweep.txt [overrides for every line]
#
# Start it in the repository's root. A task's number is the number of its line. Lines are quoted as in a shell, but
# nothing in them is expanded; blank lines and what follows a # are passed over. The first form submits a copy of
# the file, for the lines that hold a run, with logs in slurm/; --array=%4 there means four at once, --array=3,7
# these lines only.
#
# Warned (120 seconds before the time limit, on preemption, by scancel --signal=USR1 --batch) the run keeps a checkpoint
# and the task goes back to the queue. A cancelled task does not. A run that another program is making is looked at
# again later. Any other exit code of the run is the task's. From the environment:
#
#   PYTHON        the interpreter (python)
#   PROCESSES     processes of a run, started by accelerate launch (as many as the task has GPUs)
#   MAX_REQUEUES  how often a task may go back to the queue (100)
#   WAIT_SECONDS  until a run that another program is making is looked at again (600)
set -uo pipefail

readonly BAD_INPUT=2 UNFINISHED=75 BUSY=76 # exit codes of run_exp.py
PYTHON=${PYTHON:-python}
pid='' # the run's process, or its launcher's
signals=0 # so many have come

say() { echo "slurm_array: $*"; }

refuse() {
  echo "error: $*" >&2
  exit "$BAD_INPUT"
}

# Without a number: the numbers of the lines that hold a run. With one: the words of that line, each ended by a NUL.
read_sweep() {
  "$PYTHON" -c '
import itertools, os, shlex, sys

def words(number, line):
    try:
        if line.lstrip().startswith("#"):
            return []
        return list(itertools.takewhile(lambda word: not word.startswith("#"), shlex.split(line)))
    except ValueError as error:
        sys.exit(f"error: {name}, line {number}: {str(error).lower()}; quote it as in a shell")

name, wanted = sys.argv[1], int(sys.argv[2] or 0)
try:
    text = open(name, encoding="utf-8", errors="surrogateescape").read()
except OSError as error:
    sys.exit(f"error: {name}: {error.strerror}; give a file with one run a line")
lines = dict(enumerate(text.splitlines(), start=1))
if wanted > len(lines):
    sys.exit(f"error: {name}: has {len(lines)} lines, none for task {wanted}; submit --array=1-{len(lines)}")
if wanted:
    for word in words(wanted, lines[wanted]):
        sys.stdout.buffer.write(os.fsencode(word) + b"\0")
else:
    print(*(number for number, line in lines.items() if words(number, line)), sep="\n")
' "$1" "${2:-}" || exit "$BAD_INPUT"
}

# Numbers as sbatch writes them: 1 2 3 7 is 1-3,7.
ranges() {
  local text='' first='' last='' number
  for number in "$@" end; do
    if [[ -n $last && $number == "$((last + 1))" ]]; then
      last=$number
      continue
    fi
    [[ -n $first ]] && text+=",$first"
    [[ $first != "$last" ]] && text+="-$last"
    first=$number last=$number
    [[ $number == end ]] && break
  done
  echo "${text#,}"
}

submit() {
  local options=() at_once='' array='' numbers copy
  while [[ ${1:-} == -* ]]; do
    case $1 in
      --array=%*) at_once=${1#--array=} ;;
      --array=*) array=${1#--array=} ;;
      *) options+=("$1") ;;
    esac
    shift
  done
  (($#)) || refuse "no sweep file; give one with a run a line: scripts/slurm_array.sh sweep.txt"
  [[ -f $1 ]] || refuse "$1: no such file; give one with a run a line (and sbatch's options as --option=value)"
  numbers=$(read_sweep "$1") || exit
  [[ -n $numbers ]] || refuse "$1: no run in it; write one run's overrides a line"
  # shellcheck disable=SC2086 # numbers, one a line
  [[ -n $array ]] || array=$(ranges $numbers)$at_once
  # Tasks read it when they start, which may be days after somebody has changed the file.
  copy=slurm/$(basename "$1" .txt)-$(cksum < "$1" | cut -d ' ' -f 1).txt
  mkdir -p slurm && cp "$1" "$copy" || refuse "$PWD/slurm: cannot write there; it is for logs and the sweep's copy"
  exec sbatch --output=slurm/%A_%a.log "${options[@]}" --array="$array" "$0" "$copy" "${@:2}"
}

# The program's own processes: an accelerate launch would give them 30 seconds, and end by SIGUSR1 itself.
forward() {
  signals=$((signals + 1))
  [[ -n $pid ]] || return 0
  if ((PROCESSES > 1)); then pkill -USR1 -P "$pid"; else kill -USR1 "$pid" 2> /dev/null; fi
  return 0
}

# Runs the command to its end, whatever signals come; its exit code.
run() {
  local code seen
  "$@" &
  pid=$!
  ((signals == 0)) || forward # one that came while it was started
  while true; do
    seen=$signals
    wait "$pid"
    code=$?
    ((signals > seen)) || break # a signal ends the wait, not the run; its exit code can be had again
  done
  pid=''
  return "$code"
}

# Back to the queue, unless somebody has cancelled the task: then its state is no longer RUNNING.
requeue() {
  local why=$1 delay=${2:-} state
  state=$(scontrol show job -o "$task" | grep -o 'JobState=[A-Z_]*')
  if [[ $state != JobState=RUNNING ]]; then
    say "$why; not put back to the queue (${state:-its state is unknown}); the same command goes on"
    return 1
  fi
  if ((${SLURM_RESTART_COUNT:-0} >= MAX_REQUEUES)); then
    say "$why; has been in the queue MAX_REQUEUES=$MAX_REQUEUES times again, so it is left; submit it again"
    return 1
  fi
  trap '' TERM USR1 # being requeued ends this script
  scontrol requeue "$task" || return 1 # by array and task: the last task's own number is the whole array's
  say "$why; back in the queue${delay:+, to be looked at again in $delay s}"
  [[ -z $delay ]] || scontrol update JobId="$task" StartTime="now+$delay"
}

make_run() {
  local file=${1:-} code words=() launch=() line=$SLURM_ARRAY_TASK_ID
  task=${SLURM_ARRAY_JOB_ID}_$line
  [[ -f $file ]] || refuse "${file:-no sweep file}: no such file in $PWD; give a sweep file with one run a line"
  read_sweep "$file" "$line" > /dev/null || exit
  mapfile -d '' -t words < <(read_sweep "$file" "$line")
  if ((${#words[@]} == 0)); then
    say "job $task: line $line of $file holds no run"
    exit 0
  fi
  if ((PROCESSES > 1)); then
    launch=(scripts/launch.py --config_file accelerate_config.yaml --main_process_port 0
      --num_processes "$PROCESSES")
  fi
  # Slurm is told by the exit code of the program itself, so that a failed run is a failed task.
  set -- "$PYTHON" "${launch[@]}" run_exp.py "${@:2}" "${words[@]}"
  say "job $task on $HOSTNAME, line $line of $file, start $((${SLURM_RESTART_COUNT:-0} + 1)): ${*@Q}"
  run "$@"
  code=$?
  if ((code == BUSY)); then
    requeue "another program is making this run" "$WAIT_SECONDS"
  elif ((code == UNFINISHED)) || ((signals && code > 128)); then # or signalled before it could listen
    requeue "unfinished (exit code $code)"
  fi
  exit "$code"
}

PROCESSES=${PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}
MAX_REQUEUES=${MAX_REQUEUES:-100}
WAIT_SECONDS=${WAIT_SECONDS:-600}
for name in PROCESSES MAX_REQUEUES WAIT_SECONDS; do
  [[ ${!name} =~ ^[0-9]+$ ]] || refuse "$name=${!name}: not a number"
done
[[ -f run_exp.py ]] || refuse "$PWD: no run_exp.py; start this in the repository's root"
command -v "$PYTHON" > /dev/null || refuse "PYTHON=$PYTHON: no such program; activate the environment, or set PYTHON"
if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
  trap forward USR1 TERM
  make_run "$@"
elif [[ ${0##*/} == slurm_script ]]; then # Slurm's copy
  refuse "not an array; submit it with sbatch --array=1-N, or start it without sbatch"
fi
submit "$@"
