import anyio
import pytest

from swarm_sdk.errors import ToolError
from swarm_sdk.tools.corpus import Corpus, Page
from swarm_sdk.tools.search import OpenTool, SearchTool
from swarm_sdk.types import RunContext

CORPUS = Corpus.from_pages(
    [
        Page("Iron", "A metal.\nSymbol: Fe"),
        Page("Gold", "A metal. Symbol: Au"),
        *(Page(f"Alloy {i}", "A mixed metal.") for i in range(9)),
    ]
)


class NoResources:
    async def get(self, key, start):
        raise AssertionError("not asked for")


CONTEXT = RunContext(
    episode_id="e", agent_path="main", call_id="c", deps=None, resources=NoResources()
)


def call(tool, **arguments):
    return anyio.run(tool, arguments, CONTEXT).content


def test_search_gives_one_hit_a_line():
    assert call(SearchTool(CORPUS), query="iron") == "Iron: A metal. Symbol: Fe"
    assert len(call(SearchTool(CORPUS, limit=3), query="metal").splitlines()) == 3


def test_nothing_found_is_an_ordinary_result():
    assert call(SearchTool(CORPUS), query="uranium\nore") == "no page matches uranium ore"


def test_open_gives_the_text_of_the_page():
    assert call(OpenTool(CORPUS), title="iron") == "A metal.\nSymbol: Fe"
    with pytest.raises(ToolError, match=r"^no page is titled 'Irn'; search for it first$"):
        call(OpenTool(CORPUS), title="Irn")


def test_what_the_model_is_told_is_short():
    search, read = SearchTool(CORPUS).spec, OpenTool(CORPUS).spec
    assert search.name == "search"
    assert search.description == "Search the documents; returns the titles of the best pages."
    assert search.parameters["properties"] == {"query": {"type": "string"}}
    assert read.name == "open"
    assert read.description == "Read the page with this exact title."
    assert read.parameters["properties"] == {"title": {"type": "string"}}


def test_long_pages_can_be_read_to_their_end():
    text = "".join(f"line {i}\n" for i in range(500))
    tool = OpenTool(Corpus.from_pages([Page("Long", text)]), max_chars=1000)
    assert list(tool.spec.parameters["properties"]) == ["title", "page"]
    num_parts = -(-len(text) // 1000)
    first = call(tool, title="Long")
    assert first.endswith(f"\n[page 1 of {num_parts}; open page=2 for more]")
    parts = [call(tool, title="Long", page=i + 1) for i in range(num_parts)]
    assert (
        "".join(part.rpartition("\n[page ")[0] or part for part in parts[:-1]) + parts[-1] == text
    )
    with pytest.raises(ToolError, match=f"'Long' has pages 1 to {num_parts}, not 99"):
        call(tool, title="Long", page=99)
