"""The K2.5 tokenizer: byte-pair ranks from ``tiktoken.model`` and 256 special slots behind them.

    ids 0 … num_base - 1                    the byte pairs, in rank order
    ids num_base … num_base + 255           special slots, in K2.5's order

    K2.5's own file has num_base = 163,584 (so <|im_end|> is 163,586); the embedded model's has
    3,840. The slot of a special token is the same in both.

Text is untrusted: ``encode`` never yields a special id, whatever the text spells. Special ids
enter a prompt only as ids, through ``Tokenizer.special``.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tiktoken

from swarm_sdk.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

TOKENIZER_FILE = "tiktoken.model"
NUM_SPECIAL_SLOTS = 256

# Names by slot (K2.5 id - 163,584); the other slots are reserved.
SPECIAL_NAMES: Mapping[int, str] = {
    0: "[BOS]",
    1: "[EOS]",
    2: "<|im_end|>",
    3: "<|im_user|>",
    4: "<|im_assistant|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    9: "[EOT]",
    10: "<|im_system|>",
    11: "<|tool_calls_section_begin|>",
    12: "<|tool_calls_section_end|>",
    13: "<|tool_call_begin|>",
    14: "<|tool_call_argument_begin|>",
    15: "<|tool_call_end|>",
    17: "<|im_middle|>",
    18: "<|media_begin|>",
    19: "<|media_content|>",
    20: "<|media_end|>",
    21: "<|media_pad|>",
    22: "<think>",
    23: "</think>",
    254: "[UNK]",
    255: "[PAD]",
}

# K2.5 cuts its input before the split regex sees it: into slices of at most 400,000 characters,
# and within them runs of white space or of anything else after 25,000 characters.
_MAX_SLICE_CHARS = 400_000
_MAX_RUN_CHARS = 25_000


def split_pattern(max_digits: int = 3) -> str:
    """Return the regex that cuts text into the pieces within which byte pairs merge.

    Han runs stand alone; a word is a lower-case tail with an optional capital head (or the other
    way round), one leading sign or space, and an English contraction; digits come in groups of at
    most ``max_digits`` (3 in K2.5); then runs of signs, line ends, and spaces. The syntax is
    understood alike by tiktoken's engine and by Oniguruma (the ``tokenizers`` package).
    """
    head = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
    tail = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
    lead = r"[^\r\n\p{L}\p{N}]?"
    contraction = (
        "(?i:" + "|".join(f"'{end}" for end in ("s", "t", "re", "ve", "m", "ll", "d")) + ")?"
    )
    digits = r"\p{N}" if max_digits == 1 else rf"\p{{N}}{{1,{max_digits}}}"
    return "|".join(
        [
            r"[\p{Han}]+",
            f"{lead}{head}*{tail}+{contraction}",
            f"{lead}{head}+{tail}*{contraction}",
            digits,
            r" ?[^\s\p{L}\p{N}]+[\r\n]*",
            r"\s*[\r\n]+",
            r"\s+(?!\S)",
            r"\s+",
        ]
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecialIds:
    """The ids of the special tokens that have a name."""

    bos: int
    eos: int
    im_end: int
    im_user: int
    im_assistant: int
    start_header: int
    end_header: int
    eot: int
    im_system: int
    tool_calls_section_begin: int
    tool_calls_section_end: int
    tool_call_begin: int
    tool_call_argument_begin: int
    tool_call_end: int
    im_middle: int
    media_begin: int
    media_content: int
    media_end: int
    media_pad: int
    think_begin: int
    think_end: int
    unk: int
    pad: int

    @staticmethod
    def after(num_base_tokens: int) -> SpecialIds:
        """Return the ids for a vocabulary with ``num_base_tokens`` byte pairs."""
        fields = SpecialIds.__dataclass_fields__
        return SpecialIds(
            **{
                field: num_base_tokens + slot
                for field, slot in zip(fields, SPECIAL_NAMES, strict=True)
            }
        )


class Tokenizer:
    """Text to token ids and back, thin over ``tiktoken.Encoding``."""

    def __init__(self, ranks: Mapping[bytes, int]) -> None:
        """Build from byte-pair ranks; :meth:`from_dir` reads and checks a file.

        Raises:
            ConfigError: the ranks are not 0 … n - 1, or some of the 256 bytes have none.
        """
        _check_ranks(ranks)
        self.ranks: dict[bytes, int] = dict(sorted(ranks.items(), key=lambda item: item[1]))
        self.num_base_tokens: int = len(ranks)
        self.special: SpecialIds = SpecialIds.after(self.num_base_tokens)
        self.special_names: dict[int, str] = {
            token_id: SPECIAL_NAMES.get(slot, f"<|reserved_token_{token_id}|>")
            for slot, token_id in enumerate(range(self.num_base_tokens, self.num_tokens))
        }
        self._encoding = tiktoken.Encoding(
            "kimi-k2.5",
            pat_str=split_pattern(),
            mergeable_ranks=self.ranks,
            special_tokens={name: token_id for token_id, name in self.special_names.items()},
            explicit_n_vocab=self.num_tokens,
        )

    @staticmethod
    def from_dir(directory: str | Path) -> Tokenizer:
        """Read ``tiktoken.model`` of a checkpoint folder.

        Raises:
            ConfigError: the file is missing or is not a list of byte-pair ranks.
        """
        return Tokenizer(_read_ranks(Path(directory) / TOKENIZER_FILE))

    def save(self, directory: str | Path) -> None:
        """Write ``tiktoken.model`` into ``directory``, which is made if need be."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        (Path(directory) / TOKENIZER_FILE).write_bytes(self._file_bytes())

    @property
    def num_tokens(self) -> int:
        """Size of the vocabulary, special slots included."""
        return self.num_base_tokens + NUM_SPECIAL_SLOTS

    @property
    def sha256(self) -> str:
        """Hex digest of ``tiktoken.model`` as :meth:`save` writes it: the vocabulary's identity."""
        return hashlib.sha256(self._file_bytes()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Return the token ids of ``text``; names of special tokens in it are plain characters."""
        ids: list[int] = []
        for piece in _slices(text):
            ids += self._encoding.encode_ordinary(piece)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids``; special ids show as their names.

        Bytes that are no UTF-8 and ids outside the vocabulary show as U+FFFD.
        """
        raw = b"".join(
            self._encoding.decode_single_token_bytes(token_id)
            if 0 <= token_id < self.num_tokens
            else b"\xff"
            for token_id in ids
        )
        return raw.decode("utf-8", errors="replace")

    def _file_bytes(self) -> bytes:
        return b"".join(
            base64.b64encode(token) + b" " + str(rank).encode() + b"\n"
            for token, rank in self.ranks.items()
        )


def _read_ranks(path: Path) -> dict[bytes, int]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(
            f"the tokenizer file {path} cannot be read ({error.strerror}); "
            f"give a checkpoint folder that holds {TOKENIZER_FILE}"
        ) from error
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ConfigError(
                f"line {number} of the tokenizer file {path} is not 'base64-token rank'; "
                "the file is corrupt: copy it again"
            ) from error
    try:
        _check_ranks(ranks)
    except ConfigError as error:
        raise ConfigError(f"the tokenizer file {path} is corrupt: {error}") from error
    return ranks


def _check_ranks(ranks: Mapping[bytes, int]) -> None:
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ConfigError("the ranks of a tokenizer must count 0, 1, 2 … without gaps")
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise ConfigError("a tokenizer needs a rank for each of the 256 single bytes")


def _slices(text: str) -> Iterator[str]:
    for start in range(0, len(text), _MAX_SLICE_CHARS):
        piece = text[start : start + _MAX_SLICE_CHARS]
        if len(piece) > _MAX_RUN_CHARS:
            yield from _cut_long_runs(piece)
        else:
            yield piece


def _cut_long_runs(text: str) -> Iterator[str]:
    begin = 0
    for run in re.finditer(r"\s+|\S+", text):
        for cut in range(run.start() + _MAX_RUN_CHARS, run.end(), _MAX_RUN_CHARS):
            yield text[begin:cut]
            begin = cut
    yield text[begin:]
