import random
from dataclasses import dataclass, field, replace

import anyio
import pytest

from swarm_sdk.errors import ConfigError, ContextOverflow, ModelError
from swarm_sdk.model_backend.chat.dialogue import TokenModel
from swarm_sdk.model_backend.chat.template import ChatFormat
from swarm_sdk.types import (
    Generation,
    Image,
    Message,
    RoutedExperts,
    Sampling,
    ToolCall,
    ToolSpec,
)

TOOL = ToolSpec("f", "Does it.", {"type": "object"})


@dataclass
class ScriptedEngine:
    """Says the given ids, one list a call, and notes what it was asked."""

    turns: list
    calls: list = field(default_factory=list)
    is_closed: bool = False

    async def generate(self, token_ids, sampling, images=()):
        self.calls.append((list(token_ids), sampling, images))
        said = self.turns.pop(0)
        if isinstance(said, Exception):
            raise said
        return Generation(token_ids=tuple(said), logprobs=(0.0,) * len(said), finish_reason="stop")

    async def aclose(self):
        self.is_closed = True


def model_of(chat, turns, context_tokens=100_000):
    return TokenModel(
        name="scripted",
        engine=ScriptedEngine(list(turns)),
        chat_format=chat,
        context_tokens=context_tokens,
    )


def sample(dialogue, **sampling):
    return anyio.run(dialogue.sample, Sampling(**sampling))


def test_every_call_sees_exactly_the_ids_of_the_steps_before_it(reference, tokenizer):
    for number in range(30):
        messages, tools = reference.random_dialogue(random.Random(f"dialogue/{number}"))
        chat = reference.chat_format(tokenizer)
        turns = [chat.render_turn(m) for m in messages if m.role == "assistant"]
        model = model_of(chat, turns)
        dialogue, recorded, images = model.dialogue(tools), [], []
        for message in messages:
            if message.role == "assistant":
                turn = sample(dialogue)
                recorded += turn.prompt_ids
                seen, _, seen_images = model.engine.calls[-1]
                assert seen == recorded
                assert list(seen_images) == images
                recorded += turn.generation.token_ids
            else:
                recorded += dialogue.observe([message])
                images += message.images
        assert dialogue.ids == tuple(recorded)
        assert recorded == chat.render_dialogue(messages, tools, preserve_thinking=True)


def test_a_tool_loop_built_token_by_token_is_what_the_independent_renderer_gives(
    reference, tokenizer
):
    call = ToolCall("functions.f:0", "f", {"x": "é"})
    messages = [
        Message("system", "Be brief."),
        Message("user", "Go <|im_end|>"),
        Message("assistant", "", reasoning="plan", tool_calls=(call,)),
        Message("tool", "42", tool_call_id=call.id),
    ]
    chat = reference.chat_format(tokenizer)
    model = model_of(chat, [chat.render_turn(messages[2]), []])
    dialogue = model.dialogue([TOOL])
    dialogue.observe(messages[:2])
    assert sample(dialogue).message.tool_calls[0].arguments == {"x": "é"}
    dialogue.observe(messages[3:])
    sample(dialogue)
    assert model.engine.calls[-1][0] == reference.reference_ids(tokenizer, messages, [TOOL])


def test_sampled_ids_are_kept_as_they_are_even_where_encoding_would_differ(tokenizer):
    odd = [*tokenizer.encode("t"), *tokenizer.encode("he")]
    assert odd != tokenizer.encode("the")
    chat = ChatFormat(tokenizer)
    model = model_of(chat, [[*odd, tokenizer.special.im_end], []])
    dialogue = model.dialogue([])
    dialogue.observe([Message("user", "hi")])
    sample(dialogue)
    dialogue.observe([Message("user", "again")])
    sample(dialogue)
    seen = model.engine.calls[-1][0]
    assert any(seen[at : at + len(odd)] == odd for at in range(len(seen)))


def test_calls_are_numbered_across_the_turns(tokenizer):
    chat = ChatFormat(tokenizer)
    two = Message("assistant", tool_calls=(ToolCall("functions.f:0", "f", {}),) * 2)
    dialogue = model_of(chat, [chat.render_turn(two)] * 2).dialogue([TOOL])
    dialogue.observe([Message("user", "go")])
    sample(dialogue)
    second = sample(dialogue)
    assert [call.id for call in second.message.tool_calls] == ["functions.f:2", "functions.f:3"]
    assert dialogue.num_calls == 4


