"""PARL: the recorded episodes train the orchestrator (K2.5 report, section 3; eq. (1)).

    questions ─> K episodes each ─> ledger ─> rewards, advantages, ids ─> updates ─> weights ─┐
        ▲          orchestrator: the policy's engine (in this process, or SGLang servers)     │
        │          sub-agents:   an engine of their own that never receives weights           │
        └───────────────────────── the policy's engine, version + 1 <─────────────────────────┘

``Parl.step`` is one turn of that wheel, in the order in which it is drawn. What trains is read from
the ledger by ``BatchReader``, live as in a replay, so both give the same gradient. Under torchrun
the first process does all this, and tells the others (``follow``) which episodes to update on.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import torch
from anyio.abc import TaskGroup

from swarm_sdk.atlas.environments import (
    AtlasEnvironment,
    BulkDownload,
    DeepSearch,
    Difficulty,
    Documents,
    DrawnEnvironment,
    LongDocuments,
    WideSearch,
)
from swarm_sdk.config import check_model_string, nano_directory, servers_and_directory
from swarm_sdk.errors import ConfigError, LedgerError, NotTrainable
from swarm_sdk.model_backend.chat.dialogue import TokenModel
from swarm_sdk.model_backend.embedded import open_embedded
from swarm_sdk.model_backend.engine.engine import EmbeddedEngine
from swarm_sdk.model_backend.model.kimi import KimiModel
from swarm_sdk.model_backend.sglang_client import open_sglang
from swarm_sdk.model_backend.sglang_weights import SglangWeights
from swarm_sdk.model_backend.weight_sink import WeightSink
from swarm_sdk.model_backend.weights.checkpoint import load
from swarm_sdk.model_backend.weights.servable import save_checkpoint
from swarm_sdk.runtime.budget import Budget
from swarm_sdk.runtime.environment import EnvTask
from swarm_sdk.runtime.rollouts import RolloutManager
from swarm_sdk.runtime.tool_calls import first_of
from swarm_sdk.swarm import Swarm
from swarm_sdk.traces.drift import count_drift
from swarm_sdk.traces.ledger import EpisodeRecord, Ledger
from swarm_sdk.traces.parl.batch import Batch, BatchReader
from swarm_sdk.traces.parl.distributed import ALONE, Team
from swarm_sdk.traces.parl.learner import Learner, mean_figures
from swarm_sdk.traces.parl.toggle import Toggle
from swarm_sdk.training.journal import METRICS, Journal
from swarm_sdk.training.settings import ParlConfig
from swarm_sdk.types import Sampling

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SERVERS = "sglang:"
BALANCE_S = 0.2
"""How often the engines' places are shared out anew."""


