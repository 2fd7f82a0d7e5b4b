#!/usr/bin/env bash
# Run a script of this folder on a GPU machine without a network, with SGLang from the bundle.
#
#   bash benchmarks/gpu/machine.sh serve --json --out OUT        (weight_sync, agreement, int4, kernels)
#
# Unpacks .bundle/sglang.tar.xz (bundle.py) into a folder of its own, once a machine, and runs
# benchmarks/gpu/NAME.py with it before everything that is installed. SWARM_COMMIT names the commit
# where there is no git.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
site=${SWARM_SGLANG_SITE:-/tmp/swarm-sglang-site}
archive=${SWARM_SGLANG_BUNDLE:-$root/.bundle/sglang.tar.xz}
exec 9>"$site.lock" # several may start at once
flock 9
if [[ ! -f $site/.finished ]]; then
    [[ -f $archive ]] || { echo "$archive is not there; make it with benchmarks/gpu/bundle.py" >&2; exit 2; }
    mkdir -p "$site"
    tar -xJf "$archive" -C "$site"
    touch "$site/.finished"
fi
exec 9>&-
nvcc=$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)
export CUDA_HOME=${CUDA_HOME:-$(dirname "$(dirname "$(readlink -f "$nvcc")")")}
export PATH=$CUDA_HOME/bin:$PATH
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
export LD_LIBRARY_PATH=$site/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export SGLANG_IS_FLASHINFER_AVAILABLE=false HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
export PYTHONUNBUFFERED=1 NO_PROXY=127.0.0.1,localhost no_proxy=127.0.0.1,localhost
name=$1
shift
exec python3 "$root/benchmarks/gpu/$name.py" "$@"