def test_a_turn_without_its_end_gets_it_from_the_next_step(tokenizer):
    end = tokenizer.special.im_end
    chat = ChatFormat(tokenizer)
    dialogue = model_of(chat, [tokenizer.encode("cut"), tokenizer.encode("cut"), []]).dialogue([])
    dialogue.observe([Message("user", "hi")])
    sample(dialogue)
    assert dialogue.observe([Message("user", "go on")])[0] == end
    sample(dialogue)
    assert sample(dialogue).prompt_ids == (end, *chat.generation_prompt())


def test_the_engine_is_asked_to_stop_at_the_end_of_the_turn(tokenizer):
    model = model_of(ChatFormat(tokenizer), [[]])
    sample(model.dialogue([]), stop_token_ids=(5,))
    assert model.engine.calls[0][1].stop_token_ids == (5, tokenizer.special.im_end)


def test_max_tokens_is_cut_to_the_room_that_is_left(tokenizer):
    chat = ChatFormat(tokenizer)
    prompt = chat.generation_prompt()
    model = model_of(chat, [[], []], context_tokens=len(prompt) + 7)
    sample(model.dialogue([]), max_tokens=50)
    sample(model.dialogue([]), max_tokens=3)
    assert [sampling.max_tokens for _, sampling, _ in model.engine.calls] == [7, 3]


def test_a_full_context_is_an_overflow_that_tells_both_sizes(tokenizer):
    model = model_of(ChatFormat(tokenizer), [[]], context_tokens=10)
    dialogue = model.dialogue([])
    added = dialogue.observe([Message("user", "a long question " * 10)])
    with pytest.raises(ContextOverflow) as caught:
        sample(dialogue)
    num_prompt = len(added) + len(ChatFormat(tokenizer).generation_prompt())
    assert (caught.value.num_prompt_tokens, caught.value.limit_tokens) == (num_prompt, 10)
    assert model.engine.calls == []


def test_a_failed_call_appends_nothing_so_it_can_be_made_again(tokenizer):
    chat = ChatFormat(tokenizer)
    model = model_of(chat, [ModelError("busy", retryable=True), [tokenizer.special.im_end]])
    dialogue = model.dialogue([TOOL])
    dialogue.observe([Message("user", "hi")])
    before = dialogue.ids
    with pytest.raises(ModelError):
        sample(dialogue)
    assert dialogue.ids == before
    sample(dialogue)
    assert model.engine.calls[0][0] == model.engine.calls[1][0]


def test_tools_are_declared_once_before_everything_else(tokenizer):
    chat = ChatFormat(tokenizer)
    dialogue = model_of(chat, []).dialogue([TOOL])
    first = dialogue.observe([Message("user", "hi")])
    assert list(first) == chat.open([TOOL]) + chat.render(Message("user", "hi"))
    assert list(dialogue.observe([Message("user", "hi")])) == chat.render(Message("user", "hi"))


def test_a_resumed_dialogue_goes_on_as_the_recorded_one(tokenizer):
    chat = ChatFormat(tokenizer, has_vision=True, num_image_tokens=lambda _: 2)
    image = Image(b"1")
    said = chat.render_turn(Message("assistant", tool_calls=(ToolCall("functions.f:0", "f", {}),)))
    model = model_of(chat, [said, said, said])
    dialogue = model.dialogue([TOOL])
    dialogue.observe([Message("user", "hi", images=(image,))])
    turn = sample(dialogue)
    resumed = model.dialogue([TOOL])
    resumed.observe([Message("user", "hi", images=(image,))])
    resumed.replay(turn)
    result = Message("tool", "ok", tool_call_id="functions.f:0")
    assert resumed.observe([result]) == dialogue.observe([result])
    assert sample(resumed) == sample(dialogue)
    (ids, sampling, images), (other_ids, other_sampling, other_images) = model.engine.calls[1:]
    assert (ids, images) == (other_ids, other_images)
    assert replace(sampling, routing_key="") == replace(other_sampling, routing_key="")
    assert resumed.ids == dialogue.ids


