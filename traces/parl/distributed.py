"""One learner over several processes: FSDP2 and expert parallelism, by torchrun's variables.

    mesh [replica, expert]     experts       sharded by expert over "expert", FSDP2 over "replica"
                               all the rest  FSDP2 over both
    batch                      groups[rank::world]: a question lies on one process as a whole
    loss                       weights are global, so gradients are summed and never averaged

    tokens ─ chosen experts ─ all-to-all ─> the owners' experts ─ all-to-all ─> weighted sum

FSDP2 and the experts' exchange need every process to run the same number of passes: who has fewer
micro-batches runs empty ones. Serving is not sharded here: weights are gathered to be published.
"""

# Shapes: T = tokens, K = experts a token, C = T*K choices, R = rows received, D = hidden,
# E = experts, L = local experts, W = processes of the expert group.

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from swarm_sdk.errors import ConfigError
from swarm_sdk.model_backend.kernels.experts import run_experts
from swarm_sdk.model_backend.model.kimi import DecoderLayer, KimiModel
from swarm_sdk.model_backend.model.moe import Experts, MixtureOfExperts


@dataclass(frozen=True, slots=True)
class Team:
    """The processes that train together; one alone unless torchrun started several."""

    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None

    @classmethod
    def join(cls, device: str, *, expert_parallel: int | None = None) -> Team:
        """Join the processes that torchrun started; alone where it started none.

        Args:
            device: ``cpu`` (gloo) or ``cuda`` (NCCL, one GPU a process).
            expert_parallel: processes that share the experts; all of them unless given.

        Raises:
            ConfigError: the processes cannot be divided into groups of ``expert_parallel``.
        """
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        experts = expert_parallel or size
        if size % experts:
            raise ConfigError(
                f"{size} processes cannot be divided into groups of {experts}; choose a divisor"
            )
        kind = device.partition(":")[0]
        if kind == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        if not dist.is_initialized():
            dist.init_process_group("nccl" if kind == "cuda" else "gloo")
        mesh = init_device_mesh(
            kind, (size // experts, experts), mesh_dim_names=("replica", "expert")
        )
        return cls(dist.get_rank(), size, mesh)

    @property
    def is_leader(self) -> bool:
        """Whether this process runs the episodes and keeps the journal."""
        return self.rank == 0

    def share(self, value: Any) -> Any:
        """The leader's value, on every process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.SUM)
        return tensor

    def max(self, tensor: Tensor) -> Tensor:
        """The largest values over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    def part(self, groups: Sequence[Any]) -> list[Any]:
        """This process's share of the questions."""
        return list(groups[self.rank :: self.size])

    def leave(self) -> None:
        """Take the process group down, when all have come here."""
        if self.size > 1 and dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()


ALONE = Team()


def shard(model: KimiModel, team: Team) -> None:
    """Shard ``model`` over the team, in place; nothing happens alone.

    Raises:
        ConfigError: the experts cannot be divided among the processes that share them.
    """
    mesh = team.mesh
    if mesh is None:
        return
    num_experts, num_shares = model.config.text_config.n_routed_experts, mesh["expert"].size()
    if num_experts % num_shares:
        raise ConfigError(
            f"{num_experts} experts cannot be divided among {num_shares} processes; set "
            "expert_parallel to a divisor"
        )
    everyone = mesh._flatten("everyone") if mesh["replica"].size() > 1 else mesh["expert"]  # noqa: SLF001
    for child in model.layers:
        layer = cast("DecoderLayer", child)
        apart: set[nn.Parameter] = set()
        if isinstance(layer.mlp, MixtureOfExperts):
            parallel = ParallelExperts(layer.mlp.experts, mesh["expert"])
            layer.mlp.experts = cast("Experts", parallel)
            if mesh["replica"].size() > 1:
                _sharded(parallel, mesh["replica"])
            else:
                apart = set(parallel.parameters())
        _sharded(layer, everyone, apart)
    apart = {p for p in model.parameters() if isinstance(p, DTensor)}
    eyes = {p for n, p in model.named_parameters() if n.startswith(("vision", "mm_projector"))}
    _sharded(model, everyone, apart | eyes)


def _sharded(module: nn.Module, mesh: DeviceMesh, apart: set[nn.Parameter] | None = None) -> None:
    fully_shard(module, mesh=mesh, ignored_params=apart or None)
    made = cast("FSDPModule", module)
    made.set_gradient_divide_factor(1.0)  # weights of tokens are global: sum, no mean
    made.set_force_sum_reduction_for_comms(True)


class ParallelExperts(nn.Module):
    """The routed experts of one layer, each on one process of the group.

    Rows travel to the process that owns their expert and back; what happens there is
    ``run_experts`` with one expert a row.
    """

    def __init__(self, experts: Experts, mesh: DeviceMesh) -> None:
        super().__init__()
        self.mesh: DeviceMesh = mesh
        self.num_local: int = experts.gate_up_proj.shape[0] // mesh.size()
        self.gate_up_proj: nn.Parameter = _by_expert(experts.gate_up_proj, mesh)
        self.down_proj: nn.Parameter = _by_expert(experts.down_proj, mesh)

    def forward(self, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Return the weighted sum [T, D] of the chosen experts' outputs."""
        num_tokens, num_chosen = expert_ids_TK.shape
        sorted_C, order_C = expert_ids_TK.flatten().sort(stable=True)
        owners = torch.arange(self.mesh.size(), device=x_TD.device)
        num_sent_W = (sorted_C.div(self.num_local, rounding_mode="floor") == owners[:, None]).sum(1)
        num_got_W = torch.empty_like(num_sent_W)
        group = self.mesh.get_group()
        dist.all_to_all_single(num_got_W, num_sent_W, group=group)
        sent, got = num_sent_W.tolist(), num_got_W.tolist()
        ids_R = torch.empty(sum(got), dtype=sorted_C.dtype, device=x_TD.device)
        dist.all_to_all_single(ids_R, sorted_C, got, sent, group=group)
        x_CD = x_TD.index_select(0, order_C // num_chosen).contiguous()
        x_RD = _exchanged(x_CD, got, sent, group)
        y_RD = self._run(x_RD, ids_R - self.mesh.get_local_rank() * self.num_local)
        y_CD = _exchanged(y_RD.contiguous(), sent, got, group)
        y_CD = y_CD * weights_TK.flatten().index_select(0, order_C)[:, None].to(y_CD.dtype)
        y_TD = torch.zeros(num_tokens, x_TD.shape[1], dtype=y_CD.dtype, device=x_TD.device)
        return y_TD.index_add(0, order_C // num_chosen, y_CD)

    def _run(self, x_RD: Tensor, local_ids_R: Tensor) -> Tensor:
        gate_up, down = (_local(weight) for weight in (self.gate_up_proj, self.down_proj))
        if not len(x_RD):  # nothing came: the gradient is zero, and there is one
            return x_RD + 0.0 * (gate_up.sum() + down.sum())
        ones_R1 = torch.ones(len(x_RD), 1, device=x_RD.device)
        return run_experts(x_RD, local_ids_R[:, None], ones_R1, gate_up, down).to(x_RD.dtype)


def _exchanged(x: Tensor, got: list[int], sent: list[int], group: dist.ProcessGroup) -> Tensor:
    """All-to-all of rows, differentiable."""
    rows = funcol.all_to_all_single_autograd(x, got, sent, group)
    waited: Tensor = funcol.wait_tensor(rows)  # type: ignore[no-untyped-call]
    return waited


def _by_expert(weight: Tensor, mesh: DeviceMesh) -> nn.Parameter:
    sharded = distribute_tensor(weight.detach(), mesh, [Shard(0)])
    return nn.Parameter(sharded, requires_grad=weight.requires_grad)


def _local(weight: Tensor) -> Tensor:
    local: Tensor = weight.to_local() if isinstance(weight, DTensor) else weight
    return local
