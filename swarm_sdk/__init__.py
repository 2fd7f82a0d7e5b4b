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
    from swarm_sdk.errors import LedgerError as LedgerError
    from swarm_sdk.errors import ModelError as ModelError
    from swarm_sdk.errors import SubagentError as SubagentError
    from swarm_sdk.errors import SwarmError as SwarmError
    from swarm_sdk.errors import ToolError as ToolError
    from swarm_sdk.runtime.budget import Budget as Budget
    from swarm_sdk.runtime.context import Compact as Compact
    from swarm_sdk.runtime.context import DiscardAll as DiscardAll
    from swarm_sdk.runtime.context import HideToolResults as HideToolResults
    from swarm_sdk.runtime.environment import Environment as Environment
    from swarm_sdk.runtime.environment import EnvTask as EnvTask
    from swarm_sdk.runtime.environment import Rollout as Rollout
    from swarm_sdk.runtime.environment import environment as environment
    from swarm_sdk.runtime.environment import register_environment as register_environment
    from swarm_sdk.runtime.episode import Result as Result
    from swarm_sdk.runtime.events import Event as Event
    from swarm_sdk.runtime.hooks import Hooks as Hooks
    from swarm_sdk.runtime.rollouts import RolloutManager as RolloutManager
    from swarm_sdk.runtime.state import AgentOutcome as AgentOutcome
    from swarm_sdk.runtime.state import Limits as Limits
    from swarm_sdk.swarm import Swarm as Swarm
    from swarm_sdk.tools.corpus import Corpus as Corpus
    from swarm_sdk.tools.function import tool as tool
    from swarm_sdk.tools.ipython import IPythonTool as IPythonTool
    from swarm_sdk.tools.search import OpenTool as OpenTool
    from swarm_sdk.tools.search import SearchTool as SearchTool
    from swarm_sdk.types import Image as Image
    from swarm_sdk.types import Message as Message
    from swarm_sdk.types import Price as Price
    from swarm_sdk.types import RunContext as RunContext
    from swarm_sdk.types import Sampling as Sampling
    from swarm_sdk.types import Task as Task
    from swarm_sdk.types import ToolOutput as ToolOutput
    from swarm_sdk.types import Usage as Usage

_HOME = {
    "AgentOutcome": "runtime.state",
    "Budget": "runtime.budget",
    "BudgetExceeded": "errors",
    "Compact": "runtime.context",
    "ConfigError": "errors",
    "Corpus": "tools.corpus",
    "DiscardAll": "runtime.context",
    "EnvTask": "runtime.environment",
    "Environment": "runtime.environment",
    "Event": "runtime.events",
    "HideToolResults": "runtime.context",
    "Hooks": "runtime.hooks",
    "IPythonTool": "tools.ipython",
    "Image": "types",
    "LedgerError": "errors",
    "Limits": "runtime.state",
    "Message": "types",
    "ModelError": "errors",
    "OpenTool": "tools.search",
    "Price": "types",
    "Result": "runtime.episode",
    "Role": "config",
    "Rollout": "runtime.environment",
    "RolloutManager": "runtime.rollouts",
    "RunContext": "types",
    "Sampling": "types",
    "SearchTool": "tools.search",
    "SubagentError": "errors",
    "Swarm": "swarm",
    "SwarmError": "errors",
    "Task": "types",
    "ToolError": "errors",
    "ToolOutput": "types",
    "Usage": "types",
    "environment": "runtime.environment",
    "register_environment": "runtime.environment",
    "tool": "tools.function",
}
__all__ = [
    "AgentOutcome",
    "Budget",
    "BudgetExceeded",
    "Compact",
    "ConfigError",
    "Corpus",
    "DiscardAll",
    "EnvTask",
    "Environment",
    "Event",
    "HideToolResults",
    "Hooks",
    "IPythonTool",
    "Image",
    "LedgerError",
    "Limits",
    "Message",
    "ModelError",
    "OpenTool",
    "Price",
    "Result",
    "Role",
    "Rollout",
    "RolloutManager",
    "RunContext",
    "Sampling",
    "SearchTool",
    "SubagentError",
    "Swarm",
    "SwarmError",
    "Task",
    "ToolError",
    "ToolOutput",
    "Usage",
    "environment",
    "register_environment",
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