class Parl:
    """One training run; ``async with Parl.open(config, run) as parl: await parl.train()``."""

    def __init__(self, config: ParlConfig, run: Path, team: Team = ALONE) -> None:
        """Load the policy for its engine and, sharded over the ``team``, for its updates."""
        self.config: ParlConfig = config
        self.journal: Journal = Journal(run)
        self.ledger: Ledger = Ledger(run / "runs")
        start = checkpoint_directory(config.start)
        self.learner: Learner = Learner(
            load(start, dtype=torch.float32, device=config.device), config.learner(), team
        )
        self.team: Team = team
        self.policy: TokenModel = self._open(config.sampler or config.start)
        self.sink: WeightSink = self._sink()
        """Where new weights go."""
        self.frozen: TokenModel | None = None
        self.reader: BatchReader = batch_reader(config, self.policy)
        self.environment: DrawnEnvironment = make_environment(config)
        self.iteration: int = 0
        self.version: int = 0
        """Of the policy's weights; the engine's is the same but while they are published."""
        self._start = start
        self._tasks: TaskGroup | None = None
        self._swarm: Swarm | None = None
        self._rollouts: RolloutManager | None = None
        self._next_question = 0
        self._open_questions: dict[int, dict[int, str | None]] = {}
        """Number of a question -> sample -> its episode, ``None`` while it runs."""
        self._to_begin: list[int] = []
        """Questions that an earlier process had begun and not trained on."""
        self._has_news = anyio.Event()
        self._num_failed: Counter[str] = Counter()

    @classmethod
    @asynccontextmanager
    async def open(cls, config: ParlConfig, run: Path, team: Team = ALONE) -> AsyncIterator[Parl]:
        """A run in the directory ``run``: a new one, or the one there from its last checkpoint.

        Raises:
            ConfigError: a checkpoint or the device is missing, or the run there has other settings.
        """
        check_machine(config)
        make_environment(config)
        config.check_run(run)
        if config.replay_routing and team.size > 1:
            raise ConfigError("routing is replayed by one process only; leave replay_routing off")
        parl = cls(config, run, team)
        try:
            async with anyio.create_task_group() as tasks:
                parl._tasks = tasks
                await parl._resume()
                yield parl
                team.share(("end",))
                tasks.cancel_scope.cancel()
        except BaseExceptionGroup as failures:
            raise first_of(failures) from failures
        finally:
            with anyio.CancelScope(shield=True):
                await parl._close()

    async def train(self) -> None:
        """Step until the settings' end; the policy lies in ``RUN/model`` then."""
        started_s = time.perf_counter()
        while self.iteration < self.config.steps:
            if time.perf_counter() - started_s > self.config.max_seconds:
                break
            figures = await self.step()
            say(self.iteration, self.config.steps, figures)
        self._checkpoint()
        tokenizer = self.policy.chat_format.tokenizer
        network = self._served() or self._gathered()
        save_checkpoint(network, tokenizer, self.journal.run / "model", torch.bfloat16)

    async def step(self) -> dict[str, Any]:
        """One iteration; returns its figures."""
        clock = Clock()
        groups = await self.roll_out()  # K episodes of each question, by the policy as it is
        clock.lap("rollout_s")
        self.team.share(("update", self.iteration, [[e.id for e in group] for group in groups]))
        batch = self.reader.read(self.ledger, groups, self.iteration)  # rewards, advantages, ids
        routing = self._routing_disagreement(batch)  # while both have the same weights
        updates = [
            self.learner.update(
                part,
                version=self.version if number == 0 else None,
                replayed=self._served() if self.config.replay_routing else None,
            )
            for number, part in enumerate(batch.split(self.config.updates))
        ]
        clock.lap("train_s")
        await self.publish()  # weights into the engine, version + 1
        clock.lap("publish_s")
        self.iteration += 1
        if self.iteration % self.config.save_every == 0:
            self._checkpoint()
        return self._report(groups, batch, [*updates, routing], clock)

    # -- rollouts --------------------------------------------------------------------------------

    async def roll_out(self) -> list[list[EpisodeRecord]]:
        """The groups of this iteration, complete; those of a run that was killed are on record."""
        recorded = self.journal.batches.get(self.iteration)
        if recorded is None:
            chosen = await self._collect()
            self.journal.write_batch(
                self.iteration, chosen, self._next_question, sorted(self._open_questions)
            )
        else:
            chosen = recorded["groups"]
            self._next_question = recorded["next_question"]
            self._to_begin = recorded["open_questions"]
        return records_of(self.ledger, chosen)

    async def _collect(self) -> list[list[str]]:
        """Start what is missing, wait for enough complete groups, take them."""
        config, must_wait = self.config, await self._change_subagents()
        rollouts = self._rollouts
        assert rollouts is not None
        rollouts.resume()
        for number in self._to_begin:
            self._begin(number)
        self._to_begin = []
        num_begun = config.questions + (0 if must_wait else config.ahead)
        while len(self._open_questions) < num_begun:
            self._begin(self._next_question)
            self._next_question += 1
        async with anyio.create_task_group() as balancing:
            balancing.start_soon(self._balance, name="engine places")
            while len(self._complete_questions()) < config.questions:
                self._has_news = anyio.Event()
                await self._has_news.wait()
            balancing.cancel_scope.cancel()
        await rollouts.pause()
        done = self._complete_questions()
        chosen = [self._open_questions.pop(number) for number in done[: config.questions]]
        return [[e for _, e in sorted(group.items()) if e] for group in chosen]

    def _begin(self, number: int) -> None:
        """Start the episodes of a question that are not on record."""
        task = self.environment.draw(number)
        group: dict[int, str | None] = dict.fromkeys(range(self.config.samples))
        self._open_questions[number] = group
        known = self._recorded.get(task.id, {})
        for sample in group:
            if sample in known:
                group[sample] = known[sample]
            else:
                assert self._tasks is not None, "the run is not open"
                self._tasks.start_soon(self._run, task, number, sample, name=f"{task.id}.{sample}")

    async def _run(self, task: EnvTask, number: int, sample: int) -> None:
        assert self._rollouts is not None, "nothing is rolled out yet"
        rollout = await self._rollouts.rollout(self.environment, task, sample)
        if rollout.result is None or rollout.error is not None:
            self._num_failed[(rollout.error or "").partition(":")[0]] += 1
        group = self._open_questions[number]
        group[sample] = rollout.result.episode_id if rollout.result is not None else ""
        self._has_news.set()

    def _complete_questions(self) -> list[int]:
        return sorted(
            number
            for number, group in self._open_questions.items()
            if all(episode is not None for episode in group.values())
        )

    async def _change_subagents(self) -> bool:
        """Take the sub-agents that the curriculum has for this iteration; whether that must wait.

        It waits until nothing of the old ones runs, and no question is begun ahead meanwhile.
        """
        config = self.config
        wanted = config.subagents_at(self.iteration)
        if self._swarm is not None:
            if self.frozen is None or self.frozen.name == wanted:
                return False
            if self._open_questions:
                return True
            await self._swarm.aclose()
            await self.frozen.aclose()
        if not config.train_subagents:
            self.frozen = self._open(wanted, wanted, is_frozen=True)
        self._swarm = Swarm(
            self.policy,
            subagent_model=self.frozen,
            budget=Budget(
                critical_steps=config.critical_steps,
                main_steps=config.main_steps,
                sub_steps=config.sub_steps,
                tokens=config.episode_tokens,
            ),
            sampling=Sampling(temperature=config.temperature, max_tokens=config.max_tokens),
            seed=config.seed,
            runs=self.journal.run / "runs",
        )
        self._rollouts = self._swarm.rollouts(max_episodes=config.max_episodes)
        return False

    async def _balance(self) -> None:
        """Share the places out by the requests that each engine has, running or waiting."""
        models = [model for model in (self.policy, self.frozen) if model is not None]
        engines = [one.engine for one in models if isinstance(one.engine, EmbeddedEngine)]
        while len(engines) == 2:
            loads = [engine.num_requests + 1 for engine in engines]
            share = round(self.config.max_running * loads[0] / sum(loads))
            places = min(max(share, 1), self.config.max_running - 1)
            engines[0].max_running = places
            engines[1].max_running = self.config.max_running - places
            await anyio.sleep(BALANCE_S)

    # -- weights ---------------------------------------------------------------------------------

    async def publish(self) -> None:
        """Copy the policy's weights into its engine; the version goes up by one."""
        self.version += 1
        self.team.share(("weights",))
        await self.sink.update_weights(self.learner.weights(), self.version)

    def _served(self) -> KimiModel | None:
        """The network that sampled: until ``publish``, with the weights that it sampled with.

        ``None`` where servers sample.
        """
        engine = self.policy.engine
        return engine.model if isinstance(engine, EmbeddedEngine) else None

    def _gathered(self) -> KimiModel:
        """The policy's network as one, with the weights of the last update."""
        self.team.share(("weights",))
        network = load(checkpoint_directory(self.config.start), dtype=torch.float32)
        network.load_state_dict(self.learner.weights(), strict=False)
        return network

    def _routing_disagreement(self, batch: Batch) -> dict[str, float]:
        served = self._served()
        if served is None or self.team.size > 1:
            return {}  # a pass of one process alone would leave the others waiting
        share = self.learner.routing_disagreement(served, batch)
        return {} if share is None else {"routing_disagreement": share}

    def _open(self, source: str, name: str = "policy", *, is_frozen: bool = False) -> TokenModel:
        """``nano``, a checkpoint directory, or servers (``sglang:URL1,URL2#DIRECTORY``)."""
        config = self.config
        if source.startswith(SERVERS):
            urls, directory = servers_of(source, config.start)
            records = config.replay_routing and not is_frozen
            return open_sglang(urls, directory, records_experts=records, name=name)
        return open_embedded(
            checkpoint_directory(source),
            device=config.device,
            dtype=DTYPES[config.dtype],
            max_running=config.max_running,
            name=name,
            is_frozen=is_frozen,
        )

    def _sink(self) -> WeightSink:
        engine, config = self.policy.engine, self.config
        if isinstance(engine, EmbeddedEngine):
            return engine
        urls, _ = servers_of(config.sampler, config.start)
        trained = [name for name, one in self.learner.model.named_parameters() if one.requires_grad]
        shape = self.learner.model.config
        return SglangWeights(urls, shape, parameters=trained, dtype=DTYPES[config.dtype])

    # -- the record ------------------------------------------------------------------------------

    async def _resume(self) -> None:
        """Go on from the last checkpoint, if there is one."""
        journal = self.journal
        if isinstance(self.sink, SglangWeights):
            await self._check_dtype(self.sink)
        self._recorded = _recorded_episodes(self.ledger, self.environment.name)
        self.config.save(journal.run)
        done = journal.last_checkpoint()
        if done is None:
            if self._served() is None:  # servers may hold what an earlier run left
                self.version -= 1
                await self.publish()
            return
        self.team.share(("load", done))
        state = journal.load(done, self.learner.state_dict(), self.team)
        self.iteration = done
        self.version = state["version"]
        self._next_question = state["next_question"]
        self.learner.num_updates = state["num_updates"]
        if self.reader.toggle is not None:
            self.reader.toggle.load_state_dict(state["toggle"])
        self._to_begin = state["open_questions"]
        self.version -= 1
        await self.publish()

    async def _check_dtype(self, servers: SglangWeights) -> None:
        """What is sampled in one precision must not be scored in another."""
        for dtype in await servers.dtypes():
            if dtype != DTYPES[self.config.dtype]:
                served = str(dtype).removeprefix("torch.")
                raise ConfigError(
                    f"the sampler serves {served} and dtype is {self.config.dtype}: give --set "
                    f"dtype={served}, or start it with --dtype {self.config.dtype}"
                )

    def _checkpoint(self) -> None:
        toggle = self.reader.toggle
        state = {
            "version": self.version,
            "next_question": self._next_question,
            "open_questions": sorted([*self._open_questions, *self._to_begin]),
            "num_updates": self.learner.num_updates,
            "toggle": {} if toggle is None else toggle.state_dict(),
        }
        self.team.share(("save", self.iteration))
        self.journal.save(self.iteration, self.learner.state_dict(), state, self.team)

    def _report(
        self,
        groups: Sequence[Sequence[EpisodeRecord]],
        batch: Batch,
        updates: Sequence[dict[str, float]],
        clock: Clock,
    ) -> dict[str, Any]:
        reward, iteration = self.config.reward(), self.iteration - 1
        figures: dict[str, Any] = {
            **batch.figures,
            **mean_figures(updates),
            **clock.laps,
            "publish_ms": clock.laps["publish_s"] * 1e3,
            "version": self.version,
            "lambda1": reward.parallel.at(iteration),
            "lambda2": reward.finish.at(iteration),
            "tokens": batch.num_tokens,
            "staleness": self.version - 1 - _oldest_version(batch, self.version - 1),
            **_left_out(batch),
            "failed": dict(self._num_failed),
            "drift": dict(drift_of(self.ledger, groups, self.policy)),
        }
        self._num_failed.clear()
        self.journal.write_metrics(iteration, figures)
        return figures

    async def _close(self) -> None:
        for model in (self.policy, self.frozen):
            if model is not None:
                await model.aclose()
        if isinstance(self.sink, SglangWeights):
            await self.sink.aclose()
        if self._swarm is not None:
            await self._swarm.aclose()
        self.ledger.close()
        self.journal.close()


