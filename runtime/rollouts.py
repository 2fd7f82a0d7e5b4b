"""The rollout manager: episodes of environments by the thousand, within bounds.

    tasks ─> place (max_episodes) ─> toolset ─> episode ─> judge ─> Rollout
                                        ▲           │ gate: pause between two turns
                                        └───────────┴─ sub-rollouts of tools and judges: no place
                                                        of their own, their parent's waits for them

Paused episodes stay where they are between two turns; when they go on, further turns carry the
policy version of the weights that sample them: a partial rollout (report, appendix D; Kimi K2,
section 3.3).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import anyio
from opentelemetry import trace

from swarm_sdk.errors import ConfigError, LedgerError
from swarm_sdk.runtime.environment import Environment, EnvTask, Rollout
from swarm_sdk.runtime.episode import EpisodeSettings, Result, check_names, run_episode
from swarm_sdk.runtime.state import Gate, seed_of
from swarm_sdk.runtime.streaming import stream
from swarm_sdk.runtime.tool_calls import first_of
from swarm_sdk.traces.ledger import Ledger

_is_inside: ContextVar[bool] = ContextVar("swarm_sdk_rollout", default=False)
"""Whether the code that runs belongs to a rollout that holds a place already."""


def _seed(seed: int, environment: str, task: str, sample: int) -> int:
    """A seed of its own for each episode, the same in every run."""
    return seed_of(f"{seed}/{environment}/{task}/{sample}")


class RolloutManager:
    """Runs episodes of environments with bounds on what they hold together.

    Args:
        settings: how episodes are run (``Swarm.settings()``); all share its gate.
        ledger: where they are recorded.
        tracer: where spans go.
        max_episodes: episodes alive at one time; more wait. Each holds its toolset (sandboxes),
            its agents' contexts and at most ``max_parallel`` agents.
    """

    def __init__(
        self,
        settings: EpisodeSettings,
        ledger: Ledger,
        tracer: trace.Tracer,
        *,
        max_episodes: int = 256,
    ) -> None:
        """Keep what rollouts need; nothing is started.

        Raises:
            ConfigError: ``max_episodes`` is below 1.
        """
        if max_episodes < 1:
            raise ConfigError(f"max_episodes must be at least 1, got {max_episodes}")
        self.gate: Gate = settings.gate
        self._settings = settings
        self._ledger = ledger
        self._tracer = tracer
        self._places = anyio.CapacityLimiter(max_episodes)
        self._scopes: list[tuple[str, str, int, anyio.CancelScope]] = []
        """Of each episode that runs: environment, task, sample."""

    @property
    def num_running(self) -> int:
        """Episodes alive now, sub-rollouts not counted."""
        return self._places.borrowed_tokens

    async def pause(self) -> None:
        """Stop all episodes between two turns; returns when no model call runs any more."""
        await self.gate.close()

    def resume(self) -> None:
        """Let paused episodes go on."""
        self.gate.open()

    def abort(self, task_id: str, sample: int = 0, *, environment: str | None = None) -> None:
        """Cancel an episode that runs; its record stays and can be resumed.

        ``environment`` tells tasks of one id apart; ``None`` means them all.
        """
        for name, task, number, scope in self._scopes:
            if (task, number) == (task_id, sample) and environment in (None, name):
                scope.cancel()

    async def rollout(self, environment: Environment, task: EnvTask, sample: int = 0) -> Rollout:
        """Run one episode of a task and judge it.

        Called from inside a rollout (a tool, a judge) it is a sub-rollout: it runs in its parent's
        place, so that parents never wait for a place that their children need.

        Raises:
            LedgerError: the record cannot be written.
        """
        if _is_inside.get():
            return await self._run(environment, task, sample)
        async with self._places:
            token = _is_inside.set(True)
            try:
                return await self._run(environment, task, sample)
            finally:
                _is_inside.reset(token)

    async def run(
        self,
        environment: Environment,
        tasks: Iterable[EnvTask] | None = None,
        *,
        samples_per_task: int = 1,
    ) -> AsyncIterator[Rollout]:
        """Yield a rollout for each sample of each task, as they end.

        ``tasks`` are the environment's own unless given. Tasks are taken from the iterable only as
        places come free, so it may be endless. Leaving the iterator cancels what runs.

        Raises:
            ConfigError: ``samples_per_task`` is below 1.
            LedgerError: the record cannot be written.
        """
        if samples_per_task < 1:
            raise ConfigError(f"samples_per_task must be at least 1, got {samples_per_task}")
        waiting = environment.tasks() if tasks is None else iter(tasks)
        room = anyio.Semaphore(int(self._places.total_tokens))
        ended: deque[Rollout] = deque()
        has_news = asyncio.Event()

        def next_rollout() -> Rollout | None:
            if not ended:
                return None
            room.release()  # only now: who does not take rollouts gets no further ones made
            return ended.popleft()

        async def one(task: EnvTask, sample: int) -> None:
            ended.append(await self.rollout(environment, task, sample))
            has_news.set()

        async def produce() -> None:
            try:
                async with anyio.create_task_group() as group:
                    for task in waiting:
                        for sample in range(samples_per_task):
                            await room.acquire()
                            group.start_soon(one, task, sample, name=f"rollout {task.id}.{sample}")
            except BaseExceptionGroup as failures:  # of an episode's record
                raise first_of(failures) from failures

        async with aclosing(stream(produce, next_rollout, has_news, "rollouts")) as rollouts:
            async for rollout in rollouts:
                yield rollout

    async def _run(self, environment: Environment, task: EnvTask, sample: int) -> Rollout:
        with anyio.CancelScope() as scope:
            running = (environment.name, task.id, sample, scope)
            self._scopes.append(running)
            try:
                return await self._judged(environment, task, sample)
            finally:
                self._scopes.remove(running)
        return Rollout(
            task=task, sample=sample, result=None, rewards={}, error="the rollout was aborted"
        )

    async def _judged(self, environment: Environment, task: EnvTask, sample: int) -> Rollout:
        settings = self._settings
        result: Result[Any] | None = None
        rewards: dict[str, float]
        try:
            async with environment.toolset(task) as tools:
                if tools:
                    both = [*settings.tools.values(), *tools]
                    settings = replace(settings, tools=check_names(both))
                if settings.seed is not None:
                    settings = replace(
                        settings, seed=_seed(settings.seed, environment.name, task.id, sample)
                    )
                settings = replace(
                    settings,
                    launch={"environment": environment.name, "task": task.id, "sample": sample},
                    can_spawn=settings.can_spawn and task.can_spawn,
                    budget=replace(settings.budget, **task.limits),
                )
                result = await run_episode(task.task, settings, self._ledger, self._tracer)
                rewards, failure = await self._rewards(environment, task, result)
                if failure is None:
                    self._ledger.judge_episode(result.episode_id, rewards)
        except LedgerError:
            raise
        except Exception as error:  # noqa: BLE001 - the boundary: environments are others' code
            rewards, failure = {}, f"{type(error).__name__}: {error}"
        return Rollout(task=task, sample=sample, result=result, rewards=rewards, error=failure)

    async def _rewards(
        self, environment: Environment, task: EnvTask, result: Result[Any]
    ) -> tuple[dict[str, float], str | None]:
        """What the judge says; what it raises never reaches the toolset that is still open."""
        try:
            return dict(await environment.judge(task, result, self)), None
        except LedgerError:
            raise
        except Exception as error:  # noqa: BLE001 - the boundary, as above
            return {}, f"{type(error).__name__}: {error}"
