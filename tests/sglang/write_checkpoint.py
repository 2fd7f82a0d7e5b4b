"""Write the checkpoints that the SGLang tests serve: ``nano``'s shape with random weights, bf16.

    python tests/sglang/write_checkpoint.py FOLDER
    python tests/sglang/write_checkpoint.py --nano FOLDER    nano itself

Random weights are the harder case: every expert and head matters. They are scaled so that the
log-probabilities of tokens differ widely, which those of the initialiser do not. Beside the weights
lie the tokenizer, as ``transformers`` and SGLang read it, and the processor that SGLang asks for.
"""

import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from swarm_sdk.config import nano_directory
from swarm_sdk.model_backend.chat.tokenizer import NUM_SPECIAL_SLOTS
from swarm_sdk.model_backend.chat.train_tokenizer import export_tokenizer_json, train
from swarm_sdk.model_backend.model.config import nano
from swarm_sdk.model_backend.model.kimi import KimiModel
from swarm_sdk.model_backend.weights import checkpoint
from swarm_sdk.model_backend.weights.servable import write_processor


def random_model() -> KimiModel:
    """``nano``'s shape; each matrix keeps the size of what passes through it."""
    model = KimiModel(nano())
    model.init_weights(seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "pos_emb" not in name:
                fan_in = 1 if "embed_tokens" in name else parameter[0].numel()
                if "experts" in name and parameter.ndim == 3:
                    fan_in = parameter.shape[-1]
                parameter.normal_(0.0, fan_in**-0.5, generator=generator)
        # A random model may sample the media placeholder. SGLang then reads the placeholder's row
        # of the embedding, our model reads row 0; a trained model never comes to that.
        rows = model.embed_tokens.weight
        rows[model.config.media_placeholder_token_id] = rows[0]
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.01, generator=generator)
    return model.eval()


def texts() -> Iterator[str]:
    """Words of random syllables: enough byte pairs for a vocabulary."""
    draw = random.Random(0)
    syllables = [a + b + c for a in "bdfgklmnprstvz" for b in "aeiou" for c in ("", "n", "r", "s")]
    for _ in range(4000):
        yield " ".join("".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(12))


def write_random(folder: Path) -> None:
    """Random weights, and a tokenizer of their own."""
    model = random_model()
    checkpoint.save(model, folder, dtype=torch.bfloat16)
    tokenizer = train(texts(), model.config.text_config.vocab_size - NUM_SPECIAL_SLOTS)
    tokenizer.save(folder)
    export_tokenizer_json(tokenizer, folder)


def main(folder: Path, *, is_nano: bool) -> None:
    """Write everything into ``folder``."""
    if is_nano:
        shutil.copytree(nano_directory(), folder)
    else:
        write_random(folder)
    write_processor(folder)


if __name__ == "__main__":
    main(Path(sys.argv[-1]), is_nano="--nano" in sys.argv)
