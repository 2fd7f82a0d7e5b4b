"""An async iterator over what a coroutine produces while it runs.

The producer is a task of its own, with no cancel scope held open across a ``yield``: so a consumer
may put timeouts around single items, iterate from any task, or leave. When the iterator ends, for
whatever reason, the producer has ended too.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

ItemT = TypeVar("ItemT")


async def stream(
    produce: Callable[[], Coroutine[Any, Any, None]],
    next_item: Callable[[], ItemT | None],
    has_news: asyncio.Event,
    name: str,
) -> AsyncGenerator[ItemT, None]:
    """Yield what ``next_item`` gives (``None``: nothing now) until the producer has ended.

    ``produce`` sets ``has_news`` whenever there is an item. What it raises is raised here.
    """
    task = asyncio.create_task(produce(), name=name)
    task.add_done_callback(lambda _: has_news.set())
    try:
        while True:
            has_news.clear()
            while (item := next_item()) is not None:
                yield item
            if task.done():
                break
            await has_news.wait()
        await task
    finally:
        if not task.done():
            task.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task
