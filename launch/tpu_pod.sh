#!/usr/bin/env bash
# Trains on all hosts of a Cloud TPU slice and goes on after every preemption, until it is done.
#
#   launch/tpu_pod.sh --name=vitb --zone=us-west4-a --type=v5litepod-64 --spot --bucket=BUCKET -- \
#     --config=configs/ijepa_vitb.py --workdir=/gcs/runs/vitb
#
# Before `--` stand options of this script, after it the arguments of `python -m jepax.main`.
#   --name=NAME      of the queued resource and of its node
#   --zone=ZONE      where it lies
#   --type=TYPE      accelerator type: v5litepod-64, v5p-128, v6e-256, ...
#   --runtime=IMAGE  of the TPU VMs; Google's for the type by default (v2 to v6e)
#   --bucket=BUCKET  Cloud Storage bucket that every host mounts at /gcs; the workdir lies there
#   --spot           cheaper, and taken away at any time
#   --keep           leave the TPU running when the run is done
#   --dry_run        print the commands and run none
#
# Runs on any machine with gcloud, which has to stay up; the code is the last commit of this
# checkout. A run is done once WORKDIR/results.json exists. POLL: seconds between two looks at the
# queue. A run that fails three times in a row on a TPU that is still there ends the script; the TPU
# stays, to be looked at.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
name='' zone='' type='' bucket='' runtime=''
spot='' keep=no dry=no

fail() {
  echo "tpu_pod.sh: $*" >&2
  exit 2
}

while (($#)); do
  case $1 in
    --name=* | --zone=* | --type=* | --bucket=* | --runtime=*)
      option=${1%%=*}
      printf -v "${option#--}" %s "${1#*=}"
      ;;
    --spot) spot=yes ;;
    --keep) keep=yes ;;
    --dry_run) dry=yes ;;
    --) break ;;
    *) fail "unknown option $1; arguments of jepax.main stand after --" ;;
  esac
  shift
done
[[ ${1-} == -- ]] || fail "the arguments of jepax.main are missing; they stand after --"
shift
for option in name zone type bucket; do
  [[ -n ${!option} ]] || fail "--$option=... is missing"
done
if [[ -z $runtime ]]; then
  case $type in
    v[234]-*) runtime=tpu-ubuntu2204-base ;;
    v5lite*) runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    *) fail "--runtime=... is missing, and no image is known for --type=$type" ;;
  esac
fi

workdir='' once=no
for argument in "$@"; do
  case $argument in
    --workdir=*) workdir=${argument#*=} ;;
    --dry_run) once=yes ;; # jepax.main's: it leaves no results.json
  esac
done
[[ $workdir == /gcs/* ]] ||
  fail "--workdir=${workdir:-...} must lie in /gcs, which all hosts share: --workdir=/gcs/runs/NAME"

[[ $dry == yes ]] || git -C "$root" rev-parse --quiet --verify HEAD >/dev/null ||
  fail "the TPU gets the last commit, and $root has none; start from a git clone of jepax"

call() {
  if [[ $dry == yes ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

queued() { call gcloud compute tpus queued-resources "$@" --zone="$zone"; }
on_hosts() { call gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker="$1" --command="$2"; }

state() { # '' where there is none, UNKNOWN where gcloud can't tell
  if gcloud compute tpus queued-resources describe "$name" --zone="$zone" \
    --format='value(state.state)' 2>"$scratch/errors"; then
    return
  fi
  grep -q NOT_FOUND "$scratch/errors" && return
  cat "$scratch/errors" >&2
  echo UNKNOWN
}

create() {
  queued create "$name" --node-id="$name" --accelerator-type="$type" \
    --runtime-version="$runtime" ${spot:+--spot}
}

delete() { queued delete "$name" --force --quiet; }

wait_until_active() {
  local now before=''
  while now=$(state) && [[ $now != ACTIVE ]]; do
    [[ $now == "$before" ]] || echo "$name: ${now:-not there yet}"
    before=$now
    case $now in
      '') create ;;
      SUSPENDED | FAILED) delete ;;
    esac
    sleep "${POLL:-30}"
  done
}

install() { # quick where it was done before
  call gcloud compute tpus tpu-vm scp "$archive" "$name:jepax.tar.gz" --zone="$zone" --worker=all &&
    on_hosts all "tar xzf jepax.tar.gz && bash jepax/launch/tpu_host.sh $(printf %q "$bucket")"
}

train() { on_hosts all "cd jepax && .venv/bin/python -m jepax.main$(printf ' %q' "$@")"; }

is_done() { on_hosts 0 "test -e $(printf %q "$workdir/results.json")"; }

scratch=$(mktemp -d)
trap 'rm -r "$scratch"' EXIT
archive=$scratch/jepax.tar.gz # one state of the code for all starts
call git -C "$root" archive --format=tar.gz --prefix=jepax/ --output="$archive" HEAD

if [[ $dry == yes ]]; then
  create && install && train "$@" && is_done
  [[ $keep == yes ]] || delete
  exit
fi

[[ $(state) != UNKNOWN ]] || fail "gcloud can't say whether there is a $name in $zone"
failures=0
while true; do
  wait_until_active
  if install && train "$@"; then
    failures=0
    if [[ $once == yes ]] || is_done; then break; fi
    echo "$name: stopped before its end"
  elif [[ $(state) == ACTIVE ]]; then # or the loss of the TPU has not been noticed yet
    failures=$((failures + 1))
    echo "$name: failed, $failures in a row"
    if ((failures == 3)); then exit 1; fi
  fi
  sleep "${POLL:-30}"
done
echo "$name: done"
[[ $keep == yes ]] || delete
