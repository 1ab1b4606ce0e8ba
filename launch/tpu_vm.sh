#!/bin/bash
# Trains on Cloud TPU VMs, one slice or several, over ssh, from any machine with gcloud.
#
#   export ZONE=us-central1-a ACCELERATOR=v5litepod-256
#   launch/tpu_vm.sh create NAME       # a queued resource; SLICES=2 several slices, SPOT=1 spot; waits
#   launch/tpu_vm.sh install NAME      # the last commit of this repository, on every worker
#   launch/tpu_vm.sh train NAME configs/siglip_l16.py:folder:/shared/pairs /shared/run1 [flags]
#   launch/tpu_vm.sh delete NAME
#
# Workdir and data must be mounted on every worker: SETUP, a command that `install` runs on each, is
# the place for it, e.g. SETUP='sudo mount 10.0.0.2:/share /shared' (Filestore). `train` starts again
# after exit code 75; after a lost spot slice: delete, create, install, train; it resumes.
#
# Run here: shellcheck, `gcloud meta lint-gcloud-commands` on every command, and all four verbs
# against a gcloud that runs the commands on this machine. NOT run: on a TPU VM.
set -euo pipefail
[ $# -ge 2 ] || { echo "usage: launch/tpu_vm.sh create|install|train|delete NAME ..." >&2; exit 1; }
: "${ZONE:?}" "${ACCELERATOR:?}" "${SLICES:=1}"
verb=$1 name=$2
shift 2
case $ACCELERATOR in
  v5litepod-*) runtime=v2-alpha-tpuv5-lite preset=tpu_v5e ;;
  v5p-*) runtime=v2-alpha-tpuv5 preset=tpu_v5p ;;
  v6e-*) runtime=v2-alpha-tpuv6e preset=tpu_v6e ;;
  *) echo "ACCELERATOR must be v5litepod-N, v5p-N or v6e-N, got $ACCELERATOR" >&2; exit 1 ;;
esac
queued() { gcloud compute tpus queued-resources "$1" "$name" --zone="$ZONE" "${@:2}"; }
# all workers at the same time (the default is groups of 64): they wait for each other
everywhere() { queued ssh --node=all --worker=all --batch-size=all --command="$1"; }

case $verb in
  create)
    nodes=(--node-id="$name") && [ "$SLICES" -eq 1 ] || nodes=(--node-count="$SLICES" --node-prefix="$name")
    queued create --accelerator-type="$ACCELERATOR" --runtime-version="$runtime" "${nodes[@]}" ${SPOT:+--spot}
    until state=$(queued describe --format='value(state.state)') && [ "$state" = ACTIVE ]; do
      case $state in FAILED | SUSPEND*) echo "$name: $state" >&2; exit 1 ;; *) sleep 30 ;; esac
    done ;;
  install)
    git archive --prefix=flax_vlm/ --output=/tmp/flax_vlm.tar.gz HEAD
    gcloud compute tpus queued-resources scp /tmp/flax_vlm.tar.gz "$name:" --zone="$ZONE" --node=all --worker=all --batch-size=all
    # uv brings a Python; the image's is 3.10
    everywhere "${SETUP:-true} && tar xf flax_vlm.tar.gz && cd flax_vlm && pip install --quiet uv && python3 -m uv venv --clear --python=3.12 .venv && python3 -m uv pip install --python=.venv -e '.[tpu]'" ;;
  train)
    printf -v run '%q ' .venv/bin/python train.py --distributed=auto --config="$1" --workdir="$2" "${@:3}"
    cache=${JAX_COMPILATION_CACHE_DIR:-$(dirname "$2")/compilation_cache}
    command="cd flax_vlm && set -a && . launch/env/$preset.env && JAX_COMPILATION_CACHE_DIR=$cache && exec $run"
    until everywhere "$command"; do [ $? -eq 75 ] || exit 1; sleep 30; done ;;
  delete) queued delete --force --quiet ;;
esac
