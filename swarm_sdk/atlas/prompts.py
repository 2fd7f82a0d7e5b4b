"""What scripted main agents write when they create a sub-agent, and how rows are written.

What the main agent itself is told is ``swarm_sdk.prompts.MAIN``, in training as in use.
"""

FINDER_NAME = "finder"


def table_row(cells: "list[str] | tuple[str, ...]") -> str:
    """A row of a markdown table.

    >>> table_row(["Kenya", "Nairobi"])
    '| Kenya | Nairobi |'
    """
    return "| " + " | ".join(cells) + " |"


def finder_prompt(attributes: "list[str] | tuple[str, ...]") -> str:
    """System prompt of a sub-agent that reports ``attributes`` of the names it is given."""
    return (
        "Search for each given name, open its page, and reply with one row per name: "
        + table_row(["name", *attributes])
    )
