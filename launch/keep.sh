#!/usr/bin/env bash
# Runs a command again until it is done; the same command goes on from the last checkpoint.
#
#   launch/keep.sh python train.py --config=configs/quickstart.py --workdir=/shared/run
#
# 0 = done. 2 = something doesn't fit, which no repetition mends. Anything else (75 = asked
# to stop, or another host was lost; 128 and more = killed) is tried again, 75 as often as
# it takes, the rest at most RESTARTS times (20). SIGTERM to this script goes to the
# command, which saves; it is not started again.
set -u

restarts=${RESTARTS:-20} wait=${WAIT:-10} stopping=
child=

stop() {
  stopping=1
  [ -n "$child" ] && kill -TERM "$child" 2>/dev/null
}
trap stop TERM INT

while :; do
  "$@" &
  child=$!
  wait "$child"
  code=$?
  # A signal to this script ends the first `wait`, not the command.
  while kill -0 "$child" 2>/dev/null; do
    wait "$child"
    code=$?
  done
  if [ "$code" -eq 0 ] || [ "$code" -eq 2 ] || [ -n "$stopping" ]; then
    exit "$code"
  fi
  if [ "$code" -ne 75 ]; then
    [ "$restarts" -gt 0 ] || exit "$code"
    restarts=$((restarts - 1))
  fi
  echo "keep.sh: exit code $code; starting again in $wait s" >&2
  sleep "$wait" &
  wait $!
  [ -z "$stopping" ] || exit "$code"
done
