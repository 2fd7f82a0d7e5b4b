"""Importing the package is cheap: heavy libraries load when they are used."""

import subprocess
import sys
import time

HEAVY = ("torch", "jupyter_client", "sglang", "transformers", "networkx", "aiohttp")


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = f"import sys, swarm_sdk; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_importing_the_package_takes_at_most_300_ms_more_than_python_itself() -> None:
    def seconds(code: str) -> float:
        times = []
        for _ in range(5):
            started = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            times.append(time.perf_counter() - started)
        return min(times)

    assert seconds("import swarm_sdk") - seconds("pass") <= 0.3


def test_the_runtime_and_the_trace_readers_run_without_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import swarm_sdk.runtime.episode, swarm_sdk.traces.trajectory, swarm_sdk.trace_view\n"
        "import swarm_sdk.tools.function, swarm_sdk.tools.search"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
