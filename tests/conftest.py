"""Fixtures that every test folder shares."""

import os
from pathlib import Path

import pytest

# Triton's kernels run on a CPU by its interpreter, if this is set before Triton is imported.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