def follow(config: ParlConfig, run: Path, team: Team) -> None:
    """What the other processes of a team do: what the first one tells, until it ends.

    Raises:
        ConfigError: as ``Parl.open``.
    """
    check_machine(config)
    start = checkpoint_directory(config.start)
    model = load(start, dtype=torch.float32, device=config.device)
    learner, journal = Learner(model, config.learner(), team), Journal(run)
    reader = batch_reader(config, open_embedded(start))
    ledger: Ledger | None = None
    while True:
        match team.share(None):
            case ("update", iteration, groups):
                ledger = ledger or Ledger(run / "runs", readonly=True)
                batch = reader.read(ledger, records_of(ledger, groups), iteration)
                for part in batch.split(config.updates):
                    learner.update(part)
            case ("weights",):
                learner.weights()
            case ("save", done):
                journal.save(done, learner.state_dict(), {}, team)
            case ("load", done):
                state = journal.load(done, learner.state_dict(), team)
                learner.num_updates = state["num_updates"]
                if reader.toggle is not None:
                    reader.toggle.load_state_dict(state["toggle"])
            case _:
                return


def records_of(ledger: Ledger, groups: Sequence[Sequence[str]]) -> list[list[EpisodeRecord]]:
    """The episodes of groups of ids.

    Raises:
        LedgerError: one of them is not on record.
    """
    ids = [episode_id for group in groups for episode_id in group]
    by_id = {record.id: record for record in ledger.episodes(ids)}
    missing = [episode_id for episode_id in ids if episode_id not in by_id]
    if missing:
        raise LedgerError(
            f"a batch names the episode {missing[0]} and the ledger does not hold it, nor "
            f"{len(missing) - 1} others; the run's files are not of one run"
        )
    return [[by_id[episode_id] for episode_id in group] for group in groups]


