"""``swarm serve``: a checkpoint behind SGLang, kept running (docs/serving.md)."""

from __future__ import annotations

import json
import shlex
import signal
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swarm_sdk.checkpoints import checkpoint_folder
from swarm_sdk.errors import ConfigError, ServeFailed
from swarm_sdk.terminal import said_in_one_sentence

if TYPE_CHECKING:
    from swarm_sdk.model_backend.serving.plan import Plan
    from swarm_sdk.model_backend.serving.supervisor import Patience, Told


def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="nano, or the folder of a Kimi K2.5 checkpoint.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(help="Port of the server; of several the router's, theirs come behind it."),
    ] = 30000,
    servers: Annotated[int, typer.Option(help="Servers, each with GPUs of its own.")] = 1,
    tp: Annotated[
        int | None, typer.Option(help="GPUs that share a copy's layers; the fewest that hold it.")
    ] = None,
    ep: Annotated[int | None, typer.Option(help="GPUs that share the experts.")] = None,
    dp: Annotated[int, typer.Option(help="Copies inside each server.")] = 1,
    context_length: Annotated[
        int | None, typer.Option(help="Longest context in tokens; the model's own otherwise.")
    ] = None,
    device: Annotated[str, typer.Option(help="cuda or cpu (small models).")] = "cuda",
    python: Annotated[
        str, typer.Option(help="The Python that has SGLang installed.")
    ] = sys.executable,
    logs: Annotated[Path, typer.Option(help="Folder of the servers' logs.")] = Path(".swarm/serve"),
    max_restarts: Annotated[
        int, typer.Option(help="Times that a server may die before it has served ten minutes.")
    ] = 3,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the commands, and end.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on stdout when all is ready.")
    ] = False,
) -> None:
    """Serve a checkpoint with SGLang and keep it running, until Ctrl-C or SIGTERM.

    Memory, GPUs, ports and the install are checked before anything loads. A server that dies or
    hangs is started again. What stands after -- is given to SGLang as it is.

      swarm serve nano

      swarm serve ./Kimi-K2.5 --tp 8 -- --mem-fraction-static 0.92

      swarm serve ./RUN/model --servers 4 --port 30000 --dry-run

    When all is ready it says what to give to swarm run as --model: the address of each server, for
    our client shares its calls out by itself. The router of several is for chat completions.
    """
    import anyio

    from swarm_sdk.model_backend.serving.plan import Ask, plan
    from swarm_sdk.model_backend.serving.supervisor import Patience
    from swarm_sdk.model_backend.weights.servable import servable

    with said_in_one_sentence(), tempfile.TemporaryDirectory(prefix="swarm-serve-") as work:
        if max_restarts < 0:
            raise ConfigError(f"--max-restarts must be >= 0, got {max_restarts}")
        folder = checkpoint_folder(model).resolve()
        if not folder.is_dir():
            raise ConfigError(f"there is no checkpoint folder '{folder}'; give its path, or nano")
        planned = plan(
            Ask(
                folder=servable(folder, Path(work) / folder.name),
                host=host,
                port=port,
                servers=servers,
                tp=tp,
                ep=ep,
                dp=dp,
                context_tokens=context_length,
                device=device,
                python=python,
                extra=context.args,
            )
        )
        told = _told(planned, None if model == "nano" else folder)
        if dry_run:
            _print_plan(planned, told, as_json=as_json)
            return
        _check_logs(logs)
        patience = Patience(max_restarts=max_restarts)
        anyio.run(_serve, planned, told, logs, patience, as_json)


async def _serve(
    plan: Plan,
    told_ready: dict[str, Any],
    logs: Path,
    patience: Patience,
    as_json: bool,  # noqa: FBT001
) -> None:
    import anyio

    from swarm_sdk.model_backend.serving.supervisor import Supervisor

    pids: dict[str, int] = {}

    def on_told(told: Told) -> None:
        pids[told.name] = told.pid
        text = f": {told.text[:160]}" if told.text else ""
        typer.echo(f"{told.name} {told.kind} after {told.after_s:.0f} s{text}", err=True)

    def on_ready() -> None:
        if as_json:
            sys.stdout.write(json.dumps(told_ready | {"pids": pids, "logs": str(logs)}) + "\n")
            sys.stdout.flush()
        typer.echo(f"chat completions: {plan.url}/v1", err=True)
        typer.echo(f"ready: --model {shlex.quote(told_ready['model'])}", err=True)

    failed: ServeFailed | None = None
    async with anyio.create_task_group() as group:

        async def stop_on_signal() -> None:
            with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
                async for number in signals:
                    typer.echo(f"{number.name}: stopping", err=True)
                    group.cancel_scope.cancel()
                    return

        group.start_soon(stop_on_signal, name="signals")
        try:
            await Supervisor(plan, logs, on_told, patience).run(on_ready)
        except ServeFailed as error:  # raised outside, so that no group wraps it
            failed = error
        group.cancel_scope.cancel()
    if failed:
        raise failed


def _check_logs(logs: Path) -> None:
    try:
        logs.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=logs).close()
    except OSError as error:
        raise ConfigError(
            f"--logs {logs} cannot be written ({error.strerror}); give another folder"
        ) from None


def _told(plan: Plan, directory: Path | None) -> dict[str, Any]:
    """What ``--json`` tells of a plan; ``directory`` is ``None`` for nano."""
    urls = [server.url for server in plan.servers]
    return {
        "model": "sglang:" + ",".join(urls) + (f"#{directory}" if directory else ""),
        "url": plan.url,
        "servers": urls,
        "tp": plan.tp,
        "needs": asdict(plan.needs),
    }


def _print_plan(plan: Plan, told: dict[str, Any], *, as_json: bool) -> None:
    launches = [*plan.servers, *([plan.router] if plan.router else [])]
    if as_json:
        commands = {launch.name: list(launch.command) for launch in launches}
        environments = {launch.name: launch.environment for launch in launches}
        all_told = told | {"commands": commands, "environments": environments}
        sys.stdout.write(json.dumps(all_told) + "\n")
        return
    for launch in launches:
        variables = [f"{name}={value}" for name, value in launch.environment.items()]
        typer.echo(shlex.join([*variables, *launch.command]))
