#!/usr/bin/env bash
# Run the tests that need real SGLang servers, on the CPU (make test-sglang).
#
#   setup.sh -> .venv-sglang      write_checkpoint.py -> a model of nano's shape, random weights
#                                 model_backend/nano  -> nano, with the processor that SGLang asks for
#   three servers on loopback ports: random, nano, nano (a test kills the last one)
#   pytest -m sglang, then the servers end, whatever happened
#
# Arguments go to pytest. The first run takes minutes, because it installs SGLang.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
python=$root/.venv/bin/python
ready_within_s=${SWARM_SGLANG_READY_S:-400}

"$here/setup.sh"
work=$(mktemp -d)
servers=()
finish() {
    for server in "${servers[@]}"; do
        kill -TERM "$server" 2>/dev/null || true
    done
    for server in "${servers[@]}"; do
        for _ in {1..50}; do
            kill -0 "$server" 2>/dev/null || break
            sleep 0.1
        done
        # It leads a process group of its own; this ends workers that it left behind.
        kill -KILL -- "-$server" 2>/dev/null || true
    done
    rm -rf "$work"
}
trap finish EXIT

# serve CHECKPOINT NAME: start a server; its address and its process id are url and server then.
# float32, so that no rounding sends a token to another expert than in our model.
serve() {
    local port
    port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    url=http://127.0.0.1:$port
    SGLANG_PLATFORM=swarm_cpu SGLANG_USE_CPU_ENGINE=0 HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 \
        HF_HOME=$work/hf-$2 \
        setsid "$root/.venv-sglang/bin/python" -m sglang.launch_server \
        --model-path "$1" --trust-remote-code --dtype float32 \
        --host 127.0.0.1 --port "$port" \
        --device cpu --attention-backend torch_native --sampling-backend pytorch \
        --cuda-graph-backend-decode disabled --cuda-graph-backend-prefill disabled \
        --disable-overlap-schedule --sleep-on-idle \
        --max-total-tokens 32768 --mem-fraction-static 0.2 \
        --enable-return-routed-experts --tool-call-parser kimi_k2 --reasoning-parser kimi_k2 \
        >"$work/$2.log" 2>&1 &
    server=$!
    servers+=("$server")
    disown "$server" # no message of the shell when it ends
}

# await NAME URL PID: until the server has generated a token, so no test waits for the first one.
await() {
    for ((second = 0; ; second++)); do
        if ! kill -0 "$3" 2>/dev/null || ((second >= ready_within_s)); then
            echo "SGLang ($1) did not start; the end of its log:" >&2
            tail -n 40 "$work/$1.log" | cut -c1-300 >&2
            exit 1
        fi
        if "$python" - "$2/health_generate" 2>/dev/null <<'PYTHON'; then break; fi
import sys, urllib.request
urllib.request.urlopen(sys.argv[1], timeout=120)
PYTHON
        sleep 1
    done
}

"$python" "$here/write_checkpoint.py" "$work/random"
"$python" "$here/write_checkpoint.py" --nano "$work/nano"
serve "$work/random" random && random_url=$url random_pid=$server
serve "$work/nano" nano && nano_url=$url nano_pid=$server
serve "$work/nano" second && second_url=$url second_pid=$server
echo "waiting for SGLang at $random_url, $nano_url and $second_url"
await random "$random_url" "$random_pid"
await nano "$nano_url" "$nano_pid"
await second "$second_url" "$second_pid"
echo "ready"

status=0
(cd "$root" && SWARM_SGLANG_URL=$random_url SWARM_SGLANG_CHECKPOINT=$work/random \
    SWARM_SGLANG_NANO_URL=$nano_url SWARM_SGLANG_SECOND_URL=$second_url \
    SWARM_SGLANG_SECOND_PID=$second_pid \
    "$python" -m pytest -m sglang tests/model_backend/sglang "$@") || status=$?
if ((status != 0)); then
    for log in "$work"/*.log; do
        echo "the end of ${log##*/}:" >&2
        tail -n 20 "$log" | cut -c1-300 >&2
    done
fi
exit "$status"