def check_machine(config: ParlConfig) -> None:
    """Whether the device is there.

    Raises:
        ConfigError: it is not.
    """
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError("there is no CUDA device; use --device cpu")


class Clock:
    """Seconds of the parts of an iteration."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last_s = time.perf_counter()

    def lap(self, name: str) -> None:
        """End a part."""
        now_s = time.perf_counter()
        self.laps[name] = now_s - self._last_s
        self._last_s = now_s


def checkpoint_directory(name: str) -> Path:
    """``nano``, or a directory.

    Raises:
        ConfigError: there is no such directory.
    """
    directory = nano_directory() if name == "nano" else Path(name)
    if not directory.is_dir():
        raise ConfigError(f"there is no checkpoint directory '{directory}'; check the path")
    return directory


def servers_of(source: str, default: str) -> tuple[list[str], Path]:
    """Addresses of servers, and the directory of the tokenizer of the model that they serve.

    Raises:
        ConfigError: it names none, or there is no such directory.
    """
    _, target = check_model_string(source)
    urls, directory = servers_and_directory(target)
    return urls, checkpoint_directory(directory or default)


def make_environment(config: ParlConfig) -> DrawnEnvironment:
    """The environment of that name.

    Raises:
        ConfigError: there is none that draws tasks by number.
    """
    difficulty = Difficulty(
        min_entities=config.min_entities,
        max_entities=config.max_entities,
        alone=config.alone,
        alone_steps=config.main_steps,
    )
    if config.documents:
        return Documents(Path(config.documents), config.seed, difficulty)
    kinds: tuple[type[AtlasEnvironment | BulkDownload], ...] = (
        WideSearch,
        DeepSearch,
        LongDocuments,
        BulkDownload,
    )
    for kind in kinds:
        if config.environment == kind.name:
            return kind(config.seed, difficulty)
    raise ConfigError(f"there is no environment '{config.environment}' to draw questions from")


def batch_reader(config: ParlConfig, policy: TokenModel) -> BatchReader:
    """Rewards, Toggle, and the check that the policy's tokenizer made the ids."""
    chat_format = policy.chat_format

    def check(ledger: Ledger, record: EpisodeRecord) -> None:
        drift = count_drift(
            ledger, record.id, chat_format, chat_format.tokenizer.decode, max_turns=1
        )
        if drift["tokenizer"]:
            raise NotTrainable(
                "foreign_tokens",
                f"episode {record.id} was recorded with another tokenizer or chat format than the "
                "policy's; train it with the one that recorded it",
            )

    return BatchReader(
        reward=config.reward(),
        toggle=Toggle(period=config.toggle_period) if config.toggle else None,
        vocab_size=chat_format.tokenizer.num_tokens,
        train_subagents=config.train_subagents,
        keeps_experts=config.replay_routing,
        needs_experts=config.replay_routing and bool(config.sampler),
        check=check,
    )


