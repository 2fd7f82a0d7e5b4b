"""A process that answers as SGLang's servers and its router do, and fails as it is told.

    python stand_in.py -m sglang.launch_server --port N …

STAND_IN is JSON: what goes wrong, by the port: {"30001": "dies once"}. MARKS is a folder where each
start leaves a file PORT.PID, and each child PORT.child.PID.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PROBE = "find_spec"
GENERATES = "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION"
"""Unless it is false, /health generates a token; a paused server cannot, and answers 503."""


def main() -> None:
    if sys.argv[1] == "-c":  # what is installed
        assert PROBE in sys.argv[2]
        print(os.environ.get("INSTALLED", "[true, true]"))
        return
    is_router = sys.argv[2] == "sglang_router.launch_router"
    port = sys.argv[sys.argv.index("--port") + 1]
    marks = Path(os.environ["MARKS"])
    (marks / f"{port}.{os.getpid()}").write_text(json.dumps(sys.argv))
    starts = len(list(marks.glob(f"{port}.[0-9]*")))
    fault = json.loads(os.environ.get("STAND_IN", "{}")).get(port, "")
    print(f"Load weight begin, start {starts}", flush=True)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    (marks / f"{port}.child.{child.pid}").touch()
    if fault == "never starts":
        sys.exit("CUDA out of memory")
    if fault == "ignores SIGTERM":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    is_silent = threading.Event()
    # SGLang's router says in /health that it runs, in /readiness that it has a server.
    told_well = {"/health", "/readiness"} if is_router else {"/health", "/health_generate"}
    if fault == "knows no server":
        told_well.remove("/readiness")

    class Health(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            ok = not is_silent.is_set() and self.path in told_well
            self.send_response(200 if ok else 503)
            self.send_header("Content-Length", "0")
            self.end_headers()
            if fault == "dies" and self.path == "/health":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "is paused" and os.environ.get(GENERATES) != "false":
                is_silent.set()
            if fault == "dies once" and starts == 1 and self.path == "/health":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "falls silent once" and starts == 1:
                is_silent.set()

        def log_message(self, *_: object) -> None:
            pass

    time.sleep(0.5)
    ThreadingHTTPServer(("127.0.0.1", int(port)), Health).serve_forever()


main()
