"""The commands of training."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from swarm_sdk.errors import ConfigError
from swarm_sdk.terminal import said_in_one_sentence
from swarm_sdk.training import sft

app: typer.Typer = typer.Typer(
    help="Train from recorded episodes.", add_completion=False, pretty_exceptions_enable=False
)


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Add a command; what goes wrong is said in one sentence."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        with said_in_one_sentence():
            function(*args, **kwargs)

    return app.command()(run)


command(sft.tokenizer)
command(sft.sft)

SWITCH_S = 5e-4
"""Two engines' threads and the event loop share the interpreter: with Python's 5 ms each of them
would wait longer for its turn than a step of an engine takes."""
Out = Annotated[Path, typer.Option(help="The run's directory.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="KEY=VALUE of a setting (swarm_sdk/training/settings.py)."),
]


@app.callback(invoke_without_command=True)
def train(
    context: typer.Context,
    source: Annotated[
        Path | None, typer.Option("--from", help="Train on the episodes of this earlier run.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The new run's directory.")] = Path("replayed"),
    setting: Set = None,
) -> None:
    """Train from recorded episodes: `swarm train parl` runs new ones, `--from` takes old ones."""
    if context.invoked_subcommand is not None:
        return
    if source is None:
        typer.echo(context.get_help())
        raise typer.Exit
    from swarm_sdk.training.parl import replay

    with said_in_one_sentence():
        replay(_config(setting or []), source, out)


@command
def parl(
    out: Out,
    start: Annotated[str, typer.Option(help="nano or a checkpoint directory.")] = "nano",
    subagents: Annotated[
        list[str] | None,
        typer.Option(
            help="Checkpoint of the frozen sub-agents, or sglang:URL; later ones as ITERATION:PATH."
        ),
    ] = None,
    sampler: Annotated[
        str, typer.Option(help="sglang:URL of servers that sample, instead of this process.")
    ] = "",
    steps: Annotated[int, typer.Option(help="Iterations.")] = 30,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    max_seconds: Annotated[float, typer.Option(help="No iteration begins after it.")] = float(
        "inf"
    ),
    seed: int = 0,
    setting: Set = None,
) -> None:
    """Train the orchestrator on episodes of its own; a run that was killed goes on.

    Under torchrun the updates are shared by all processes.
    """
    import anyio

    from swarm_sdk.traces.parl.distributed import Team
    from swarm_sdk.training.parl import Parl, follow

    given: dict[str, Any] = {
        "start": start,
        "sampler": sampler,
        "steps": steps,
        "device": device,
        "max_seconds": max_seconds,
        "seed": seed,
    }
    if subagents:
        given["subagents"] = tuple(_curriculum(one) for one in subagents)
    config = _config(setting or [], **given)

    team = Team.join(device, expert_parallel=config.expert_parallel or None)
    sys.setswitchinterval(SWITCH_S)

    async def run() -> None:
        async with Parl.open(config, out, team) as training:
            await training.train()

    if team.is_leader:
        anyio.run(run)
    else:
        follow(config, out, team)
    team.leave()


@command
def report(run: Annotated[Path, typer.Argument(help="The run's directory.")]) -> None:
    """Draw a run's curves: RUN/report.html and RUN/report.png."""
    from swarm_sdk.training.report import write_report

    for path in write_report(run):
        typer.echo(str(path))


def _curriculum(text: str) -> tuple[int, str]:
    first, _, path = text.partition(":")
    return (int(first), path) if first.isdigit() and path else (0, text)


def _config(settings: list[str], **given: Any) -> Any:
    from swarm_sdk.training.settings import ParlConfig

    fields = ParlConfig.__dataclass_fields__
    for setting in settings:
        key, has_value, text = setting.partition("=")
        if not has_value or key not in fields or key == "subagents":
            known = ", ".join(name for name in fields if name != "subagents")
            raise ConfigError(f"'{setting}' is no setting; write KEY=VALUE with one of: {known}")
        default = fields[key].default
        try:
            value = text if isinstance(default, str) else json.loads(text)
            given[key] = float(value) if isinstance(default, float) else value
        except (ValueError, TypeError) as error:
            raise ConfigError(f"'{text}' is no value of {key}") from error
        wrong = isinstance(default, bool) != isinstance(given[key], bool)
        if wrong or (isinstance(default, int) and not isinstance(given[key], int)):
            raise ConfigError(f"{key} is {type(default).__name__}, got '{text}'")
    return ParlConfig(**given)