def drift_of(
    ledger: Ledger, groups: Sequence[Sequence[EpisodeRecord]], policy: TokenModel
) -> Counter[str]:
    """Turns of one episode a group by the cause of their drift: the format is the same for all."""
    counts: Counter[str] = Counter()
    chat_format = policy.chat_format
    for group in groups:
        for record in group[:1]:
            counts += count_drift(ledger, record.id, chat_format, chat_format.tokenizer.decode)
    return counts


def _recorded_episodes(ledger: Ledger, environment: str) -> dict[str, dict[int, str]]:
    """Task -> sample -> the episode of it that ended and was judged."""
    found: dict[str, dict[int, str]] = {}
    for record in ledger.episodes():
        launch = record.settings.get("launch", {})
        if launch.get("environment") == environment and "rewards" in (record.summary or {}):
            found.setdefault(launch["task"], {})[launch["sample"]] = record.id
    return found


def _left_out(batch: Batch) -> dict[str, dict[str, Any]]:
    """What a batch left out, counted and said; the sentences go to the terminal too."""
    for sentence in batch.sentences.values():
        sys.stderr.write(f"left out: {sentence}\n")
    return {"left_out": dict(batch.left_out), "sentences": dict(batch.sentences)}


def _oldest_version(batch: Batch, newest: int) -> int:
    oldest = [int(s.versions_S[s.versions_S >= 0].min()) for s in batch.samples]
    return min(oldest, default=newest)


