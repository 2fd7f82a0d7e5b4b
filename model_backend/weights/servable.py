"""A checkpoint folder that a server loads as it is: weights, tokenizer, chat template, processor.

    config.json, generation_config.json, *.safetensors   checkpoint.py: bf16 or INT4
    tiktoken.model                                        our tokenizer, and K2.5's own file
    tokenizer.json, tokenizer_config.json                 the same for servers, with the template
    processor_config.json, processing_kimi_k25.py         what turns pictures into patches

SGLang runs ``processing_kimi_k25.py`` from the folder (``--trust-remote-code``).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from swarm_sdk.errors import ConfigError
from swarm_sdk.model_backend.chat.tokenizer import Tokenizer
from swarm_sdk.model_backend.chat.train_tokenizer import export_tokenizer_json

if TYPE_CHECKING:
    import torch

    from swarm_sdk.model_backend.model.kimi import KimiModel

PROCESSOR: Path = Path(__file__).with_name("processing_kimi_k25.py")
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
"""Either of them tells ``transformers`` which processor to load; the release has the second."""
TOKENIZER_CONFIG = "tokenizer_config.json"


def save_checkpoint(
    model: KimiModel,
    tokenizer: Tokenizer,
    folder: str | Path,
    dtype: torch.dtype | None = None,
    *,
    is_int4: bool = False,
) -> None:
    """Write all that a server needs into ``folder``; ``dtype`` and ``is_int4`` as ``save``.

    Raises:
        ConfigError: weights and tokenizer do not fit together; INT4 is asked for and does not fit;
            the ``tokenizers`` package is missing.
    """
    from swarm_sdk.model_backend.weights.checkpoint import save

    vocab_size = model.config.text_config.vocab_size
    if tokenizer.num_tokens != vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.num_tokens} tokens and the weights have {vocab_size}; "
            "give the tokenizer that the model was trained with"
        )
    save(model, folder, dtype, is_int4=is_int4)
    tokenizer.save(folder)
    _write_server_tokenizer(tokenizer, Path(folder))
    write_processor(Path(folder))


def servable(folder: Path, work: Path) -> Path:
    """Return a folder that a server can load: ``folder``, or ``work`` with links to its files.

    ``work`` is made, and what ``folder`` lacks (processor, server's tokenizer) is written there,
    before any link; nothing is written into ``folder``, which may be read-only.

    Raises:
        ConfigError: ``folder`` has no tokenizer, or the ``tokenizers`` package is missing.
        FileExistsError: ``work`` is there already.
    """
    has_tokenizer = (folder / TOKENIZER_CONFIG).is_file()
    has_processor = any((folder / name).is_file() for name in PROCESSOR_FILES)
    if has_tokenizer and has_processor:
        return folder
    work.mkdir(parents=True)
    if not has_tokenizer:
        _write_server_tokenizer(Tokenizer.from_dir(folder), work)
    if not has_processor:
        write_processor(work)
    for file in folder.iterdir():
        if file.is_file() and not (work / file.name).exists():
            (work / file.name).symlink_to(file.resolve())
    return work


def _write_server_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    try:
        export_tokenizer_json(tokenizer, folder)
    except ImportError as error:
        raise ConfigError(
            "writing a server's tokenizer needs the package tokenizers; "
            "install it with: pip install 'swarm-sdk[train]'"
        ) from error


def write_processor(folder: Path) -> None:
    """Write the processor that SGLang loads, and the file that names it."""
    shutil.copyfile(PROCESSOR, folder / PROCESSOR.name)
    processor = {
        "processor_class": "KimiK25Processor",
        "auto_map": {"AutoProcessor": f"{PROCESSOR.stem}.KimiK25Processor"},
    }
    (folder / PROCESSOR_FILES[0]).write_text(json.dumps(processor, indent=2) + "\n", "utf-8")
