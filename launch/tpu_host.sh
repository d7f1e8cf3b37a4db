#!/usr/bin/env bash
# Prepares one host of a TPU slice: Python and jepax in ~/jepax/.venv, the bucket at /gcs.
# tpu_pod.sh runs it on every host before every start; what is there already is left alone.
#
#   bash jepax/launch/tpu_host.sh BUCKET
set -euo pipefail

bucket=$1
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH=$HOME/.local/bin:$PATH

# The image's own Python is older than jepax needs; uv brings one along.
command -v uv >/dev/null || python3 -m pip install --quiet --user uv
[[ -x .venv/bin/python ]] || uv venv --quiet --python=3.12 .venv
uv pip install --quiet --python=.venv/bin/python '.[tpu]'

if ! command -v gcsfuse >/dev/null; then
  keys=/usr/share/keyrings/cloud.google.asc repository=https://packages.cloud.google.com/apt
  curl -fsSL "$repository/doc/apt-key.gpg" | sudo tee "$keys" >/dev/null
  echo "deb [signed-by=$keys] $repository gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  # A fresh machine may still be at its own updates.
  sudo apt-get -qq -o DPkg::Lock::Timeout=600 update
  sudo apt-get -qq -o DPkg::Lock::Timeout=600 install --yes gcsfuse
fi
if ! mountpoint -q /gcs; then
  sudo mkdir -p /gcs
  sudo chown "$(id -un)" /gcs
  # A checkpoint is a directory that is renamed when whole; no negative cache, so that all hosts
  # see at once what the first one writes.
  gcsfuse --implicit-dirs --rename-dir-limit=1000000 --metadata-cache-negative-ttl-secs=0 \
    "$bucket" /gcs
fi
