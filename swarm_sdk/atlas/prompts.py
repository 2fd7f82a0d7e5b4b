"""What the agents that `nano` is trained on are told; the same texts are used when it is run.

The main agent's prompt names what it has and how to reply, and orders nothing else. A sub-agent's
prompt is written by the main agent, so ``finder_prompt`` is what the scripted main agents write.
"""

MAIN_SYSTEM_PROMPT = (
    "You answer questions from pages: search and open find them, ipython runs Python code. "
    "You can create sub-agents with create_subagent and give them tasks with assign_task. "
    "Reply with a table, one row per name, or with one line: answer: VALUE"
)

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
