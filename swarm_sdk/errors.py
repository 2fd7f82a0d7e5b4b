"""Everything this package raises on purpose.

SwarmError
├── ConfigError            a setting or an input is wrong; raised before any work starts
├── ModelError             a model call failed                .status, .retryable
│   └── ContextOverflow    the prompt does not fit            .num_prompt_tokens, .limit_tokens
├── ToolError              a tool failed; its text goes back to the model
│   └── SandboxDied        the sandbox is gone; a new one starts with the next call
├── BudgetExceeded         a limit of the budget is reached   .limit, .used, .allowed
├── LedgerError            the record cannot be read or written
│   ├── EpisodeBusy        another process runs the episode   .episode_id
│   └── NotTrainable       an episode that cannot train       .reason
├── ServeFailed            a server does not come up, or dies again and again
└── SubagentError          a sub-agent ended without a report (fail_fast)   .agent_path
"""

from __future__ import annotations


class SwarmError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(SwarmError):
    """Raised before any work starts if a setting or an input is wrong; says what to do."""


class ModelError(SwarmError):
    """Raised if a model call failed."""

    def __init__(self, message: str, *, status: int | None = None, retryable: bool = False) -> None:
        super().__init__(message)
        self.status = status
        """HTTP status, where there was one."""
        self.retryable = retryable
        """Whether the same request can succeed later."""


class ContextOverflow(ModelError):
    """Raised if a prompt does not fit the model's context window."""

    def __init__(self, *, num_prompt_tokens: int, limit_tokens: int) -> None:
        super().__init__(
            f"the prompt has {num_prompt_tokens} tokens and the model's context holds "
            f"{limit_tokens}; shorten the task or use a model with a longer context",
            status=400,
        )
        self.num_prompt_tokens = num_prompt_tokens
        self.limit_tokens = limit_tokens


class ToolError(SwarmError):
    """Raised by a tool to tell the model what went wrong."""

    facts: tuple[tuple[str, str | int | float | bool], ...] = ()
    """As ``ToolOutput.facts``."""


class SandboxDied(ToolError):
    """Raised if the process behind a sandbox is gone; its variables are lost."""


class BudgetExceeded(SwarmError):
    """Raised if an action would go over a limit of the budget."""

    def __init__(self, limit: str, *, used: float, allowed: float) -> None:
        super().__init__(f"the budget of {allowed:g} {limit} is used up ({used:g} used)")
        self.limit = limit
        self.used = used
        self.allowed = allowed


class LedgerError(SwarmError):
    """Raised if the record of a run cannot be read or written."""


class EpisodeBusy(LedgerError):
    """Raised if an episode is to be resumed that a living process still runs."""

    def __init__(self, episode_id: str) -> None:
        super().__init__(
            f"episode {episode_id} is being run by another process or task; wait for it or end it"
        )
        self.episode_id = episode_id


class NotTrainable(LedgerError):
    """Raised if a recorded episode cannot train."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        """In one word, to be counted: ``no_token_ids``, ``no_logprobs`` …"""


class ServeFailed(SwarmError):
    """Raised if a server that is to be kept running does not come up, or dies too often."""


class SubagentError(SwarmError):
    """Raised with ``fail_fast`` if a sub-agent ended without a final message.

    Hooks around ``assign_task`` see it; the episode ends with status ``failed`` and its text.
    """

    def __init__(self, agent_path: str, message: str) -> None:
        super().__init__(message)
        self.agent_path = agent_path
