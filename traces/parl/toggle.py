"""Toggle: phases with and without a token budget (K2.5 report, section 4.4.3).

    phase(t) = floor(t / m) mod 2
    0   reward counts if  mean_k r(x, y_k) < threshold  or  |y| <= budget(x)
    1   reward counts as it is, up to the tokens that sampling allows

r is the outcome: the helpers of PARL's reward neither make a response correct nor a question easy.

budget(x) is a percentile of the lengths of the correct responses among the K of question x,
estimated once, at its first appearance, and fixed from then on. A question without a correct
response has no budget (the report is silent on it). m, threshold and percentile are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from swarm_sdk.errors import ConfigError


@dataclass(slots=True, kw_only=True)
class Toggle:
    """The budgets found so far; its state belongs into the checkpoint."""

    period: int = 10
    """Iterations of one phase (m)."""
    threshold: float = 0.8
    """Mean reward below which the budget is not asked for (lambda)."""
    percentile: float = 75.0
    """Of the correct responses' lengths (rho), 0 to 100."""
    min_correct: float = 1.0
    """Outcome from which a response is correct."""
    budgets: dict[str, int] = field(default_factory=dict)
    """Question -> tokens."""

    def __post_init__(self) -> None:
        if self.period < 1 or not 0 <= self.percentile <= 100:
            raise ConfigError(
                "Toggle needs a period of at least 1 and a percentile from 0 to 100, got "
                f"{self.period} and {self.percentile}"
            )

    def is_limited(self, iteration: int) -> bool:
        """Whether ``iteration`` belongs to the phase with budgets."""
        return iteration // self.period % 2 == 0

    def rewards(
        self,
        question: str,
        iteration: int,
        rewards: Sequence[float],
        lengths: Sequence[int],
        outcomes: Sequence[float] | None = None,
    ) -> list[float]:
        """The rewards of a question's K responses as the phase counts them.

        ``outcomes`` says what they got for their answers alone, where ``rewards`` hold more.
        """
        outcomes = rewards if outcomes is None else outcomes
        if question not in self.budgets:
            right = [n for r, n in zip(outcomes, lengths, strict=True) if r >= self.min_correct]
            if right:
                self.budgets[question] = int(np.percentile(right, self.percentile))
        budget = self.budgets.get(question)
        is_hard = float(np.mean(outcomes)) < self.threshold
        if not self.is_limited(iteration) or budget is None or is_hard:
            return list(rewards)
        return [r if n <= budget else 0.0 for r, n in zip(rewards, lengths, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"budgets": dict(self.budgets)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the budgets of a checkpoint."""
        self.budgets = {str(name): int(tokens) for name, tokens in state["budgets"].items()}
