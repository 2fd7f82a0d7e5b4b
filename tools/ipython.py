"""``ipython``: an agent's own Python session.

The session starts with the agent's first cell, holds the task's files in its working directory and
its pictures as ``images[i]``, and ends with the agent. What a cell shows comes back as pictures
that the model sees; ``shown[i]`` opens one of them again.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from swarm_sdk.errors import ConfigError, SandboxDied
from swarm_sdk.tools.function import FunctionTool
from swarm_sdk.tools.sandbox.kernel import KernelSandbox
from swarm_sdk.tools.sandbox.protocol import CellResult, StartSandbox
from swarm_sdk.traces import schema
from swarm_sdk.types import RunContext, ToolOutput


class IPythonTool(FunctionTool):
    """``ipython(code)``: variables persist from call to call.

    What the cell raised is an ordinary result that the model reads.

    Args:
        start: starts a sandbox with the task's files: an isolated kernel of its own unless given;
            the ``lease`` of a ``KernelPool`` for kernels that stand ready.
        timeout_s: time limit of one cell.

    Raises:
        ConfigError: ``timeout_s`` is not positive.
    """

    def __init__(self, start: StartSandbox = KernelSandbox, *, timeout_s: float = 30.0) -> None:
        if timeout_s <= 0:
            raise ConfigError(f"timeout_s must be positive, got {timeout_s:g}")

        async def ipython(context: RunContext[Any], code: str) -> ToolOutput:
            sandbox = await context.resources.get("ipython", partial(start, context.files))
            result = await sandbox.run(code, timeout_s=timeout_s)
            facts = _facts(result)
            if not result.has_state:
                died = SandboxDied(result.text)
                died.facts = facts
                raise died
            return ToolOutput(result.text or "(no output)", result.images, facts)

        super().__init__(
            ipython,
            description="Run Python code; variables persist. Prints and the last value come back.",
        )


def _facts(result: CellResult) -> tuple[tuple[str, str | int | float | bool], ...]:
    level = ((schema.SANDBOX_LEVEL, result.isolation),) if result.isolation else ()
    return (
        *level,
        (schema.SANDBOX_STATUS, result.status),
        (schema.SANDBOX_HAS_STATE, result.has_state),
    )
