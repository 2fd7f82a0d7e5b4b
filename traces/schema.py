"""Every span name and attribute key, with its unit: the only place where they are spelled.

Operation names follow OpenTelemetry's generative-AI conventions; what those have no word for
(episodes as stages, the reference to the ledger) is prefixed ``swarm.``.
"""

from typing import Final

TRACER_NAME: Final = "swarm_sdk"

OPERATION: Final = "gen_ai.operation.name"
INVOKE_WORKFLOW: Final = "invoke_workflow"
"""One episode."""
INVOKE_AGENT: Final = "invoke_agent"
"""One agent of an episode, the orchestrator included."""
CHAT: Final = "chat"
"""One model call."""
EXECUTE_TOOL: Final = "execute_tool"
"""One tool call."""

AGENT_NAME: Final = "gen_ai.agent.name"
REQUEST_MODEL: Final = "gen_ai.request.model"
INPUT_TOKENS: Final = "gen_ai.usage.input_tokens"
OUTPUT_TOKENS: Final = "gen_ai.usage.output_tokens"
FINISH_REASONS: Final = "gen_ai.response.finish_reasons"
TOOL_NAME: Final = "gen_ai.tool.name"
TOOL_CALL_ID: Final = "gen_ai.tool.call.id"
ERROR_TYPE: Final = "error.type"

EPISODE_ID: Final = "swarm.episode.id"
AGENT_PATH: Final = "swarm.agent.path"
STAGE_INDEX: Final = "swarm.stage.index"
"""Which turn of its agent this is, from 0."""
LEDGER_STEP_ID: Final = "swarm.ledger.step_id"
"""Row of the ledger that holds the tokens and texts of this span; spans never carry them."""
AGENT_STATUS: Final = "swarm.agent.status"
CRITICAL_STEPS: Final = "swarm.critical_steps"
TOTAL_STEPS: Final = "swarm.total_steps"

SANDBOX_LEVEL: Final = "swarm.sandbox.level"
"""How far the code was kept from the machine: ``L3`` … ``L0``."""
SANDBOX_STATUS: Final = "swarm.sandbox.status"
"""Why the cell ended."""
SANDBOX_HAS_STATE: Final = "swarm.sandbox.has_state"
"""Whether the session's variables are there for the next cell."""
