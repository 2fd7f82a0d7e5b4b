"""Run, record and train agent swarms.

>>> from swarm_sdk import Swarm
>>> Swarm("nano")  # doctest: +ELLIPSIS
<swarm_sdk.swarm.Swarm object at ...>

Names load on first use, so that importing the package costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swarm_sdk.config import Role as Role
    from swarm_sdk.errors import BudgetExceeded as BudgetExceeded
    from swarm_sdk.errors import ConfigError as ConfigError
    from swarm_sdk.errors import ModelError as ModelError
    from swarm_sdk.errors import SwarmError as SwarmError
    from swarm_sdk.errors import ToolError as ToolError
    from swarm_sdk.runtime.budget import Budget as Budget
    from swarm_sdk.runtime.episode import Result as Result
    from swarm_sdk.swarm import Swarm as Swarm
    from swarm_sdk.tools.corpus import Corpus as Corpus
    from swarm_sdk.tools.function import tool as tool
    from swarm_sdk.tools.ipython import IPythonTool as IPythonTool
    from swarm_sdk.tools.search import OpenTool as OpenTool
    from swarm_sdk.tools.search import SearchTool as SearchTool
    from swarm_sdk.types import Image as Image
    from swarm_sdk.types import Message as Message
    from swarm_sdk.types import Sampling as Sampling
    from swarm_sdk.types import Task as Task
    from swarm_sdk.types import Usage as Usage

_HOME = {
    "Budget": "runtime.budget",
    "BudgetExceeded": "errors",
    "ConfigError": "errors",
    "Corpus": "tools.corpus",
    "IPythonTool": "tools.ipython",
    "Image": "types",
    "Message": "types",
    "ModelError": "errors",
    "OpenTool": "tools.search",
    "Result": "runtime.episode",
    "Role": "config",
    "Sampling": "types",
    "SearchTool": "tools.search",
    "Swarm": "swarm",
    "SwarmError": "errors",
    "Task": "types",
    "ToolError": "errors",
    "Usage": "types",
    "tool": "tools.function",
}
__all__ = [
    "Budget",
    "BudgetExceeded",
    "ConfigError",
    "Corpus",
    "IPythonTool",
    "Image",
    "Message",
    "ModelError",
    "OpenTool",
    "Result",
    "Role",
    "Sampling",
    "SearchTool",
    "Swarm",
    "SwarmError",
    "Task",
    "ToolError",
    "Usage",
    "tool",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Load a public name on first use (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'swarm_sdk' has no attribute '{name}'")
    value = getattr(import_module(f"swarm_sdk.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names."""
    return sorted([*_HOME, "__version__"])
