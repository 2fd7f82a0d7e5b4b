"""SGLang's Kimi K2.5 that can start with `--load-format dummy`, to be given its weights later.

SGLang 0.5.11 derives the absorbed attention's matrices after a checkpoint was read; for dummies it
asks the model to, and the class around the language model does not pass that on.
"""

from __future__ import annotations

from sglang.srt.models import kimi_k25


class KimiK25ForConditionalGeneration(kimi_k25.KimiK25ForConditionalGeneration):
    """Of the same name, so that it is taken instead."""

    def post_load_weights(self) -> None:
        """Called by SGLang's loader of dummies."""
        self.language_model.post_load_weights()


EntryClass = [KimiK25ForConditionalGeneration]