def say(iteration: int, steps: int, figures: dict[str, Any]) -> None:
    """One line for the terminal."""

    def number(key: str, form: str) -> str:
        return format(figures[key], form) if key in figures else "-"

    sys.stderr.write(
        f"{iteration}/{steps}  reward {number('reward', '.3f')}  perf {number('r_perf', '.3f')}  "
        f"width {number('width', '.2f')}  critical {number('critical_steps', '.2f')}  "
        f"loss {number('loss', '+.4f')}  kl {number('kl', '.2e')}  "
        f"|Δlogp| {number('engine_trainer_mean_abs_dlogprob', '.1e')}  "
        f"rollout {number('rollout_s', '.1f')} s  train {number('train_s', '.1f')} s  "
        f"publish {number('publish_ms', '.0f')} ms\n"
    )
    sys.stderr.flush()


def replay(config: ParlConfig, source: Path, run: Path) -> list[dict[str, Any]]:
    """Train on the episodes of earlier runs; nothing is asked of a model. Returns the figures.

    ``source`` is a training run (its own batches are trained in their order) or a run directory
    of judged episodes (grouped by task, ``config.questions`` a batch). What it holds beyond
    ``config.steps`` batches, or outside of tasks, is counted with the last one.

    Raises:
        ConfigError: ``run`` holds a run already.
        LedgerError: the source cannot be read, or holds nothing to train on.
    """
    if (run / METRICS).exists():
        raise ConfigError(f"'{run}' holds a run already; choose another directory")
    has_batches = (source / "runs").is_dir()
    ledger = Ledger(source / "runs" if has_batches else source, readonly=True)
    start = checkpoint_directory(config.start)
    learner = Learner(load(start, dtype=torch.float32, device=config.device), config.learner())
    policy = open_embedded(start, device=config.device, dtype=DTYPES[config.dtype])
    assert isinstance(policy.engine, EmbeddedEngine)
    served = policy.engine.model  # with the weights that sampled: one iteration behind the learner
    reader = batch_reader(config, policy)
    told: list[dict[str, Any]] = []
    batches = _batches_of(source) if has_batches else _groups_of(ledger, config.questions)
    if not batches:
        raise LedgerError(f"'{source}' holds no episodes of an environment to train on")
    journal = Journal(run)
    config.save(run)
    num_steps = min(len(batches), config.steps)
    for iteration, groups in enumerate(batches[:num_steps]):
        records = records_of(ledger, groups)
        batch = reader.read(ledger, records, iteration)
        if iteration == num_steps - 1:
            _leave_out_the_rest(batch, batches[num_steps:], ledger, is_run=has_batches)
        replayed = served if config.replay_routing else None
        updates = [learner.update(part, replayed=replayed) for part in batch.split(config.updates)]
        if config.replay_routing:
            served.load_state_dict(learner.weights(), strict=False)
        figures = {
            **batch.figures,
            **mean_figures(updates),
            **_left_out(batch),
            "drift": dict(drift_of(ledger, records, policy)),
        }
        journal.write_metrics(iteration, figures)
        say(iteration + 1, num_steps, figures)
        told.append(figures)
    tokenizer = policy.chat_format.tokenizer
    save_checkpoint(learner.model, tokenizer, run / "model", torch.bfloat16)
    ledger.close()
    journal.close()
    return told


