"""What commands share: the boundary at which an error becomes one sentence and an exit code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from swarm_sdk.errors import ConfigError, LedgerError, SwarmError


@contextmanager
def said_in_one_sentence() -> Iterator[None]:
    """The boundary at which errors become a line on stderr and an exit code."""
    try:
        yield
    except (ConfigError, LedgerError) as error:
        typer.echo(f"swarm: {error}", err=True)
        raise typer.Exit(2) from error
    except SwarmError as error:
        typer.echo(f"swarm: {error}", err=True)
        raise typer.Exit(1) from error
    except OSError as error:  # a disk that is full, a folder that may not be written
        if error.strerror is None or isinstance(error, BrokenPipeError):
            raise
        place = f": {error.filename}" if error.filename else ""
        typer.echo(f"swarm: {error.strerror}{place}", err=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        typer.echo("swarm: interrupted; what was committed is in the trace", err=True)
        raise typer.Exit(130) from error
