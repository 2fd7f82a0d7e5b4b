"""Questions as JSON lines, and the held-out set.

    {"question": "How many coins are in the picture?", "files": ["coins.png"], "answer": "24",
     "kind": "look"}

``files`` are paths beside the JSON lines file; ``answer`` of a wide question is a markdown table
or a list of rows ({"name": …, "capital": …}); ``tolerance`` (how far numbers may be off) and
``id`` may be given too.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

from swarm_sdk.atlas.pages import world
from swarm_sdk.atlas.prompts import table_row
from swarm_sdk.atlas.questions import (
    Kind,
    Question,
    compute_question,
    deep_question,
    look_question,
    photograph_questions,
    table,
    wide_question,
)
from swarm_sdk.errors import ConfigError
from swarm_sdk.types import Image

KINDS: tuple[Kind, ...] = get_args(Kind)
MEDIA_TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg"}
MIN_NUM_ENTITIES, MAX_NUM_ENTITIES = 2, 12
PHOTOGRAPH_SHARE = 0.3
"""Share of the held-out look questions that are about photographs."""


def heldout_questions(num_questions: int, seed: int = 0) -> list[Question]:
    """Questions about held-out entities and pictures, the four kinds in turn; N from 2 to 12.

    They are asked over the full corpus, ``pages("all")``. The first look question counts coins.
    """
    rng = random.Random(seed)
    everything, targets = world("all"), world("heldout").entities
    photographs = photograph_questions(rng)
    coins, *others = photographs
    others = rng.sample(others, len(others))
    num_photographs = round(PHOTOGRAPH_SHARE * num_questions / len(KINDS))
    photographs = [coins, *others][:num_photographs]
    questions = []
    for i in range(num_questions):
        match KINDS[i % len(KINDS)]:
            case "wide":
                span = MAX_NUM_ENTITIES - MIN_NUM_ENTITIES + 1
                num_entities = MIN_NUM_ENTITIES + (i // len(KINDS)) % span
                question = wide_question(everything, targets, rng, num_entities=num_entities)
            case "deep":
                question = deep_question(everything, targets, rng)
            case "compute":
                question = compute_question(everything, targets, rng)
            case "look":
                question = photographs.pop(0) if photographs else look_question("heldout", rng)
        questions.append(question)
    return questions


def load_questions(path: Path | str) -> list[Question]:
    """Questions of anyone's own, from a JSON lines file.

    Raises:
        ConfigError: the file, a line of it, or a picture it names cannot be read.
    """
    file = Path(path)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the questions in {file}: {error}") from error
    questions = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            questions.append(_parse(line, f"{file}, line {number}", file.parent, number))
    if not questions:
        raise ConfigError(f"{file} holds no question; write one JSON object a line")
    return questions


def save_questions(questions: Iterable[Question], path: Path | str) -> None:
    """Write questions as JSON lines, and their pictures into a folder beside."""
    file = Path(path)
    lines = []
    for question in questions:
        names = []
        for picture in question.files:
            name = Path(f"{file.stem}-files", question.id, picture.name)
            (file.parent / name).parent.mkdir(parents=True, exist_ok=True)
            (file.parent / name).write_bytes(picture.data)
            names.append(name.as_posix())
        row = {
            "id": question.id,
            "kind": question.kind,
            "question": question.prompt,
            "files": names,
            "answer": question.answer,
            "tolerance": question.tolerance,
        }
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    file.write_text("".join(lines), encoding="utf-8")


def _parse(line: str, where: str, folder: Path, number: int) -> Question:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: not JSON ({error})") from error
    if not isinstance(row, dict) or not {"question", "answer", "kind"} <= row.keys():
        raise ConfigError(f"{where}: a question needs the keys question, answer and kind")
    if row["kind"] not in KINDS:
        raise ConfigError(f"{where}: kind must be one of {', '.join(KINDS)}, got {row['kind']!r}")
    tolerance = row.get("tolerance", 0)
    if not isinstance(tolerance, int | float):
        raise ConfigError(f"{where}: tolerance must be a number, got {tolerance!r}")
    return Question(
        id=str(row.get("id", f"line-{number}")),
        kind=row["kind"],
        prompt=str(row["question"]),
        answer=_answer(row["answer"], where),
        files=tuple(_file(folder / str(name), where) for name in row.get("files", ())),
        tolerance=float(tolerance),
    )


def _answer(answer: Any, where: str) -> str:
    if not isinstance(answer, list):
        return str(answer)
    if not answer or not all(isinstance(row, Mapping) and row for row in answer):
        raise ConfigError(f"{where}: an answer that is a list holds one object a row")
    _, *attributes = answer[0]
    rows = [table_row([str(cell) for cell in row.values()]) for row in answer]
    return table(attributes, rows)


def _file(path: Path, where: str) -> Image:
    media_type = MEDIA_TYPES.get(path.suffix.lower())
    if media_type is None:
        raise ConfigError(f"{where}: {path.name} must be a PNG or JPEG file")
    try:
        return Image(path.read_bytes(), media_type, path.name)
    except OSError as error:
        raise ConfigError(f"{where}: cannot read {path}: {error}") from error
