import pytest

from swarm_sdk.errors import ConfigError
from swarm_sdk.model_backend.chat.typescript import declare_tools
from swarm_sdk.types import ToolSpec

SEARCH = ToolSpec(
    "search",
    "Search the corpus.\n\nReturns pages.",
    {
        "type": "object",
        "required": ["query"],
        "properties": {
            "limit": {"type": "integer", "minimum": 1, "maximum": 20, "default": 5},
            "kinds": {"type": "array", "items": {"enum": ["city", "land"], "description": "Kind"}},
            "query": {"type": "string", "description": "What to look for"},
            "area": {
                "type": "object",
                "properties": {"north": {"type": ["number", "null"]}},
                "additionalProperties": False,
            },
        },
    },
)  # fmt: skip


def test_a_tool_is_declared_as_the_report_shows():
    assert declare_tools([SEARCH]) == (
        "# Tools\n\n## functions\nnamespace functions {\n"
        "// Search the corpus.\n\n// Returns pages.\n"
        "type search = (_: {\n"
        "  // What to look for\n"
        "  query: string,\n"
        "  area?: {\n"
        "    north?: number | null,\n"
        "    [k: string]: never\n"
        "  },\n"
        "  kinds?: Array<\n"
        "    // Kind\n"
        '    "city" | "land"\n'
        "  >,\n"
        "  // maximum: 20, minimum: 1\n"
        "  // Default: 5\n"
        "  limit?: number\n"
        "}) => any;\n"
        "}\n"
    )


def test_no_tools_are_declared_as_nothing():
    assert declare_tools([]) == ""


def test_a_tool_without_arguments_or_description_is_one_line():
    assert "{\ntype ping = (_: {}) => any;\n}\n" in declare_tools(
        [ToolSpec("ping", "", {"type": "object", "properties": {}})]
    )


def test_equal_schemas_in_another_order_give_equal_text():
    fields = dict(reversed(SEARCH.parameters["properties"].items()))
    shuffled = {"properties": fields, "type": "object", "required": ["query"]}
    assert declare_tools([ToolSpec("search", SEARCH.description, shuffled)]) == declare_tools(
        [SEARCH]
    )


def test_a_schema_without_a_type_is_any():
    text = declare_tools([ToolSpec("f", "", {"properties": {"x": {"title": "X"}}})])
    assert "x?: any" in text


def test_an_unknown_reference_is_a_config_error_that_names_the_tool():
    tool = ToolSpec("f", "", {"properties": {"x": {"items": {"$ref": "#/$defs/Y"}}}})
    with pytest.raises(ConfigError, match=r"'f' refers to '#/\$defs/Y'"):
        declare_tools([tool])
