"""Trains a tokenizer of any size, and exports one for ``transformers`` and SGLang.

    texts -> byte-pair merges (the ``tokenizers`` package) -> ranks -> Tokenizer
    Tokenizer -> tokenizer.json + tokenizer_config.json (export_tokenizer_json)

Training cuts finer than the split regex of the ``Tokenizer``, which stays K2.5's: digits one by
one, and the space or sign before a word cut off. So no token holds two digits, and a word has the
same tokens after a space, a quote or a bar: a small model copies names by their tokens, and with
glued spaces only 0.2 % of the names of its pages had the same tokens where it had to write them.

Ranks and merges say the same in two ways: tiktoken joins the neighbours whose union has the lowest
rank, ``tokenizers`` the neighbours whose merge comes first. So the exported merges are, for each
token in rank order, all the ways to make it of two others.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swarm_sdk.errors import ConfigError
from swarm_sdk.model_backend.chat.jinja import CHAT_TEMPLATE
from swarm_sdk.model_backend.chat.tokenizer import SPECIAL_NAMES, Tokenizer, split_pattern

if TYPE_CHECKING:
    from collections.abc import Iterable

# Written by the model inside its turn, and needed as text by the parsers of servers; the other
# special tokens are markup that ``skip_special_tokens`` removes.
_TEXTUAL_SLOTS = frozenset({11, 12, 13, 14, 15, 22, 23})


def train(texts: Iterable[str], num_base_tokens: int) -> Tokenizer:
    """Learn ``num_base_tokens`` byte pairs (the 256 bytes included) from ``texts``.

    The same texts give the same tokenizer.

    Raises:
        ConfigError: ``num_base_tokens`` is below 256, or the texts hold too few pairs for it.
    """
    if num_base_tokens < 256:
        raise ConfigError(f"a tokenizer needs at least 256 base tokens, got {num_base_tokens}")
    learned = _train_byte_pairs(texts, num_base_tokens).get_vocab()
    if len(learned) < num_base_tokens:
        raise ConfigError(
            f"the texts hold only {len(learned)} byte pairs, {num_base_tokens} were asked for; "
            "give more text or ask for fewer"
        )
    bytes_of = {letter: byte for byte, letter in enumerate(_byte_letters())}
    return Tokenizer(
        {bytes(bytes_of[letter] for letter in token): rank for token, rank in learned.items()}
    )


def export_tokenizer_json(tokenizer: Tokenizer, directory: str | Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` (with the chat template).

    ``AutoTokenizer`` and SGLang load the folder and give the ids of ``tokenizer`` for plain text.
    Unlike ours, they read the names of special tokens in a text as those tokens.

    The template writes tools from ``tools_ts_str`` (``typescript.declare_tools``) where the caller
    passes it, as K2.5's does, and as JSON otherwise.
    """
    Path(directory).mkdir(parents=True, exist_ok=True)
    special = tokenizer.special
    names = tokenizer.special_names
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": names[special.bos],
        "eos_token": names[special.eos],
        "unk_token": names[special.unk],
        "pad_token": names[special.pad],
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "chat_template": CHAT_TEMPLATE,
    }
    _to_byte_pairs(tokenizer).save(str(Path(directory) / "tokenizer.json"))
    (Path(directory) / "tokenizer_config.json").write_text(
        json.dumps(config, ensure_ascii=False, indent=2) + "\n", encoding="utf-8"
    )


def _train_byte_pairs(texts: Iterable[str], num_base_tokens: int) -> Any:
    from tokenizers import Regex, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as BytePairs

    byte_pairs = BytePairs(models.BPE())
    byte_pairs.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[^\p{L}\p{M}\p{N}](?=\p{L})"), behavior="isolated"),
            _pre_tokenizer(max_digits=1),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=num_base_tokens,
        min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[],
        show_progress=False,
    )
    byte_pairs.train_from_iterator(texts, trainer)
    return byte_pairs


def _to_byte_pairs(tokenizer: Tokenizer) -> Any:
    """Build the same tokenizer as an object of the ``tokenizers`` package."""
    from tokenizers import AddedToken, decoders, models
    from tokenizers import Tokenizer as BytePairs

    letters = _byte_letters()
    spelled = {token: "".join(letters[byte] for byte in token) for token in tokenizer.ranks}
    byte_pairs = BytePairs(
        models.BPE(
            vocab={spelled[token]: rank for token, rank in tokenizer.ranks.items()},
            merges=[(spelled[left], spelled[right]) for left, right in _merges(tokenizer)],
            ignore_merges=True,  # a piece that is a token is one token, as in tiktoken
        )
    )
    byte_pairs.pre_tokenizer = _pre_tokenizer(max_digits=3)
    byte_pairs.decoder = decoders.ByteLevel()
    for slot, name in enumerate(tokenizer.special_names.values()):
        token = AddedToken(name, special=slot not in _TEXTUAL_SLOTS, normalized=False)
        byte_pairs.add_tokens([token])
    assert byte_pairs.get_vocab_size() == tokenizer.num_tokens
    assert byte_pairs.token_to_id(SPECIAL_NAMES[2]) == tokenizer.special.im_end
    return byte_pairs


def _merges(tokenizer: Tokenizer) -> list[tuple[bytes, bytes]]:
    ranks = tokenizer.ranks
    merges: list[tuple[bytes, bytes]] = []
    for token in ranks:
        splits = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        merges += sorted(
            (split for split in splits if split[0] in ranks and split[1] in ranks),
            key=lambda split: (ranks[split[0]], ranks[split[1]]),
        )
    return merges


def _pre_tokenizer(max_digits: int) -> Any:
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split_pattern(max_digits)), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _byte_letters() -> list[str]:
    """Return the letter that stands for each byte in ``tokenizer.json``.

    Printable Latin-1 bytes stand for themselves; the other 68, in order, for U+0100 and on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
