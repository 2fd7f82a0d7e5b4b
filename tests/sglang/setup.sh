#!/usr/bin/env bash
# Build .venv-sglang at the root of the repository: SGLang on the CPU (about 3.2 GB, 2 to 4 minutes).
#
#   torch (any build)  ->  pinned requirements  ->  torchvision + sglang without their CUDA pins
#                      ->  cpu_platform, our plugin that lets SGLang run on plain PyTorch
#
# Nothing happens where the finished environment is already there.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
venv=$root/.venv-sglang
stamp=$venv/finished
inputs=("$here/setup.sh" "$here/requirements.txt" "$here"/cpu_platform/swarm_sglang_cpu/*.py "$here/cpu_platform/pyproject.toml")
wanted=$(cat "${inputs[@]}" | sha256sum)

if [[ -f $stamp && $(cat "$stamp") == "$wanted" ]]; then
    exit 0
fi
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || {
    echo "the pinned SGLang server needs Python 3.11; set PYTHON to one" >&2
    exit 2
}
rm -f "$stamp"
"$python" -m venv "$venv"
install=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)
"${install[@]}" torch==2.13.0
"${install[@]}" --no-deps -r "$here/requirements.txt"
"${install[@]}" --no-deps torchvision==0.28.0 sglang==0.5.23
# Built from a copy, so that the build leaves nothing in the repository.
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -r "$here/cpu_platform" "$copy/"
"${install[@]}" --no-deps --no-build-isolation "$copy/cpu_platform"
# A .pth line runs at interpreter start: SGLang's worker processes need the operators as well.
echo "import swarm_sglang_cpu.torchvision_operators" \
    > "$("$venv/bin/python" -c 'import site; print(site.getsitepackages()[0])')/swarm_sglang_cpu.pth"
echo "$wanted" > "$stamp"
