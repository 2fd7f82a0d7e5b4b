#!/usr/bin/env bash
# Run the tests that need a real SGLang server, on the CPU (make test-sglang).
#
#   setup.sh -> .venv-sglang      write_checkpoint.py -> a model of nano's shape
#   SGLang serves it on a loopback port -> pytest -m sglang -> the server ends, whatever happened
#
# Arguments go to pytest. The first run takes minutes, because it installs SGLang.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
python=$root/.venv/bin/python
ready_within_s=300

"$here/setup.sh"
work=$(mktemp -d)
server=
finish() {
    if [[ -n $server ]]; then
        kill -TERM "$server" 2>/dev/null || true
        for _ in {1..50}; do
            kill -0 "$server" 2>/dev/null || break
            sleep 0.1
        done
        # It leads a process group of its own; this ends workers that it left behind.
        kill -KILL -- "-$server" 2>/dev/null || true
    fi
    rm -rf "$work"
}
trap finish EXIT

"$python" "$here/write_checkpoint.py" "$work/checkpoint"
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
url=http://127.0.0.1:$port

# float32, so that no rounding sends a token to another expert than in our model.
SGLANG_PLATFORM=swarm_cpu SGLANG_USE_CPU_ENGINE=0 HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 HF_HOME=$work/hf \
    setsid "$root/.venv-sglang/bin/python" -m sglang.launch_server \
    --model-path "$work/checkpoint" --trust-remote-code --dtype float32 \
    --host 127.0.0.1 --port "$port" \
    --device cpu --attention-backend torch_native --sampling-backend pytorch \
    --cuda-graph-backend-decode disabled --cuda-graph-backend-prefill disabled \
    --disable-overlap-schedule --max-total-tokens 32768 --mem-fraction-static 0.2 \
    --tool-call-parser kimi_k2 --reasoning-parser kimi_k2 \
    >"$work/server.log" 2>&1 &
server=$!
disown "$server" # no message of the shell when it ends

echo "waiting for SGLang at $url"
for ((second = 0; ; second++)); do
    if ! kill -0 "$server" 2>/dev/null || ((second >= ready_within_s)); then
        echo "SGLang did not start; the end of its log:" >&2
        tail -n 40 "$work/server.log" >&2
        exit 1
    fi
    # This one generates a token, so the first test does not wait for that either.
    if "$python" - "$url/health_generate" 2>/dev/null <<'PYTHON'
import sys, urllib.request
urllib.request.urlopen(sys.argv[1], timeout=120)
PYTHON
    then
        break
    fi
    sleep 1
done
echo "ready"

status=0
(cd "$root" && SWARM_SGLANG_URL=$url SWARM_SGLANG_CHECKPOINT=$work/checkpoint \
    "$python" -m pytest -m sglang tests/model_backend/sglang "$@") || status=$?
if ((status != 0)); then
    echo "the end of SGLang's log:" >&2
    tail -n 40 "$work/server.log" | cut -c1-300 >&2
fi
exit "$status"
