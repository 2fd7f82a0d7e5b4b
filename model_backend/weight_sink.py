"""Where a trainer's weights go: one protocol for the embedded engine and for servers.

    learner ──> sink.update_weights({parameter: tensor}, version) ──> all of it, or none

    EmbeddedEngine   copies between two steps
    SglangWeights    sends to SGLang: through a GPU's memory, over a process group, or from a disk
    FrozenWeights    refuses: the engine of sub-agents, which never train

Names and shapes are those of ``KimiModel.state_dict()``; a sink that needs others translates.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from swarm_sdk.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

_MAX_NAMED = 3
"""Tensors that a refusal names."""


class WeightSink(Protocol):
    """An engine that takes new weights while it serves."""

    @property
    def weight_version(self) -> int:
        """Version of the weights that it samples with now."""
        ...

    async def update_weights(self, state_dict: Mapping[str, Tensor], weight_version: int) -> None:
        """Serve with these weights from here on; no token is sampled from a mixture.

        The tensors must not change before this returns.

        Raises:
            ConfigError: the sink is frozen, or a tensor is missing, extra or misshapen; nothing
                was changed.
            ModelError: the engine failed or is closed.
        """
        ...


class FrozenWeights:
    """The sink of an engine whose weights never change."""

    def __init__(self, weight_version: int = 0) -> None:
        """``weight_version`` is what its engine was loaded with."""
        self._weight_version = weight_version

    @property
    def weight_version(self) -> int:
        """As ``WeightSink.weight_version``."""
        return self._weight_version

    async def update_weights(
        self,
        state_dict: Mapping[str, Tensor],  # noqa: ARG002 - the protocol's
        weight_version: int,
    ) -> None:
        """Refuse.

        Raises:
            ConfigError: always.
        """
        raise frozen(weight_version)


def frozen(weight_version: int) -> ConfigError:
    """The refusal of an engine whose weights never change."""
    return ConfigError(
        f"version {weight_version} of the weights was not published: this engine is frozen, for "
        "sub-agents run with the weights that they began with"
    )


def check_shapes(
    given: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    what: str = "the new weights",
) -> None:
    """Compare names and shapes before anything is sent.

    Raises:
        ConfigError: a tensor is missing, extra or misshapen; it is named.
    """
    missing = [name for name in expected if name not in given]
    extra = [name for name in given if name not in expected]
    misshapen = [
        f"{name} {_shape(given[name])} instead of {_shape(shape)}"
        for name, shape in expected.items()
        if name in given and tuple(given[name]) != tuple(shape)
    ]
    faults = [
        f"{len(names)} {kind} ({', '.join(names[:_MAX_NAMED])}{', …' * (len(names) > _MAX_NAMED)})"
        for kind, names in (("missing", missing), ("extra", extra), ("misshapen", misshapen))
        if names
    ]
    if faults:
        raise ConfigError(f"{what} do not fit the model and were refused: {'; '.join(faults)}")


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
