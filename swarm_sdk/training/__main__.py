"""``python -m swarm_sdk.training``."""

from swarm_sdk.training import app

app()
