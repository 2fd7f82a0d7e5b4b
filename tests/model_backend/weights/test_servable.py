"""What a server finds in a checkpoint folder of ours."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from swarm_sdk.config import nano_directory
from swarm_sdk.errors import ConfigError
from swarm_sdk.model_backend.chat.tokenizer import Tokenizer
from swarm_sdk.model_backend.model.config import nano
from swarm_sdk.model_backend.model.kimi import KimiModel
from swarm_sdk.model_backend.model.media import num_image_tokens, preprocess_image, preprocess_video
from swarm_sdk.model_backend.weights.checkpoint import load
from swarm_sdk.model_backend.weights.servable import save_checkpoint, servable

SIZES = [(150, 60), (28, 28), (1, 300), (2000, 1277), (7000, 40)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_dir(nano_directory())


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = KimiModel(nano())
    model.init_weights(seed=0)
    folder: Path = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(model, tokenizer, folder, torch.bfloat16, is_int4=True)
    return folder


@pytest.fixture(scope="module")
def processor(folder: Path) -> Any:
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(folder, trust_remote_code=True)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_a_saved_checkpoint_has_all_that_a_server_loads(folder: Path, tokenizer: Tokenizer) -> None:
    from transformers import AutoTokenizer

    text = "Kenya has 51,393,010 people."
    server_tokenizer = AutoTokenizer.from_pretrained(folder)
    assert server_tokenizer.encode(text) == tokenizer.encode(text)
    turn = server_tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert turn == "<|im_user|>user<|im_middle|>hi<|im_end|>"
    assert json.loads((folder / "config.json").read_text())["quantization_config"]
    assert load(folder).config == nano()
    assert servable(folder, folder / "unused") == folder
    assert not (folder / "unused").exists()


def test_the_processor_has_the_names_that_sglang_asks_for(processor: Any) -> None:
    assert type(processor).__name__ == "KimiK25Processor"
    assert processor.tokenizer.convert_tokens_to_ids("<|im_end|>") == nano().eos_token_id + 1
    assert processor.image_processor is processor.media_processor
    assert processor.media_processor.media_proc_cfg["patch_limit_on_one_side"] == 512


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_the_processor_cuts_pictures_as_our_model_does(
    processor: Any, width: int, height: int
) -> None:
    media = {"type": "image", "image": picture(width, height)}
    ours = preprocess_image(media["image"])
    assert processor.media_processor.media_tokens_calculator(media) == ours.num_tokens
    assert ours.num_tokens == num_image_tokens(width, height)
    inputs = processor(text=["<|media_pad|>" * ours.num_tokens], medias=[media])
    assert inputs["grid_thws"].tolist() == [list(ours.grid_thw)]
    assert inputs["input_ids"].tolist() == [[nano().media_placeholder_token_id] * ours.num_tokens]
    assert np.abs(inputs["pixel_values"].numpy() - ours.patches).max() <= 1e-6


def test_the_processor_cuts_chunks_of_video_as_our_model_does(processor: Any) -> None:
    frames = [picture(1300, 900, seed) for seed in range(7)]
    chunks = preprocess_video(frames, native_fps=2.0)
    medias = [
        {"type": "video_chunk", "video_chunk": frames[:4]},
        {"type": "video_chunk", "video_chunk": frames[4:]},
    ]
    tokens = [processor.media_processor.media_tokens_calculator(media) for media in medias]
    assert tokens == [chunk.item.num_tokens for chunk in chunks]
    inputs = processor(text=["x"], medias=medias)
    assert inputs["grid_thws"].tolist() == [list(chunk.item.grid_thw) for chunk in chunks]
    wanted = np.concatenate([chunk.item.patches for chunk in chunks])
    assert np.abs(inputs["pixel_values"].numpy() - wanted).max() <= 1e-6


def test_a_folder_without_processor_is_completed_elsewhere(tmp_path: Path) -> None:
    before = {file.name for file in nano_directory().iterdir()}
    made = servable(nano_directory(), tmp_path / "work")
    assert made == tmp_path / "work"
    assert {file.name for file in nano_directory().iterdir()} == before
    assert {"processor_config.json", "processing_kimi_k25.py"} <= {f.name for f in made.iterdir()}
    assert (made / "model.safetensors").samefile(nano_directory() / "model.safetensors")
    assert load(made).config == load(nano_directory()).config


def test_a_folder_with_only_our_tokenizer_gets_the_servers(
    folder: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    tokenizer.save(bare)
    made = servable(bare, tmp_path / "work")
    for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json"):
        assert (made / name).read_bytes() == (folder / name).read_bytes()
    (bare / "tiktoken.model").unlink()
    with pytest.raises(ConfigError, match=r"tiktoken.model cannot be read"):
        servable(bare, tmp_path / "other")


def test_what_the_folder_has_is_never_written_through_its_links(
    folder: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    tokenizer.save(mine)
    for name in ("tokenizer.json", "processing_kimi_k25.py"):
        (mine / name).write_text("mine")
    before = {file.name: file.read_bytes() for file in mine.iterdir()}
    made = servable(mine, tmp_path / "work")
    assert {file.name: file.read_bytes() for file in mine.iterdir()} == before
    for name in ("tokenizer.json", "processing_kimi_k25.py"):
        assert (made / name).read_bytes() == (folder / name).read_bytes()
    with pytest.raises(FileExistsError):
        servable(mine, tmp_path / "work")


def test_a_tokenizer_of_another_size_is_refused(
    tiny_model: KimiModel, tokenizer: Tokenizer
) -> None:
    with pytest.raises(ConfigError, match="4096 tokens and the weights have 512"):
        save_checkpoint(tiny_model, tokenizer, "nowhere")
    assert not Path("nowhere").exists()
