"""The embedded default, end to end: what was sampled is what training sees."""

import pytest
import torch

from swarm_sdk import Swarm
from swarm_sdk.config import nano_directory
from swarm_sdk.desk import atlas_corpus
from swarm_sdk.model_backend.model.mla import FullAttention
from swarm_sdk.model_backend.weights.checkpoint import load
from swarm_sdk.runtime.episode import Result
from swarm_sdk.tools.search import OpenTool, SearchTool
from swarm_sdk.traces.ledger import Ledger
from swarm_sdk.traces.trajectory import branches

TASK = "Give the capital and domain of these countries: Croatia, Benin, Bolivia, Peru and Burundi."


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> Result:
    corpus = atlas_corpus()
    swarm = Swarm(
        "nano",
        tools=[SearchTool(corpus), OpenTool(corpus)],
        runs=tmp_path_factory.mktemp("runs"),
    )
    return swarm.run_sync(TASK)


def test_nano_creates_subagents_by_itself_and_answers(answered: Result) -> None:
    assert answered.status == "done"
    assert answered.created
    assert len(answered.subagents) >= 4
    assert answered.critical_steps * 2 <= answered.total_steps
    assert "| Peru | Lima | .pe |" in answered.output


def test_later_turns_and_siblings_reuse_cached_prefixes(answered: Result) -> None:
    assert answered.usage.num_cached_tokens > 0.5 * answered.usage.num_prompt_tokens


def test_the_recorded_ids_scored_again_without_a_cache_have_the_recorded_logprobs(
    answered: Result,
) -> None:
    model = load(nano_directory(), dtype=torch.float32, device="cpu")
    ledger = Ledger(answered.trace.directory, readonly=True)
    found = branches(ledger, answered.episode_id)
    ledger.close()
    assert len(found) == len(answered.agents)
    for branch in found:
        ids_T = torch.tensor(branch.token_ids)
        with torch.inference_mode():
            attention = FullAttention(model.config.text_config, [len(ids_T)])
            hidden_TD = model(ids_T, torch.arange(len(ids_T)), attention)
            logprobs_TV = model.logits(hidden_TD).log_softmax(dim=-1)
        for place, is_sampled in enumerate(branch.is_sampled):
            if is_sampled:
                again = float(logprobs_TV[place - 1, branch.token_ids[place]])
                assert again == pytest.approx(branch.logprobs[place], abs=1e-3)
