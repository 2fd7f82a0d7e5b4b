"""``swarm checkpoint show | convert``: what a checkpoint is, and one form to the other."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer

from swarm_sdk.config import nano_directory
from swarm_sdk.errors import ConfigError
from swarm_sdk.terminal import said_in_one_sentence

if TYPE_CHECKING:
    from swarm_sdk.model_backend.weights.convert import Progress

app: typer.Typer = typer.Typer(help="Look at checkpoints and convert them.", no_args_is_help=True)

LM_HEAD = "language_model.lm_head.weight"
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Source = Annotated[str, typer.Argument(help="Folder of a Kimi K2.5 checkpoint, or nano.")]


@app.command()
def show(source: Source, as_json: Json = False) -> None:
    """Tell what a checkpoint is and whether it is whole; only headers are read.

    swarm checkpoint show ./Kimi-K2.5
    """
    from swarm_sdk.model_backend.model.config import KimiConfig
    from swarm_sdk.model_backend.model.config_json import read_json
    from swarm_sdk.model_backend.weights.check import check_complete
    from swarm_sdk.model_backend.weights.headers import read_headers
    from swarm_sdk.model_backend.weights.quantization import is_int4 as has_int4_experts

    with said_in_one_sentence():
        folder = checkpoint_folder(source)
        config_json = read_json(folder)
        config, is_int4 = KimiConfig.from_hf(config_json), has_int4_experts(config_json)
        headers = read_headers(folder)
        check_complete(headers, config, folder, is_int4=is_int4)
        told: dict[str, Any] = {
            "folder": str(folder),
            "experts": "int4" if is_int4 else headers[LM_HEAD].dtype.lower(),
            "tensors": len(headers),
            "files": len({info.file for info in headers.values()}),
            "bytes": sum(info.num_bytes for info in headers.values()),
            "layers": config.text_config.num_hidden_layers,
            "routed_experts": config.text_config.n_routed_experts,
            "context_tokens": config.text_config.max_position_embeddings,
        }
        if as_json:
            sys.stdout.write(json.dumps(told) + "\n")
        else:
            typer.echo(
                f"{folder}: {told['layers']} layers of {told['routed_experts']} experts "
                f"({told['experts']}), {told['tensors']} tensors in {told['files']} files, "
                f"{told['bytes'] / 1e9:.2f} GB, context {told['context_tokens']}; whole"
            )


@app.command()
def convert(
    source: Source,
    target: Annotated[Path, typer.Argument(help="Folder to be made, or one broken off.")],
    to: Annotated[str, typer.Option("--to", help="bf16, or int4 (the routed experts alone).")],
    max_shard_gb: Annotated[float, typer.Option(help="Largest file of the result, in GB.")] = 4.0,
    as_json: Json = False,
) -> None:
    """Convert a checkpoint to bf16 or to INT4 experts, as the release of Kimi K2.5 has them.

    Reads and writes one matrix at a time, so a checkpoint of a terabyte needs a few GB of memory
    (its largest matrix, several times). Run the same command again after a kill: it goes on with
    the first file that is not complete. INT4 -> bf16 -> INT4 gives the same bits again.

      swarm checkpoint convert ./Kimi-K2.5 ./Kimi-K2.5-bf16 --to bf16

      swarm checkpoint convert ./RUN/model ./RUN/model-int4 --to int4
    """
    with said_in_one_sentence():
        if find_spec("torch") is None:
            raise ConfigError("converting needs torch; pip install 'swarm-sdk[local]'")
        from swarm_sdk.model_backend.weights.convert import Form
        from swarm_sdk.model_backend.weights.convert import convert as convert_checkpoint

        if to not in get_args(Form):
            raise ConfigError(f"unknown form '{to}'; use --to bf16 or --to int4")
        if max_shard_gb <= 0:
            raise ConfigError(f"--max-shard-gb must be above 0, got {max_shard_gb:g}")
        done = convert_checkpoint(
            checkpoint_folder(source),
            target,
            cast("Form", to),
            max_shard_bytes=int(max_shard_gb * 1e9),
            on_file=_tell,
        )
        if as_json:
            sys.stdout.write(json.dumps(asdict(done)) + "\n")
        else:
            typer.echo(
                f"{target}: {done.num_tensors} tensors in {done.num_files} files, "
                f"{done.num_bytes / 1e9:.2f} GB, {done.form} experts, in {done.wall_s:.0f} s"
            )


def checkpoint_folder(source: str) -> Path:
    """The folder that a user means: ``nano``, or a path (``path:`` may stand before it)."""
    return nano_directory() if source == "nano" else Path(source.removeprefix("path:"))


def _tell(progress: Progress) -> None:
    state = "was there" if progress.was_there else "written"
    typer.echo(
        f"{progress.num_files} of {progress.of_files} files, {progress.num_bytes / 1e9:.2f} of "
        f"{progress.of_bytes / 1e9:.2f} GB: {progress.file} {state}",
        err=True,
    )
