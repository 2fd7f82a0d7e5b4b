"""Triton's interpreter, for test files that run as programs: Triton asks for it when it is loaded.

python test_KERNELS.py      the file mends the interpreter, then compares on the CPU
"""

import os
import subprocess
import sys


def run_interpreted(file: str) -> None:
    """Run a test file in a process of its own; raise with what it said unless it is content."""
    done = subprocess.run(
        [sys.executable, file],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def mend_interpreter() -> None:
    """numpy 2.4 makes no int of an array of one number, which Triton 3.6's interpreter asks for."""
    from triton.runtime import interpreter

    scope = interpreter._LangPatchScope
    set_attr = scope.set_attr

    def set_mended(self, owner, name, value):
        if name == "__index__":
            value = lambda tensor: int(tensor.handle.data.item())  # noqa: E731
        set_attr(self, owner, name, value)

    scope.set_attr = set_mended
