#!/usr/bin/env bash
# What runs in a pod: `python -m jepax.main` with the arguments given, and an exit status that
# Kubernetes understands. jepax exits with 0 when it was stopped and has saved, which a Job would
# take for done; here that is 143, as of any process ended by SIGTERM, and the JobSet restarts it.
#
#   bash launch/gke_pod.sh --config=configs/ijepa_vitb.py --workdir=/gcs/runs/vitb
set -euo pipefail

workdir='' once=no
for argument in "$@"; do
  case $argument in
    --workdir=*) workdir=${argument#*=} ;;
    --dry_run) once=yes ;; # it leaves no results.json
  esac
done
if [[ -z $workdir ]]; then
  echo "gke_pod.sh: --workdir=... is missing: a path that all pods share" >&2
  exit 2
fi

# This shell is process 1 of the container: SIGTERM reaches it alone. A second one jepax would die of.
stopped=no status=0
trap 'trap "" TERM; stopped=yes; kill -TERM "$!"' TERM # before there is anything to be signalled for
python -m jepax.main "$@" &
child=$!
wait "$child" || status=$?
if [[ $stopped == yes ]]; then # the trap ended the first wait
  status=0
  wait "$child" || status=$?
fi
if ((status != 0)) || [[ $once == yes ]]; then exit "$status"; fi

# The first process writes it before the others end; a mounted bucket may show it late.
for _ in {1..6}; do
  if [[ -e $workdir/results.json ]]; then exit 0; fi
  sleep "${POLL:-5}"
done
exit 143
