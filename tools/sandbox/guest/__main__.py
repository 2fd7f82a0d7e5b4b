"""A kernel of its own process, for a container: ``python -m swarm_sdk.tools.sandbox.guest FILE``.

FILE holds what ``prepare`` takes, as JSON. Prints ``ready`` once its sockets are bound.
"""

import json
import os
import sys

from swarm_sdk.tools.sandbox.guest.app import environment, prepare


def main() -> None:
    """Run as told by the file."""
    with open(sys.argv[1], encoding="utf-8") as stream:
        told = json.load(stream)
    sys.argv[1:] = []
    foreign = {"", *os.environ.get("PYTHONPATH", "").split(":")}
    kept = environment(home=told["home"], scratch=told["scratch"], has_proxy=False, proxy_port=0)
    os.environ.clear()
    os.environ.update(kept)
    os.chdir(told["home"])
    ready = os.dup(1)
    kernel = prepare(told)
    sys.path[:] = ["", *(place for place in sys.path if place not in foreign)]
    os.write(ready, b"ready\n")
    os.close(ready)
    kernel.start()


if __name__ == "__main__":
    main()
