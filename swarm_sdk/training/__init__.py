"""Training from recorded episodes: ``swarm train …``, ``python -m swarm_sdk.training …``.

    tokenizer   episodes by the book -> their text -> byte-pair ranks
    sft         workers run episodes by the book ──rows──> pool ──batches──> AdamW -> checkpoint
    parl        questions -> K episodes each -> rewards -> eq. (1) -> MuonClip -> the engine
    --from      the same from the records of earlier runs
    report      the curves of a run as one HTML page and a PNG

The only package that joins the runtime's rollouts to the trainer.
"""

from __future__ import annotations

from swarm_sdk.training.commands import app

__all__ = ["app"]
