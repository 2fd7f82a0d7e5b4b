"""``search`` and ``open``: an agent's way through a corpus.

    search(query) ──> TITLE: SNIPPET     one line a page, best first
    open(title)   ──> the page's text

What the model is told is kept short: it is paid for in every agent's context.
"""

from __future__ import annotations

import anyio.to_thread

from swarm_sdk.errors import ToolError
from swarm_sdk.tools.corpus import MAX_PAGE_CHARS, Corpus
from swarm_sdk.tools.function import FunctionTool


class SearchTool(FunctionTool):
    """``search(query)`` over a corpus.

    Args:
        corpus: what is searched.
        limit: most hits of one search.
    """

    def __init__(self, corpus: Corpus, *, limit: int = 4) -> None:
        async def search(query: str) -> str:
            hits = await anyio.to_thread.run_sync(corpus.search, query, limit)
            if not hits:
                return f"no page matches {' '.join(query.split())[:80]}"
            return "\n".join(f"{hit.title}: {hit.snippet}" for hit in hits)

        super().__init__(
            search, description="Search the documents; returns the titles of the best pages."
        )


class OpenTool(FunctionTool):
    """``open(title)`` over a corpus.

    Where the corpus holds a page of more than ``max_chars``, the tool takes a number as well:
    ``open(title, page=2)`` gives the next ``max_chars`` characters.

    Args:
        corpus: whose pages are read.
        max_chars: most characters of one result; what is cut is told.
    """

    def __init__(self, corpus: Corpus, *, max_chars: int = MAX_PAGE_CHARS) -> None:
        async def read(title: str, page: int = 1) -> str:
            found = await anyio.to_thread.run_sync(corpus.page, title)
            if found is None:
                raise ToolError(f"no page is titled '{title}'; search for it first")
            num_parts = max(1, -(-len(found.text) // max_chars))
            if not 1 <= page <= num_parts:
                raise ToolError(f"'{found.title}' has pages 1 to {num_parts}, not {page}")
            part = found.text[(page - 1) * max_chars : page * max_chars]
            if page == num_parts:
                return part
            return f"{part}\n[page {page} of {num_parts}; open page={page + 1} for more]"

        async def read_whole(title: str) -> str:
            return await read(title)

        super().__init__(
            read if corpus.max_page_chars > max_chars else read_whole,
            name="open",
            description="Read the page with this exact title.",
        )