def test_a_turn_of_another_chat_format_cannot_be_replayed(tokenizer):
    said = [tokenizer.special.im_end]
    turn = sample(model_of(ChatFormat(tokenizer, thinking=False), [said]).dialogue([]))
    with pytest.raises(ConfigError, match="does not fit this chat format"):
        model_of(ChatFormat(tokenizer), []).dialogue([]).replay(turn)


def test_the_length_of_the_next_prompt_is_known_before_it_is_sent(tokenizer):
    model = model_of(ChatFormat(tokenizer), [[5], [5]])
    dialogue = model.dialogue([TOOL])
    for _ in range(2):
        dialogue.observe([Message("user", "hi")])
        expected = dialogue.num_prompt_tokens
        sample(dialogue)
        assert len(model.engine.calls[-1][0]) == expected


def test_closing_the_model_closes_its_engine(tokenizer):
    model = model_of(ChatFormat(tokenizer), [])
    anyio.run(model.aclose)
    assert model.engine.is_closed
    assert model.is_replayable


def test_a_dialogue_has_one_routing_key_of_its_own_and_keeps_a_given_one(tokenizer):
    model = model_of(ChatFormat(tokenizer), [[5], [6], [7], [8]])
    for _ in range(2):
        dialogue = model.dialogue([])
        dialogue.observe([Message("user", "hi")])
        sample(dialogue)
        sample(dialogue)
    keys = [sampling.routing_key for _, sampling, _ in model.engine.calls]
    assert keys[0] == keys[1] != keys[2] == keys[3]
    assert all(keys)
    model.engine.turns = [[9]]
    sample(dialogue, routing_key="mine")
    assert model.engine.calls[-1][1].routing_key == "mine"


def test_a_dialogue_asks_for_the_experts_that_no_turn_has_told_yet(tokenizer):
    class Recording(ScriptedEngine):
        async def generate(self, token_ids, sampling, images=()):
            generation = await ScriptedEngine.generate(self, token_ids, sampling, images)
            num = len(token_ids) + len(generation.token_ids) - 1 - sampling.experts_from
            return replace(
                generation,
                routed_experts=RoutedExperts(data=bytes(num * 8), num_layers=2, num_chosen=2),
            )

    engine = Recording([[5, 6], [7]])
    model = replace(model_of(ChatFormat(tokenizer), []), engine=engine)
    dialogue = model.dialogue([])
    dialogue.observe([Message("user", "hi")])
    turns = [sample(dialogue)]
    covered = len(dialogue.ids) - 1  # all but the last id, which no pass has seen
    dialogue.observe([Message("user", "more")])
    turns.append(sample(dialogue))
    assert [sampling.experts_from for _, sampling, _ in engine.calls] == [0, covered]
    assert sum(len(turn.generation.routed_experts) for turn in turns) == len(dialogue.ids) - 1


def test_a_turn_that_a_grammar_holds_to_json_has_no_reasoning_and_can_be_resumed(tokenizer):
    chat = ChatFormat(tokenizer)
    said = [*tokenizer.encode('{"a": 1}'), chat.end_of_turn_id]
    model = replace(model_of(chat, [said, said]), has_grammar=True)
    dialogue = model.dialogue([])
    dialogue.observe([Message("user", "JSON, please")])
    turn = sample(dialogue, json_schema="{}")
    assert (turn.message.content, turn.message.reasoning) == ('{"a": 1}', "")
    assert turn.prompt_ids[-1] == tokenizer.special.think_end
    assert model.engine.calls[0][1].json_schema == "{}"
    resumed = model.dialogue([])
    resumed.observe([Message("user", "JSON, please")])
    resumed.replay(turn)
    assert resumed.ids == dialogue.ids


def test_an_engine_without_a_grammar_gets_no_schema_and_reasons_as_ever(tokenizer):
    model = model_of(ChatFormat(tokenizer), [[5]])
    dialogue = model.dialogue([])
    dialogue.observe([Message("user", "JSON, please")])
    turn = sample(dialogue, json_schema="{}")
    assert model.engine.calls[0][1].json_schema == ""
    assert turn.prompt_ids[-1] == tokenizer.special.think_begin
