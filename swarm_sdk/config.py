"""From what a user types to objects: model strings, files, roles.

nano                          the embedded default
path:DIRECTORY                a checkpoint of ours, on the embedded engine
sglang:http://host:port       `nano` behind a SGLang server, token ids in and out
sglang:URL,URL#DIRECTORY      the model of a directory, behind one server or several
openai:http://host/v1#model   any OpenAI-compatible server
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swarm_sdk.errors import ConfigError
from swarm_sdk.runtime.budget import Budget
from swarm_sdk.types import Image, Model, Price, Sampling, Task, Tool

MODEL_FORMS = "'nano', 'path:DIRECTORY', 'sglang:http://host:port' or 'openai:http://host/v1#model'"


@dataclass(frozen=True, slots=True, kw_only=True)
class Role:
    """A sub-agent that the app declares, next to those that the model creates at run time."""

    name: str
    instructions: str
    """Its system prompt."""
    description: str = ""
    """One line for the orchestrator: when to use it."""
    tools: Sequence[Tool | Callable[..., Any]] | None = None
    """``None`` gives it the swarm's tools."""
    model: Model | str | None = None
    """``None`` gives it the swarm's model."""
    budget: Budget | None = None
    """Limits of one assignment, with all that it launches; inside the episode's own budget."""
    output_type: type[Any] | None = None
    """What its report must be, as JSON; it gets turns to mend one that does not fit."""
    price: Price | None = None
    """``None`` takes the swarm's."""

    def __post_init__(self) -> None:
        if not self.name.strip() or "/" in self.name or "#" in self.name:
            raise ConfigError(f"a role's name must not be empty nor hold '/' or '#': '{self.name}'")


def check_model_string(text: str) -> tuple[str, str]:
    """Split a model string in kind and target.

    Raises:
        ConfigError: the string has none of the known forms.
    """
    kind, _, target = text.partition(":")
    if (kind == "nano" and not target) or (kind == "path" and target):
        return kind, target
    if kind in ("sglang", "openai") and target.startswith(("http://", "https://")):
        if kind == "openai" and not target.partition("#")[2]:
            raise ConfigError(f"'{text}' names no model; write it as openai:http://host/v1#model")
        return kind, target
    raise ConfigError(f"unknown model '{text}'; use {MODEL_FORMS}")


def open_model(text: str, *, api_key: str | None = None) -> Model:
    """Make the model that a string stands for.

    Raises:
        ConfigError: the string is not known, or what it points to is missing or broken.
    """
    kind, target = check_model_string(text)
    if kind == "openai":
        from swarm_sdk.model_backend.openai_client import OpenAIModel

        base_url, _, name = target.partition("#")
        return OpenAIModel(base_url, name, api_key=api_key)
    if kind == "sglang":
        return _sglang_model(target, api_key)
    return _embedded_model(Path(target) if kind == "path" else nano_directory())


def nano_directory() -> Path:
    """Where the embedded default's checkpoint lies."""
    return Path(__file__).parent / "model_backend" / "nano"


def default_sampling(text: str | Model) -> Sampling:
    """How turns are drawn unless the app says otherwise.

    ``nano`` is small and exact answers are its job, so it takes the most likely token; for other
    models the report's evaluation settings hold (temperature 1, top-p 0.95).
    """
    if text == "nano":
        return Sampling(temperature=0.0, max_tokens=2048)
    return Sampling(temperature=1.0, top_p=0.95)


def _embedded_model(directory: Path) -> Model:
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "the embedded engine needs torch; install it with: pip install 'swarm-sdk[local]'"
        ) from error
    from swarm_sdk.model_backend.embedded import open_embedded

    return open_embedded(directory)


def _sglang_model(target: str, api_key: str | None) -> Model:
    """`nano` behind SGLang servers, or the model whose ``config.json`` and tokenizer are named."""
    from swarm_sdk.model_backend.sglang_client import open_sglang

    urls, directory = servers_and_directory(target)
    return open_sglang(
        urls,
        Path(directory) if directory else nano_directory(),
        sees_images=bool(directory),
        api_key=api_key,
    )


def servers_and_directory(target: str) -> tuple[list[str], str]:
    """The addresses of ``URL,URL#DIRECTORY``, and the directory; empty where it names none."""
    urls, _, directory = target.partition("#")
    return urls.split(","), directory


def read_files(files: Sequence[Image | Path | str]) -> tuple[Image, ...]:
    """Pictures given with a task.

    Raises:
        ConfigError: a file is missing or is not a picture that can be decoded.
    """
    return tuple(file if isinstance(file, Image) else _read_image(Path(file)) for file in files)


def _read_image(path: Path) -> Image:
    from PIL import Image as Pillow
    from PIL import UnidentifiedImageError

    try:
        data = path.read_bytes()
        with Pillow.open(io.BytesIO(data)) as picture:
            kind = picture.format
            picture.load()
    except FileNotFoundError as error:
        raise ConfigError(f"there is no file '{path}'; check the name") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise ConfigError(
            f"'{path}' is not a picture that can be read; give PNG or JPEG"
        ) from error
    if kind not in ("PNG", "JPEG"):
        raise ConfigError(f"'{path}' is a {kind} picture; give PNG or JPEG")
    return Image(data=data, media_type=f"image/{kind.lower()}", name=path.name)


def make_task(task: Task | str, files: Sequence[Image | Path | str]) -> Task:
    """A task from what the user gave.

    Raises:
        ConfigError: as ``read_files``; or the task is empty.
    """
    prompt = task if isinstance(task, str) else task.prompt
    given = () if isinstance(task, str) else task.files
    if not prompt.strip():
        raise ConfigError("the task is empty; say what the swarm should do")
    return Task(prompt, given + read_files(files))
