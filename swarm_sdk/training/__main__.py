"""``python -m swarm_sdk.training``."""

from swarm_sdk.training import app

if __name__ == "__main__":
    app()
