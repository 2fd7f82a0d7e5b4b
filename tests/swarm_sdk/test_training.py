"""Episodes by the book become rows of the ledger's own ids; workers feed the trainer."""

from dataclasses import replace
from pathlib import Path

import anyio
import numpy as np
import pytest
from typer.testing import CliRunner

from swarm_sdk.atlas.teach import Mix, teacher, texts
from swarm_sdk.config import nano_directory
from swarm_sdk.model_backend.chat.template import ChatFormat
from swarm_sdk.model_backend.chat.tokenizer import Tokenizer
from swarm_sdk.traces.trajectory import branches
from swarm_sdk.training import app
from swarm_sdk.training.sft import RowStream, first_rows

QUESTIONS = Mix(wide=0.5, deep=0.5, compute=0.0, look=0.0)


def test_the_supervised_ids_are_the_ledgers_own() -> None:
    tokenizer = Tokenizer.from_dir(nano_directory())
    chat_format = ChatFormat(tokenizer, thinking=True)

    async def check() -> int:
        async with teacher(chat_format, 0, QUESTIONS) as teaching:
            number = 0
            async for question, ledger, episode_id in teaching.episodes():
                main = branches(ledger, episode_id)[0]
                said = [i for i, s in zip(main.token_ids, main.is_sampled, strict=True) if s]
                assert said[-1] == tokenizer.special.im_end
                assert question.answer.splitlines()[-1] in tokenizer.decode(said)
                assert not main.is_sampled[0]
                number += 1
                if number == 6:
                    return number
        return 0

    assert anyio.run(check) == 6


def test_who_is_taught_alone_is_offered_nothing_to_spawn_with() -> None:
    tokenizer = Tokenizer.from_dir(nano_directory())

    async def prompts(mix: Mix) -> list[tuple[int, str]]:
        found: list[tuple[int, str]] = []
        async with teacher(ChatFormat(tokenizer, thinking=True), 0, mix) as teaching:
            async for _, ledger, episode_id in teaching.episodes():
                main, *subs = branches(ledger, episode_id)
                found.append((len(subs), tokenizer.decode(main.token_ids)))
                if len(found) == 3:
                    break
        return found

    alone = anyio.run(prompts, replace(QUESTIONS, deep=0.0, alone=1.0))
    assert all(num_subs == 0 and "create_subagent" not in text for num_subs, text in alone)
    serial = anyio.run(prompts, replace(QUESTIONS, deep=0.0, serial=1.0))
    assert all(num_subs == 0 and "create_subagent" in text for num_subs, text in serial)


def test_rows_repeat_with_their_seed_and_differ_without() -> None:
    one, same, other = (first_rows(nano_directory(), 6, seed, QUESTIONS) for seed in (1, 1, 2))
    assert all(np.array_equal(a.ids, b.ids) for a, b in zip(one, same, strict=True))
    assert not all(np.array_equal(a.ids, b.ids) for a, b in zip(one, other, strict=True))


def test_the_vocabulary_is_trained_on_messages_calls_and_declarations() -> None:
    found = anyio.run(texts, 3, 0, QUESTIONS)
    assert any("namespace functions" in text for text in found)
    assert any('{"query": ' in text for text in found)


def test_workers_feed_rows_until_they_are_ended() -> None:
    with RowStream(nano_directory(), 1, 0, QUESTIONS) as stream:
        stream._reservoir.extend(first_rows(nano_directory(), 1, 0, QUESTIONS) * 5_000)
        rows = [row for row, _ in zip(stream, range(200), strict=False)]
        assert len(rows) == 200
        assert stream.counts()["fresh_rows"] + stream.counts()["reused_rows"] >= 200
    assert not any(process.is_alive() for process in stream._processes)


def test_training_on_cuda_without_a_device_is_refused(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a device")
    result = CliRunner().invoke(app, ["sft", "--out", str(tmp_path), "--device", "cuda"])
    assert result.exit_code == 2
    assert "there is no CUDA device" in result.stderr


def test_the_commands_explain_themselves() -> None:
    assert "episodes by the book" in CliRunner().invoke(app, ["sft", "--help"]).output
