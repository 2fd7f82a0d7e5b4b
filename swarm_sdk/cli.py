"""The command line: ``swarm run | resume | demo | trace | train | checkpoint | serve | doctor``.

With ``--json`` a command prints one object on stdout and everything else on stderr. Exit codes:
0 done, 1 the episode did not end well, 2 the user's mistake, said in one sentence.
"""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table

from swarm_sdk.checkpoints import app as checkpoint_app
from swarm_sdk.errors import ConfigError, SwarmError
from swarm_sdk.serve import serve
from swarm_sdk.terminal import said_in_one_sentence
from swarm_sdk.training import app as training_app

if TYPE_CHECKING:
    from swarm_sdk.runtime.episode import Result
    from swarm_sdk.swarm import Swarm

app: typer.Typer = typer.Typer(
    help="Run, record and read agent swarms.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
trace_app: typer.Typer = typer.Typer(help="Read recorded episodes.", no_args_is_help=True)
app.add_typer(trace_app, name="trace")
app.add_typer(training_app, name="train")
app.add_typer(checkpoint_app, name="checkpoint")
app.command(context_settings={"allow_extra_args": True})(serve)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Runs = Annotated[Path, typer.Option(help="The run directory, where the ledger lies.")]
DEFAULT_RUNS = Path(".swarm")


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")


@app.command()
def run(
    task: Annotated[str, typer.Argument(help="What the swarm should do, in quotes.")],
    model: Annotated[
        str,
        typer.Option(
            help="nano | path:DIR | sglang:http://host:port | openai:http://host/v1#model"
        ),
    ] = "nano",
    docs: Annotated[
        Path | None, typer.Option(help="Search a folder of .txt, .md or .html files.")
    ] = None,
    file: Annotated[list[Path] | None, typer.Option(help="A picture; may be repeated.")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="SWARM_API_KEY", help="For servers that ask for one.")
    ] = None,
    critical_steps: Annotated[int | None, typer.Option(help="Limit of critical steps.")] = None,
    steps: Annotated[int | None, typer.Option(help="Limit of steps of all agents.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Limit of generated tokens.")] = None,
    wall_s: Annotated[float | None, typer.Option(help="Limit of seconds.")] = None,
    agents: Annotated[int | None, typer.Option(help="Limit of sub-agents.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    runs: Runs = DEFAULT_RUNS,
    as_json: Json = False,
) -> None:
    """Run one task and print the answer, its cost and where its trace is.

    Without --docs the agents search the Atlas: countries, large cities and chemical elements.

      swarm run "For Kenya, Peru and Japan give the capital and the currency."

      swarm run "What does the contract say about notice?" --docs ./contracts
    """
    from swarm_sdk.progress import Progress

    limits = {
        "critical_steps": critical_steps,
        "steps": steps,
        "tokens": tokens,
        "wall_s": wall_s,
        "agents": agents,
    }
    launch = {"model": model, "docs": docs and str(docs.resolve()), "budget": limits, "seed": seed}

    async def answer() -> Result[None]:
        async with _launched(launch, runs, api_key) as swarm:
            with Progress(task) as progress:
                return await swarm.run(task, files=file or (), on_event=progress, launch=launch)

    with said_in_one_sentence():
        _tell(_run_async(answer), as_json=as_json)


@app.command()
def resume(
    episode: Annotated[str, typer.Argument(help="The episode's id, or the start of it.")],
    api_key: Annotated[
        str | None, typer.Option(envvar="SWARM_API_KEY", help="For servers that ask for one.")
    ] = None,
    runs: Runs = DEFAULT_RUNS,
    as_json: Json = False,
) -> None:
    """Go on with an episode of `swarm run` that was killed or interrupted.

    It starts from the last commit: no step on record is asked for again, and no tool call with a
    result on record runs again.

      swarm trace list

      swarm resume 20261124-1714
    """
    from swarm_sdk.progress import Progress
    from swarm_sdk.traces.ledger import Ledger

    async def answer() -> Result[None]:
        ledger = Ledger(runs, readonly=True)
        record = ledger.episode(episode)
        ledger.close()
        launch = record.settings.get("launch")
        if not launch or "docs" not in launch:
            raise ConfigError(
                f"episode {record.id} was not started by `swarm run`; resume it with "
                "Swarm.resume in the program that did"
            )
        async with _launched(launch, runs, api_key) as swarm:
            with Progress(record.task["prompt"]) as progress:
                return await swarm.resume(record.id, on_event=progress)

    with said_in_one_sentence():
        _tell(_run_async(answer), as_json=as_json)


@asynccontextmanager
async def _launched(
    launch: Mapping[str, Any], runs: Path, api_key: str | None
) -> AsyncIterator[Swarm]:
    """The swarm of ``swarm run``, as its record describes it."""
    from swarm_sdk.desk import desk_tools
    from swarm_sdk.runtime.budget import Budget
    from swarm_sdk.swarm import Swarm

    async with desk_tools(Path(launch["docs"]) if launch["docs"] else None) as tools:
        swarm = Swarm(
            launch["model"],
            tools=tools,
            budget=Budget(**launch["budget"]),
            seed=launch["seed"],
            runs=runs,
            api_key=api_key,
        )
        async with swarm:
            yield swarm


def _tell(result: Result[Any], *, as_json: bool) -> None:
    """Print a result; exit code 1 where the episode did not end well."""
    from swarm_sdk.runtime.episode import result_to_json

    if as_json:
        _print_json(result_to_json(result))
    else:
        _print_result(result)
    if result.status != "done":
        typer.echo(f"swarm: the episode ended {result.status}: {result.error}", err=True)
        raise typer.Exit(1)


def _run_async(answer: Any) -> Any:
    import anyio

    return anyio.run(answer)


def _print_result(result: Any) -> None:
    console = Console()
    console.print(Markdown(result.output) if result.output.startswith("|") else result.output)
    usage = result.usage
    console.print(
        f"[dim]critical steps {result.critical_steps} of {result.total_steps} in total, "
        f"{len(result.subagents)} sub-agents, {usage.num_completion_tokens} tokens generated, "
        f"{result.wall_s:.1f} s; swarm trace show {result.episode_id}[/dim]",
        highlight=False,
    )


@app.command()
def demo(runs: Runs = DEFAULT_RUNS, as_json: Json = False) -> None:
    """Ask `nano` one wide and one look question on entities and pictures it has never seen.

    A model of the Kimi K2.5 architecture, inside the package and on the CPU, decides by itself to
    create sub-agents, searches real facts, runs code, and answers. Needs no download and no key.
    """
    from swarm_sdk.atlas.demo import print_demo, run_demo

    with said_in_one_sentence():
        report = _run_async(lambda: run_demo(runs))
        if as_json:
            _print_json(report.to_json())
        else:
            print_demo(report, Console())


@trace_app.command("list")
def trace_list(runs: Runs = DEFAULT_RUNS, as_json: Json = False) -> None:
    """List the recorded episodes, newest first."""
    from swarm_sdk.traces.ledger import Ledger

    with said_in_one_sentence():
        ledger = Ledger(runs, readonly=True)
        episodes = ledger.episodes()[::-1]
        ledger.close()
        if as_json:
            _print_json(
                [
                    {
                        "episode_id": episode.id,
                        "status": episode.status or "unfinished",
                        "model": episode.model,
                        "task": episode.task["prompt"],
                        "summary": episode.summary,
                    }
                    for episode in episodes
                ]
            )
            return
        table = Table(box=None, pad_edge=False)
        for column in ("episode", "status", "critical", "steps", "model", "task"):
            table.add_column(column, no_wrap=True, overflow="ellipsis")
        for episode in episodes:
            figures = episode.summary or {}
            table.add_row(
                episode.id,
                episode.status or "unfinished",
                str(figures.get("critical_steps", "")),
                str(figures.get("total_steps", "")),
                episode.model,
                episode.task["prompt"],
            )
        Console().print(table)


@trace_app.command("show")
def trace_show(
    episode: Annotated[str, typer.Argument(help="The episode's id, or the start of it.")],
    runs: Runs = DEFAULT_RUNS,
    as_json: Json = False,
) -> None:
    """Draw an episode's stages, with the critical path marked."""
    from swarm_sdk.trace_view import episode_to_json, print_episode
    from swarm_sdk.traces.ledger import Ledger

    with said_in_one_sentence():
        ledger = Ledger(runs, readonly=True)
        record = ledger.episode(episode)
        if as_json:
            _print_json(episode_to_json(ledger, record))
        else:
            print_episode(ledger, record, Console())
        ledger.close()


@trace_app.command("export")
def trace_export(
    episode: Annotated[
        str | None, typer.Argument(help="The episode's id, or the start of it; all without it.")
    ] = None,
    runs: Runs = DEFAULT_RUNS,
    form: Annotated[
        str, typer.Option("--format", help="jsonl (on stdout), parquet, hf, slime or verl.")
    ] = "jsonl",
    out: Annotated[Path | None, typer.Option(help="File, or folder of hf, to be made.")] = None,
) -> None:
    """Write trajectories, one row a branch: ids, mask, log-probs (docs/trajectories.md)."""
    from typing import get_args

    from swarm_sdk.traces import export
    from swarm_sdk.traces.ledger import Ledger
    from swarm_sdk.traces.trajectory import branches

    with said_in_one_sentence():
        ledger = Ledger(runs, readonly=True)
        episodes = ledger.episodes() if episode is None else [ledger.episode(episode)]
        if form == "jsonl":
            for one in episodes:
                for branch in branches(ledger, one.id):
                    _print_json(export.branch_to_json(branch))
        elif form not in get_args(export.Format):
            raise ConfigError(f"unknown format '{form}'; use jsonl, parquet, hf, slime or verl")
        elif out is None:
            raise ConfigError(f"--format {form} needs --out, the file or folder to be made")
        else:
            told = export.export(ledger, episodes, cast("export.Format", form), out)
            for sentence in told.sentences:
                typer.echo(f"left out: {sentence}", err=True)
            typer.echo(
                f"{told.num_branches} branches, {told.num_tokens} tokens, "
                f"{told.num_trained_tokens} of them trained, in {out}; "
                f"{told.left_out.total()} episodes left out",
                err=True,
            )
        ledger.close()


@app.command()
def doctor(as_json: Json = False) -> None:
    """Tell what is installed and what each part of the package needs."""
    parts = {
        "embedded engine (nano)": (("torch", "safetensors"), "local"),
        "fast decoding on the CPU": (("numba",), "local"),
        "IPython sandboxes": (("jupyter_client", "ipykernel"), "sandbox"),
        "pictures in sandboxes": (("skimage", "matplotlib"), "sandbox"),
    }
    from swarm_sdk.config import nano_directory

    checks = [
        {
            "part": part,
            "ok": not (missing := [name for name in needs if find_spec(name) is None]),
            "advice": f"pip install 'swarm-sdk[{extra}]'" if missing else "",
        }
        for part, (needs, extra) in parts.items()
    ]
    has_nano = (nano_directory() / "model.safetensors").is_file()
    checks.append(
        {
            "part": "nano checkpoint",
            "ok": has_nano,
            "advice": "" if has_nano else "reinstall swarm-sdk: the checkpoint is missing",
        }
    )
    isolation = _isolation()
    if as_json:
        told = {"version": metadata.version("swarm-sdk"), "checks": checks, "isolation": isolation}
        _print_json(told)
    else:
        table = Table(box=None, pad_edge=False)
        for column in ("part", "", "advice"):
            table.add_column(column)
        for check in checks:
            state = "[green]ok[/green]" if check["ok"] else "[red]missing[/red]"
            table.add_row(str(check["part"]), state, str(check["advice"]))
        Console().print(table)
        reason = f"  ({isolation['reason']})" if isolation["reason"] else ""
        lacks = ", ".join(isolation["not_enforced"]) or "nothing"
        Console().print(f"isolation of code: {isolation['level']}, not enforced: {lacks}{reason}")
    if not all(check["ok"] for check in checks):
        raise typer.Exit(1)


def _isolation() -> dict[str, Any]:
    """The level at which code runs on this machine, shown by a canary."""
    from swarm_sdk.tools.sandbox.launcher import probe
    from swarm_sdk.tools.sandbox.levels import Isolation

    try:
        found = probe()
    except SwarmError as error:
        found = Isolation(level=0, reason=str(error))
    return {
        "level": found.name,
        "enforced": list(found.enforced),
        "not_enforced": list(found.missing),
        "reason": found.reason,
    }


def main() -> None:
    """Entry point of the ``swarm`` command."""
    app()
