import json
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm_sdk.model_backend.chat.template import ChatFormat
from swarm_sdk.types import Message, ToolCall, ToolSpec

SEARCH = ToolSpec(
    "search",
    "Search.",
    {
        "type": "object",
        "properties": {
            "query": {"type": "string"},
            "limit": {"type": "integer"},
            "kinds": {"type": "array", "items": {"enum": ["city", "country"]}},
            "area": {"$ref": "#/$defs/Area"},
            "either": {"anyOf": [{"type": "number"}, {"type": "null"}]},
        },
        "required": ["query"],
        "additionalProperties": False,
        "$defs": {"Area": {"type": "object", "properties": {"inner": {"$ref": "#/$defs/Area"}}}},
    },
)
ANY = ToolSpec("any.tool-1", "Takes anything.", {"type": "object"})
TOOLS = [SEARCH, ANY]

BEGIN, END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
CALL, ARGS, CLOSE = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=15)
NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def chat(tokenizer):
    return ChatFormat(tokenizer)


def sampled(tokenizer, text):
    """Ids of a turn in which special names stand for special tokens."""
    names = {name: token_id for token_id, name in tokenizer.special_names.items()}
    pattern = "(" + "|".join(re.escape(name) for name in names) + ")"
    ids = []
    for part in re.split(pattern, text):
        ids += [names[part]] if part in names else tokenizer.encode(part)
    return ids


def read(chat, text, first=0):
    ids = sampled(chat.tokenizer, text)
    return chat.parse_turn(ids, first_call_index=first, tools=TOOLS)


def read_call(chat, call_text):
    """The only call of a turn whose section holds ``call_text``."""
    (call,) = read(chat, f"r</think>{BEGIN}{call_text}{END}<|im_end|>").tool_calls
    return call


def one_call(arguments, call_id="functions.search:0"):
    return f"{CALL}{call_id}{ARGS}{arguments}{CLOSE}"


@given(
    content=TEXT,
    reasoning=TEXT,
    arguments=st.lists(st.dictionaries(TEXT, VALUES, max_size=3), max_size=3),
    first=st.integers(0, 5),
)
@settings(max_examples=80)
def test_a_written_turn_is_read_back_as_it_was(chat, content, reasoning, arguments, first):
    calls = tuple(
        ToolCall(
            f"functions.{ANY.name}:{index}",
            ANY.name,
            argument,
            json.dumps(argument, ensure_ascii=False),
        )
        for index, argument in enumerate(arguments, first)
    )
    turn = Message("assistant", content, reasoning=reasoning, tool_calls=calls)
    ids = chat.render_turn(turn)
    assert chat.parse_turn(ids, first_call_index=first, tools=TOOLS) == turn


def test_calls_are_numbered_over_the_dialogue_whatever_the_model_wrote(chat):
    text = f"</think>{BEGIN}{one_call('{}', 'functions.any.tool-1:0') * 2}{END}<|im_end|>"
    assert [call.id for call in read(chat, text, first=7).tool_calls] == [
        "functions.any.tool-1:7",
        "functions.any.tool-1:8",
    ]


def test_a_well_formed_call_has_its_arguments(chat):
    raw = '{"query": "x", "limit": 2, "kinds": ["city"], "area": {"inner": {}}, "either": null}'
    call = read_call(chat, one_call(raw))
    assert call.error is None
    assert call.arguments == json.loads(raw)
    assert call.raw_arguments == raw


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (one_call('{"query": "x'), "the arguments of search are not valid JSON"),
        (one_call("[1]"), "must be one JSON object, not an array"),
        (one_call("[" * 5000), "not usable JSON"),
        (one_call("9" * 5000), "not usable JSON"),
        (one_call('{"query": ' + "[" * 80 + "]" * 80 + "}"), "more than 64 levels"),
        (one_call('{"query": "\\ud800"}'), "half of a surrogate pair"),
        (one_call('{"query": "x", "limit": 1e999}'), "not finite"),
        (one_call("{}"), "the argument 'query' is missing in this call of search"),
        (one_call('{"query": 3}'), "'query' must be a string, not an integer"),
        (one_call('{"query": "x", "limit": true}'), "'limit' must be an integer, not true"),
        (one_call('{"query": "x", "limit": 1.5}'), "'limit' must be an integer, not a number"),
        (one_call('{"query": "x", "kinds": ["sea"]}'), "'kinds[0]' must be one of \"city\""),
        (one_call('{"query": "x", "area": {"inner": 1}}'), "'area.inner' must be an object"),
        (one_call('{"query": "x", "either": "y"}'), "'either' has none of the allowed forms"),
        (one_call('{"query": "x", "q": 1}'), "'q' does not exist (it takes: query, limit"),
        (one_call("{}", "functions.fly:0"), "no tool named 'fly'; the tools are: search, any"),
        (one_call("{}", "search"), "not of the form functions.NAME:NUMBER"),
        (one_call("{}", "a b c"), "not of the form functions.NAME:NUMBER"),
        (one_call("{}", ""), "not of the form functions.NAME:NUMBER"),
        (f"{CALL}functions.search:0{CLOSE}", "has no arguments"),
        (f'{CALL}functions.search:0{ARGS}{{"query": "x"}}', "cut off before its end token"),
        (f"{CALL}functions.sea", "cut off before its end token"),
        (f"functions.search:0{ARGS}{{}}{CLOSE}", "something that is no tool call"),
        ('{"name": "search"}', "something that is no tool call"),
        (f"{ARGS}{{}}", "something that is no tool call"),
        ("", "something that is no tool call"),
    ],
)
def test_a_malformed_call_carries_one_sentence_for_the_model(chat, text, error):
    call = read_call(chat, text)
    assert error in call.error
    assert call.arguments == {}
    assert re.fullmatch(r"functions\.[\w.\-]+:0", call.id)


