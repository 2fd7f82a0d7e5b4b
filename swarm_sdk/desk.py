"""The tools that ``swarm run`` gives its agents: search and open over documents, and IPython."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio.to_thread

from swarm_sdk.tools.corpus import Corpus, Page
from swarm_sdk.tools.ipython import IPythonTool
from swarm_sdk.tools.sandbox.levels import SandboxSettings
from swarm_sdk.tools.sandbox.pool import KernelPool
from swarm_sdk.tools.search import OpenTool, SearchTool
from swarm_sdk.types import Tool


def atlas_corpus() -> Corpus:
    """The Atlas: countries, large cities and chemical elements, one page each."""
    from swarm_sdk.atlas.pages import world

    return Corpus.from_pages(Page(title, text) for title, text in world("all").pages().items())


@asynccontextmanager
async def desk_tools(docs: Path | None, *, num_kernels: int = 1) -> AsyncIterator[list[Tool]]:
    """``search``, ``open`` and ``ipython``; kernels are started ahead and end with the context.

    Args:
        docs: a folder of text, Markdown or HTML files; ``None`` is the Atlas.
        num_kernels: kernels kept ready.

    Raises:
        ConfigError: the folder is missing or holds no document.
    """
    if docs is None:
        corpus = await anyio.to_thread.run_sync(atlas_corpus)
    else:
        corpus = await anyio.to_thread.run_sync(Corpus.from_folder, docs)
    settings = SandboxSettings(isolation="best")  # what holds is told by ``swarm doctor``
    async with KernelPool(num_kernels, settings=settings) as pool:
        yield [SearchTool(corpus), OpenTool(corpus), IPythonTool(pool.lease)]
