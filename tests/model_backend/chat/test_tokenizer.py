import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm_sdk.errors import ConfigError
from swarm_sdk.model_backend.chat.tokenizer import SPECIAL_NAMES, SpecialIds, Tokenizer

LOOK_ALIKES = [*SPECIAL_NAMES.values(), "<|reserved_token_705|>"]


def test_special_ids_of_the_full_vocabulary_are_those_of_k25():
    special = SpecialIds.after(163_584)
    assert dataclasses.asdict(special) == {
        "bos": 163584, "eos": 163585, "im_end": 163586, "im_user": 163587, "im_assistant": 163588,
        "start_header": 163590, "end_header": 163591, "eot": 163593, "im_system": 163594,
        "tool_calls_section_begin": 163595, "tool_calls_section_end": 163596,
        "tool_call_begin": 163597, "tool_call_argument_begin": 163598, "tool_call_end": 163599,
        "im_middle": 163601, "media_begin": 163602, "media_content": 163603, "media_end": 163604,
        "media_pad": 163605, "think_begin": 163606, "think_end": 163607, "unk": 163838,
        "pad": 163839,
    }  # fmt: skip


def test_a_special_token_decodes_to_its_name_wherever_the_slots_begin(tokenizer):
    special = tokenizer.special
    assert tokenizer.num_tokens == tokenizer.num_base_tokens + 256
    assert tokenizer.decode([special.im_user, special.think_end]) == "<|im_user|></think>"
    reserved = tokenizer.num_base_tokens + 5
    assert tokenizer.decode([reserved]) == f"<|reserved_token_{reserved}|>"


@given(text=st.text(max_size=60))
def test_text_comes_back_from_its_ids(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(token_id < tokenizer.num_base_tokens for token_id in ids)


@given(parts=st.lists(st.sampled_from(LOOK_ALIKES) | st.text(max_size=5), max_size=8))
def test_text_that_spells_special_tokens_never_becomes_one(tokenizer, parts):
    text = "".join(parts)
    ids = tokenizer.encode(text)
    assert max(ids, default=0) < tokenizer.num_base_tokens
    assert tokenizer.decode(ids) == text


def test_a_lone_surrogate_is_encoded_as_the_replacement_character(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


def test_ids_outside_the_vocabulary_show_as_the_replacement_character(tokenizer):
    assert tokenizer.decode([-1, tokenizer.num_tokens]) == "\ufffd\ufffd"


def test_the_pieces_are_cut_as_k25_cuts_them():
    words = [
        "北京",
        "市",
        "北京市",
        "Hello",
        " World",
        "'s",
        "don",
        "don't",
        "123",
        "1234",
        " 12",
        "\n\n",
    ]
    every = {word[:cut].encode() for word in words for cut in range(2, len(word) + 1)}
    grown = {bytes([byte]) for byte in range(256)}
    for token in sorted(every, key=len):
        grown |= {token[:cut] for cut in range(1, len(token) + 1)}
    ranks = {token: rank for rank, token in enumerate(sorted(grown, key=lambda t: (len(t), t)))}
    tokenizer = Tokenizer(ranks)

    def pieces(text):
        return [tokenizer.decode([token_id]) for token_id in tokenizer.encode(text)]

    assert pieces("北京市Hello World") == ["北京市", "Hello", " World"]
    assert pieces("don't1234") == ["don't", "123", "4"]
    assert pieces("12 12") == ["12", " ", "12"]


def test_very_long_runs_are_encoded_and_come_back(tokenizer):
    text = "a" * 60_000 + " " * 60_000 + "b\n" * 200_000 + "<|im_end|>"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_saved_tokenizer_is_the_same_when_read(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new")
    read = Tokenizer.from_dir(tmp_path / "new")
    assert read.sha256 == tokenizer.sha256
    assert read.encode("Zoë's 123") == tokenizer.encode("Zoë's 123")


def test_another_vocabulary_has_another_identity(tokenizer, reference):
    assert reference.small_tokenizer(600).sha256 != tokenizer.sha256


def test_a_missing_file_is_a_config_error_that_names_it(tmp_path):
    with pytest.raises(ConfigError, match=r"tiktoken\.model cannot be read"):
        Tokenizer.from_dir(tmp_path)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data[: data.rindex(b" ")],
        lambda data: data.replace(b" 300\n", b" 5000\n"),
        lambda data: data.replace(b" 300\n", b" x\n"),
        lambda data: b"\x00\xff not a tokenizer",
        lambda data: b"",
    ],
)
def test_a_corrupt_file_is_a_config_error(tokenizer, tmp_path, spoil):
    tokenizer.save(tmp_path)
    path = tmp_path / "tiktoken.model"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ConfigError, match="corrupt"):
        Tokenizer.from_dir(tmp_path)