def test_a_malformed_call_leaves_the_other_calls_and_the_text_alone(chat):
    good, cut = one_call('{"query": "x"}'), f"{CALL}functions.search:1{ARGS}{{"
    message = read(chat, f"why</think>So.{BEGIN}{cut}{good}{END}<|im_end|>")
    assert (message.reasoning, message.content) == ("why", "So.")
    assert [call.error is None for call in message.tool_calls] == [False, True]


def test_a_turn_cut_by_length_is_read_as_far_as_it_goes(chat):
    assert read(chat, "still think").reasoning == "still think"
    assert read(chat, "r</think>The ans").content == "The ans"
    cut = read(chat, f'r</think>{BEGIN}{one_call("{}")}{CALL}functions.search:1{ARGS}{{"que')
    assert len(cut.tool_calls) == 2
    assert "cut off" in cut.tool_calls[1].error


@pytest.mark.parametrize("end", [END, "", "<|tool_call_section_end|>"])
@pytest.mark.parametrize("begin", [BEGIN, "", "<|tool_call_section_begin|>"])
def test_section_tokens_may_be_singular_or_missing(chat, begin, end):
    message = read(chat, f"r</think>Text{begin}{one_call(json.dumps({'query': 'x'}))}{end}")
    assert [call.error for call in message.tool_calls] == [None]
    assert message.content == "Text"


def test_a_tool_call_ends_reasoning_that_was_left_open(chat):
    message = read(chat, f"plan{BEGIN}{one_call(json.dumps({'query': 'x'}))}{END}")
    assert message.reasoning == "plan"
    assert message.tool_calls[0].error is None


def test_a_call_drafted_inside_the_reasoning_is_not_a_call(chat):
    message = read(chat, f"maybe {BEGIN}{one_call('{}')}{END} no</think>Done.<|im_end|>")
    assert message.tool_calls == ()
    assert message.content == "Done."
    assert message.reasoning.endswith(f"{END} no")


def test_a_call_spelled_in_ordinary_characters_is_text(chat):
    text = f"{BEGIN}{one_call('{}')}{END}"
    ids = [chat.tokenizer.special.think_end, *chat.tokenizer.encode(text)]
    message = chat.parse_turn(ids, first_call_index=0, tools=TOOLS)
    assert (message.content, message.tool_calls) == (text, ())


def test_instant_mode_reads_content_from_the_start(tokenizer):
    message = read(ChatFormat(tokenizer, thinking=False), "Paris.<|im_end|>")
    assert (message.content, message.reasoning) == ("Paris.", "")


def test_written_turns_are_read_as_the_independent_parser_reads_them(chat, reference):
    for number in range(60):
        messages, tools = reference.random_dialogue(random.Random(f"parse/{number}"))
        for message in messages:
            if message.role != "assistant":
                continue
            ids = chat.render_turn(message)
            ours = chat.parse_turn(ids, first_call_index=0, tools=tools)
            assert (
                ours.content.strip(),
                ours.reasoning.strip(),
                [(call.name, json.loads(call.raw_arguments)) for call in ours.tool_calls],
            ) == reference.parsed_by_reference(chat.tokenizer, ids)


def check_any_turn(chat, ids, first):
    message = chat.parse_turn(ids, first_call_index=first, tools=TOOLS)
    assert message.role == "assistant"
    for index, call in enumerate(message.tool_calls, first):
        assert call.id == f"functions.{call.name}:{index}"
        assert (call.error is None) or not call.arguments
        assert (call.error is None) <= (call.name in {tool.name for tool in TOOLS})


@given(data=st.data(), thinking=st.booleans(), first=st.integers(0, 3))
@settings(max_examples=200)
def test_any_sequence_of_ids_is_a_message(tokenizer, data, thinking, first):
    special = tokenizer.special.tool_calls_section_begin
    structural = st.integers(special, special + 4) | st.just(tokenizer.special.think_end)
    any_id = st.integers(-2, tokenizer.num_tokens + 2)
    ids = data.draw(st.lists(structural | any_id, max_size=40))
    check_any_turn(ChatFormat(tokenizer, thinking=thinking), ids, first)


def test_any_damage_to_a_good_turn_gives_a_message(tokenizer, chat):
    good = f"r</think>c{BEGIN}{one_call(json.dumps({'query': 'x'})) * 2}{END}<|im_end|>"
    ids = sampled(tokenizer, good)
    rng = random.Random(0)
    for _ in range(500):
        damaged = list(ids)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(damaged))
            damaged[at : at + rng.randint(0, 2)] = rng.choices(ids, k=rng.randint(0, 2))
            damaged = damaged or list(ids)
        check_any_turn(chat, damaged, 0)
