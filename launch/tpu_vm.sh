#!/usr/bin/env bash
# A run on Cloud TPU VMs, one slice or several, from your own machine.
#
#   export NAME=mmjax ZONE=us-west4-a TYPE=v5litepod-256 VERSION=v2-alpha-tpuv5-lite
#   launch/tpu_vm.sh create     asks for the slices and waits until they are there
#   launch/tpu_vm.sh install    this repository's HEAD, in an environment on every host
#   launch/tpu_vm.sh ssh 'gcloud storage cp -r gs://bucket/data .'    on every host
#   launch/tpu_vm.sh run --config=configs/quickstart.py --workdir=gs://bucket/runs/one
#   launch/tpu_vm.sh logs       what process 0 says; Ctrl-C ends only the looking
#   launch/tpu_vm.sh stop       saves and ends, on every host
#   launch/tpu_vm.sh delete     all of it; the workdir is elsewhere and stays
#
# SLICES=2: several slices, which train as one. SPOT=1: cheaper, and may be taken away.
# The project and the account are gcloud's own (`gcloud config`).
set -euo pipefail

usage() {
  sed -n '2,15s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

[ $# -gt 0 ] || usage
command=$1
shift
: "${NAME:?is the name of the slices}" "${ZONE:?is where they are, as us-west4-a}"
slices=${SLICES:-1}

queued() { # queued VERB ARGS...
  gcloud compute tpus queued-resources "$1" "$NAME" --zone="$ZONE" "${@:2}"
}

everywhere() { # everywhere 'command'
  queued ssh --node=all --worker=all --command="$1"
}

create() {
  : "${TYPE:?is the kind of a slice, as v5litepod-256}"
  : "${VERSION:?is the runtime of that kind, as v2-alpha-tpuv5-lite}"
  local nodes=(--node-id="$NAME") spot=() state=
  [ "$slices" -eq 1 ] || nodes=(--node-count="$slices" --node-prefix="$NAME")
  [ -z "${SPOT:-}" ] || spot=(--spot)
  queued create --accelerator-type="$TYPE" --runtime-version="$VERSION" \
    "${nodes[@]}" ${spot[@]+"${spot[@]}"}
  until [ "$state" = ACTIVE ]; do
    state=$(queued describe --format='value(state.state)')
    echo "$NAME: $state" >&2
    case $state in
      ACTIVE) ;;
      FAILED | SUSPENDING | SUSPENDED) return 1 ;;
      *) sleep "${WAIT:-30}" ;;
    esac
  done
}

install() {
  local archive
  archive=$(mktemp)
  git -C "$(dirname "$0")/.." archive --format=tar.gz --output="$archive" HEAD
  gcloud compute tpus queued-resources scp "$archive" "$NAME:mmjax.tar.gz" \
    --zone="$ZONE" --node=all --worker=all
  rm "$archive"
  # The images have an older Python than mmjax needs: uv brings its own.
  everywhere 'set -e
    rm -rf mmjax && mkdir mmjax && tar -xzf mmjax.tar.gz -C mmjax
    python3 -m pip install --quiet --user uv
    python3 -m uv venv --quiet --clear --python 3.12 env
    python3 -m uv pip install --quiet --python env/bin/python -e "./mmjax[cloud]" "jax[tpu]"'
}

run() {
  [ $# -gt 0 ] || usage
  local args
  args=$(printf ' %q' "$@")
  everywhere "set -e
    cd mmjax
    if kill -0 \"\$(cat ../mmjax.pid 2>/dev/null)\" 2>/dev/null; then
      echo 'a run is going on; stop it first' >&2
      exit 1
    fi
    nohup launch/keep.sh ../env/bin/python train.py$args >../mmjax.log 2>&1 </dev/null &
    echo \$! >../mmjax.pid"
}

case $command in
  create) create ;;
  install) install ;;
  ssh) everywhere "${1:?is a command}" ;;
  run) run "$@" ;;
  logs) queued ssh --node=0 --worker=0 --command='tail -n 100 -F mmjax.log' ;;
  stop) everywhere "kill -TERM \$(cat mmjax.pid)" ;;
  delete) queued delete --force --quiet ;;
  *) usage ;;
esac