def _leave_out_the_rest(
    batch: Batch, batches: Sequence[Sequence[Sequence[str]]], ledger: Ledger, *, is_run: bool
) -> None:
    """Count what a source holds that no batch of a replay reads."""
    rest = [episode for groups in batches for group in groups for episode in group]
    if rest:
        sentence = (
            f"episode {rest[0]} and others of {len(batches)} more batches come after the last "
            "step; replay them too with --set steps=N"
        )
        batch.leave_out("after_the_last_step", sentence, len(rest))
    alone = [r.id for r in ledger.episodes() if "task" not in r.settings.get("launch", {})]
    if alone and not is_run:
        sentence = (
            f"episode {alone[0]} belongs to no task of an environment: there is nothing to compare "
            "it with; run what is to train through swarm.rollouts()"
        )
        batch.leave_out("no_task", sentence, len(alone))


def _batches_of(source: Path) -> list[list[list[str]]]:
    journal = Journal(source)
    return [journal.batches[iteration]["groups"] for iteration in sorted(journal.batches)]


def _groups_of(ledger: Ledger, questions: int) -> list[list[list[str]]]:
    groups: dict[tuple[str, str], list[str]] = {}
    for record in ledger.episodes():
        launch = record.settings.get("launch", {})
        if "task" in launch:
            groups.setdefault((launch["environment"], launch["task"]), []).append(record.id)
    found = list(groups.values())
    return [found[at : at + questions] for at in range(0, len(found), questions)]
