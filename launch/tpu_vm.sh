#!/bin/bash
# Trains on Cloud TPU VMs: gets a slice (or several), installs this working tree on every host, starts the training
# command there, shows host 0's log, and waits for the end. A preempted slice is requested anew, and the run resumes.
#
#     NAME=vit-b16 ZONE=us-east5-b ACCELERATOR=v6e-64 launch/tpu_vm.sh run --config configs/X.py --workdir gs://B/x
#     NAME=vit-b16 ZONE=us-east5-b launch/tpu_vm.sh stop      # the run saves and ends; `run` again resumes it
#     NAME=vit-b16 ZONE=us-east5-b launch/tpu_vm.sh delete    # gives the slice back
#
# Everything after `run` goes to `python -m fmcv_jax train`. The workdir must be a bucket (gs://): the hosts share no
# disk. Ctrl-C or a lost connection leaves the run going; the same `run` saves it, starts it again and follows it.
# It ends with the run's own status: 0, 2 for a user error, 75 after `stop`.
#
# Needs: gcloud, logged in, with a project set (gcloud config set project ID) and TPU quota in ZONE.
# Edit, or set in the environment: the values below.

set -euo pipefail

NAME=${NAME:-}                      # of the queued resource
ZONE=${ZONE:-}                      # such as us-east5-b
ACCELERATOR=${ACCELERATOR:-v6e-64}  # TPU type and size of one slice
SLICES=${SLICES:-1}                 # slices of that size, joined over the data center network
RUNTIME=${RUNTIME:-v2-alpha-tpuv6e} # v5e: v2-alpha-tpuv5-lite; v5p: v2-alpha-tpuv5; v4: tpu-ubuntu2204-base
CAPACITY=${CAPACITY---spot}         # --spot, --reserved, or empty for on demand
PYTHON_VERSION=${PYTHON_VERSION:-3.12}
RESTARTS=${RESTARTS:-20} # of a crashed run; a preempted one is started again without limit
PAUSE=${PAUSE:-10}       # seconds before it is started again
POLL=${POLL:-30}         # seconds between two looks at the run

qr() { gcloud compute tpus queued-resources "$1" "${@:2}" --zone="$ZONE" --quiet; }

on_all() { qr ssh "$NAME" --node=all --worker=all --command="$1"; }

# The state of the request, NONE where there is none, UNKNOWN where no answer came.
state() {
  local answer
  answer=$(qr list --filter="name~/$NAME\$" --format='value(state.state)') || answer=UNKNOWN
  echo "${answer:-NONE}"
}

is_gone() { [[ $(state) =~ ^(NONE|SUSPENDING|SUSPENDED|FAILED)$ ]]; }

delete() { qr delete "$NAME" --force; }

# Waits for the slice; asks for it where there is none, or where it was taken away.
acquire() {
  local now node=(--node-id="$NAME")
  if ((SLICES > 1)); then node=(--node-count="$SLICES" --node-prefix="$NAME"); fi
  while true; do
    now=$(state)
    case $now in
      ACTIVE) return ;;
      NONE)
        echo "asking for $SLICES x $ACCELERATOR in $ZONE" >&2
        # shellcheck disable=SC2086  # CAPACITY may be empty or several flags
        qr create "$NAME" "${node[@]}" --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME" $CAPACITY --async
        ;;
      SUSPENDED) delete ;;
      FAILED)
        echo "the request failed: gcloud compute tpus queued-resources describe $NAME --zone=$ZONE says why" >&2
        return 1
        ;;
      *) echo "$NAME is $now" >&2 ;;
    esac
    sleep "$POLL"
  done
}

# The working tree as it is (what git ignores left out), and an environment for it, on every host.
set_up() {
  local root bundle
  root=$(dirname "$0")/..
  bundle=$(mktemp -d)
  git -C "$root" ls-files --cached --others --exclude-standard -z |
    tar -C "$root" --null --files-from=- --ignore-failed-read -czf "$bundle/fmcv.tar.gz" &&
    qr scp "$bundle/fmcv.tar.gz" "$NAME:fmcv.tar.gz" --node=all --worker=all &&
    rm -r "$bundle" &&
    on_all "set -e
      rm -rf fmcv/code && mkdir -p fmcv/code && tar -xzf fmcv.tar.gz -C fmcv/code && cd fmcv/code
      python3 -m pip install --quiet --user uv
      [ -x ../venv/bin/python ] || python3 -m uv venv --quiet --python $PYTHON_VERSION ../venv
      python3 -m uv pip install --quiet --python ../venv/bin/python -c constraints.txt '.[tpu]'"
}

# Tells the run to save and end, and waits for that. fmcv/pid is the loop, the leader of a session: -pid is all in it.
stop() {
  # shellcheck disable=SC2016  # expands on the host
  on_all 'cd fmcv 2>/dev/null && [ -f pid ] || exit 0
    pid=$(cat pid)
    touch stopped
    pkill -TERM -P "$pid" || true
    for _ in $(seq 180); do kill -0 "$pid" 2>/dev/null || break; sleep 1; done
    kill -KILL -- -"$pid" 2>/dev/null || true
    rm -f pid'
}

# On each host: the command, in a session of its own that outlives the connection and starts it again; the status that
# it ends with is left in fmcv/status.
start() {
  local arguments
  arguments=$(printf '%q ' "$@")
  on_all "cd fmcv && rm -f status stopped && cat > loop.sh <<'LOOP'
echo \$\$ > ../pid
code=75
crashes=0
while [ ! -e ../stopped ]; do
  code=0
  FMCV_PROCESSES=auto ../venv/bin/python -m fmcv_jax train $arguments || code=\$?
  case \$code in
    0 | 2) break ;;
    75) ;;
    *) crashes=\$((crashes + 1)); [ \$crashes -le $RESTARTS ] || break ;;
  esac
  echo \"ended with \$code\"
  sleep $PAUSE
done
echo \$code > ../status
LOOP
    cd code && (setsid bash ../loop.sh > ../log 2>&1 < /dev/null &)"
}

# Shows host 0's log until every host has a status, and fails with the highest; or with 75 when the slice is gone.
follow() {
  local shown=0 text statuses ended=''
  while true; do
    sleep "$POLL"
    if is_gone; then return 75; fi
    # A host that does not answer this time is asked again.
    # shellcheck disable=SC2016  # expands on the host
    statuses=$(on_all 'echo "fmcv-status $(cat fmcv/status 2>/dev/null || echo runs)"' 2>/dev/null) || continue
    statuses=$(sed -n 's/.*fmcv-status //p' <<< "$statuses")
    if [[ -n $statuses && $statuses != *runs* ]]; then ended=$(sort -n <<< "$statuses" | tail -n 1); fi
    text=$(qr ssh "$NAME" --node=0 --worker=0 --command="tail -n +$((shown + 1)) fmcv/log" 2>/dev/null) || text=''
    if [[ -n $text ]]; then
      echo "$text"
      shown=$((shown + $(wc -l <<< "$text")))
    fi
    if [[ -n $ended ]]; then return "$ended"; fi
  done
}

run() {
  local code
  while true; do
    acquire
    code=0
    { stop && set_up && start "$@" && follow; } || code=$?
    if ! is_gone; then return "$code"; fi
    echo "$NAME was taken away" >&2
  done
}

case ${1:-} in
  run | stop | delete)
    if [[ -z $NAME || -z $ZONE ]]; then
      echo 'set NAME, the name of the slice, and ZONE, such as us-east5-b' >&2
      exit 2
    fi
    "$@"
    ;;
  *)
    sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac
