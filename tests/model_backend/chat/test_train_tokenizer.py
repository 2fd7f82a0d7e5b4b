import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm_sdk.errors import ConfigError
from swarm_sdk.model_backend.chat import train_tokenizer
from swarm_sdk.model_backend.chat.tokenizer import SPECIAL_NAMES, Tokenizer
from swarm_sdk.model_backend.chat.typescript import declare_tools

LICENSE = Path(__file__).parents[3] / "LICENSE"
TEXTS = ["the capital of France is Paris, 2102650 people. " * 5, LICENSE.read_text("utf-8")]
# Engines know different versions of Unicode: unassigned characters are left out.
TEXT = st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=60).filter(
    lambda text: not any(name in text for name in SPECIAL_NAMES.values())
)


@pytest.fixture(scope="module")
def exported(tokenizer, tmp_path_factory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("exported")
    train_tokenizer.export_tokenizer_json(tokenizer, folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "kimi_k25"}))
    return AutoTokenizer.from_pretrained(folder)


def test_training_twice_gives_the_same_tokenizer():
    first, second = (train_tokenizer.train(iter(TEXTS), 300) for _ in range(2))
    assert first.sha256 == second.sha256
    assert first.num_base_tokens == 300


def test_digits_are_encoded_one_by_one():
    tokenizer = train_tokenizer.train(TEXTS, 310)
    ids = tokenizer.encode("2102650")
    assert [tokenizer.decode([token_id]) for token_id in ids] == list("2102650")


def test_a_word_has_the_same_tokens_after_a_space_a_quote_or_a_bar():
    tokenizer = train_tokenizer.train(TEXTS, 400)
    words = {word for word in " ".join(TEXTS).split() if word.isalpha()}
    assert any(len(tokenizer.encode(word)) < len(word) for word in words)
    for word in words:
        for before in (" ", '"', "|"):
            assert tokenizer.encode(before + word) == [
                *tokenizer.encode(before),
                *tokenizer.encode(word),
            ]


def test_too_few_base_tokens_or_too_little_text_is_a_config_error():
    with pytest.raises(ConfigError, match="at least 256"):
        train_tokenizer.train(TEXTS, 100)
    with pytest.raises(ConfigError, match="give more text"):
        train_tokenizer.train(["ab"], 400)


@given(text=TEXT)
def test_the_exported_tokenizer_gives_our_ids(tokenizer, exported, text):
    assert exported.encode(text, add_special_tokens=False) == tokenizer.encode(text)


def test_the_exported_tokenizer_gives_our_ids_on_mixed_words(tokenizer, exported, reference):
    words = [word for word in reference.WORDS if word not in SPECIAL_NAMES.values()]
    rng = random.Random(1)
    for _ in range(200):
        text = "".join(rng.choice(words) for _ in range(30))
        assert exported.encode(text, add_special_tokens=False) == tokenizer.encode(text)


def test_the_exported_special_tokens_have_our_ids(tokenizer, exported):
    assert len(exported) == tokenizer.num_tokens
    for token_id, name in tokenizer.special_names.items():
        assert exported.convert_tokens_to_ids(name) == token_id
    assert exported.eos_token_id == tokenizer.special.eos


def test_markup_is_skipped_in_decoded_text_and_reasoning_marks_are_not(tokenizer, exported):
    special = tokenizer.special
    ids = [*tokenizer.encode("so"), special.think_end, *tokenizer.encode("yes"), special.im_end]
    assert exported.decode(ids, skip_special_tokens=True) == "so</think>yes"


def test_the_exported_chat_template_renders_generated_dialogues_as_we_do(
    tokenizer, exported, reference
):
    for number in range(60):
        rng = random.Random(f"template/{number}")
        messages, tools = reference.random_dialogue(rng)
        thinking, preserve_thinking = rng.random() < 0.7, rng.random() < 0.5
        chat = reference.chat_format(tokenizer, thinking=thinking)
        theirs = exported.apply_chat_template(
            [reference.to_chat_message(message) for message in messages],
            tools=[{"type": "function", "function": reference.to_chat_tool(t)} for t in tools],
            tools_ts_str=declare_tools(tools),
            tokenize=False,
            add_generation_prompt=True,
            thinking=thinking,
            preserve_thinking=preserve_thinking,
        )
        ours = chat.render_dialogue(
            messages, tools, preserve_thinking=preserve_thinking, add_generation_prompt=True
        )
        assert tokenizer.decode(ours) == theirs


def test_the_folder_of_a_tokenizer_can_hold_both_forms(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    train_tokenizer.export_tokenizer_json(tokenizer, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "tiktoken.model",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert Tokenizer.from_dir(tmp_path).sha256 == tokenizer.sha256
