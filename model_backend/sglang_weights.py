"""New weights for SGLang servers, while they serve.

    update_weights   check names and shapes ─> pause ─> begin ─┬─ tensor: buckets ──────┬─> end
                                                               └─ distributed: buckets ─┘    │
    load             check the files' headers ─> pause ─> update_weights_from_disk           │
                                      continue <── compare checksums <───────────────────────┘

    a bucket   tensors end to end as bytes, and where each lies; Hugging Face names
               on a GPU: its memory is opened by the server (CUDA IPC), nothing is copied over
               on a CPU: the bytes travel in the request
    in_flight  retract   requests go back to the queue; their keys are computed anew
                         (SGLang 0.5.11 cannot flush its cache then: as ``abort``)
               keep      they go on with the keys of the old weights (each token's version is told)
               abort     they are ended, and ``SglangEngine`` asks for them again

SGLang fuses tensors in the same way as ``KimiModel`` does, so its checksums can be computed here
from our parameters by renaming alone (``sglang_checksums.py``; SGLang 0.5.11 tells none). A server
may keep all tensors of a kind in a layout of its kernels' own (some backends of experts, AMX), and
no checksum of that kind is ours then. So a tensor is wrong if it differs and others of its kind
agree; if a whole kind differs, the update is not called bad and not called verified.
If an update breaks off after the first bucket, the servers hold a mixture: they stay paused, so
that no token is sampled from it, until an update succeeds. If it breaks off before, they go on;
the session that ``begin`` opened is closed first, for its layout of the weights is another.
"""

from __future__ import annotations

import base64
import io
import logging
import pickle
import re
import threading
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from http import HTTPStatus
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final, Literal

import anyio
import anyio.to_thread
import torch
import torch.multiprocessing

from swarm_sdk.errors import ConfigError, ModelError
from swarm_sdk.model_backend.http import ServerClient
from swarm_sdk.model_backend.model.config_json import read_json
from swarm_sdk.model_backend.sglang_checksums import checksum
from swarm_sdk.model_backend.weight_sink import check_shapes
from swarm_sdk.model_backend.weights.headers import read_headers
from swarm_sdk.model_backend.weights.layout import stored_tensors
from swarm_sdk.model_backend.weights.names import CheckpointTensor, checkpoint_tensors
from swarm_sdk.model_backend.weights.quantization import found_quantization

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence

    from torch import Tensor

    from swarm_sdk.model_backend.model.config import KimiConfig

_log = logging.getLogger(__name__)

Way = Literal["tensor", "distributed"]
InFlight = Literal["retract", "keep", "abort"]
_PAUSE_MODE: Final[dict[InFlight, str]] = {
    "retract": "retract",
    "keep": "in_place",
    "abort": "abort",
}
BUCKET_BYTES: Final = 2**30
GROUP: Final = "swarm_weights"
INT4: Final = "compressed-tensors"
"""What SGLang calls the quantization of ``weights/int4.py``."""
FLUSH_TRIES: Final = 5
FLUSH_WAIT_S: Final = 0.2
UNDO_S: Final = 30.0
"""How long a server is waited for when it is told to go on."""

# From our names to SGLang's: all else is the same.
_RENAMED: Final = (
    (r"^(vision_tower\..*)\.wqkv\.", r"\1.attn.qkv_proj."),
    (r"^(vision_tower\..*)\.wo\.", r"\1.attn.proj."),
    (r"^mm_projector\.proj\.0\.", "mm_projector.linear_1."),
    (r"^mm_projector\.proj\.2\.", "mm_projector.linear_2."),
    (r"\.qkv_a_proj\.", ".fused_qkv_a_proj_with_mqa."),
    (r"\.experts\.gate_up_proj$", ".experts.w13_weight"),
    (r"\.experts\.down_proj$", ".experts.w2_weight"),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^(?=embed_tokens\.|layers\.|norm\.)", "language_model.model."),
)


def sglang_name(parameter: str) -> str:
    """What SGLang calls a parameter of ``KimiModel``.

    >>> sglang_name("layers.1.mlp.experts.gate_up_proj")
    'language_model.model.layers.1.mlp.experts.w13_weight'
    """
    for pattern, into in _RENAMED:
        parameter = re.sub(pattern, into, parameter)
    return parameter


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """Tensors end to end."""

    names: tuple[str, ...]
    """Hugging Face names."""
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    content: Tensor
    """uint8 [bytes], on the device of the weights."""


def buckets(
    state_dict: Mapping[str, Tensor],
    tensors: Sequence[CheckpointTensor],
    dtype: torch.dtype,
    max_bytes: int = BUCKET_BYTES,
) -> Iterator[Bucket]:
    """Cast and join the ``tensors`` of a model, in their order, at most ``max_bytes`` together.

    A tensor above ``max_bytes`` has a bucket of its own. Each bucket is fresh memory: a server may
    still read the one before.
    """
    held: list[tuple[CheckpointTensor, Tensor]] = []
    num_bytes = 0
    for tensor in tensors:
        part = tensor.part_of(state_dict[tensor.parameter]).detach()
        part = part.to(torch.float32 if tensor.is_float32 else dtype)
        # Float32 first in a bucket or after bfloat16 of an odd count would not be aligned.
        if held and (
            num_bytes + part.nbytes > max_bytes or num_bytes % max(part.element_size(), 4)
        ):
            yield _bucket(held)
            held, num_bytes = [], 0
        held.append((tensor, part))
        num_bytes += part.nbytes
    if held:
        yield _bucket(held)


def _bucket(held: Sequence[tuple[CheckpointTensor, Tensor]]) -> Bucket:
    return Bucket(
        names=tuple(tensor.name for tensor, _ in held),
        shapes=tuple(tensor.shape for tensor, _ in held),
        dtypes=tuple(part.dtype for _, part in held),
        content=torch.cat([part.reshape(-1).view(torch.uint8) for _, part in held]),
    )


def serialized(bucket: Bucket) -> str:
    """A bucket as SGLang's ``update_weights_from_tensor`` reads it: base64 of a pickle.

    On a GPU it holds a handle to the memory, which must stay until the server has answered.
    """
    metadata, start = [], 0
    for name, shape, dtype in zip(bucket.names, bucket.shapes, bucket.dtypes, strict=True):
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        metadata.append(
            # SGLang's own class, read by attribute alone, so that this process need not have it.
            SimpleNamespace(
                name=name,
                shape=torch.Size(shape),
                dtype=dtype,
                start_idx=start,
                end_idx=start + num_bytes,
                numel=num_bytes,
            )
        )
        start += num_bytes
    stream = io.BytesIO()
    pickler = ForkingPickler if bucket.content.is_cuda else pickle.Pickler
    pickler(stream).dump({"flattened_tensor": bucket.content, "metadata": metadata})
    return base64.b64encode(stream.getvalue()).decode("ascii")


@dataclass(frozen=True, slots=True)
class _Facts:
    num_ranks: int
    """Processes of its tensor parallelism."""
    dtype: torch.dtype
    is_on_gpu: bool
    quantization: str | None
    """``""`` for none, ``None`` if it cannot be known."""


class SglangWeights:
    """The ``WeightSink`` of SGLang servers that hold the same model."""

    def __init__(
        self,
        base_urls: str | Sequence[str],
        config: KimiConfig,
        *,
        way: Way = "tensor",
        in_flight: InFlight = "retract",
        parameters: Sequence[str] | None = None,
        dtype: torch.dtype = torch.bfloat16,
        bucket_bytes: int = BUCKET_BYTES,
        verifies: bool = True,
        api_key: str | None = None,
        timeout_s: float = 600.0,
        group_timeout_s: float = 60.0,
    ) -> None:
        """Connect to nothing yet.

        ``parameters`` are those that every update holds, by their names in ``KimiModel``; ``None``
        for all of them, the router's correction biases left out (they are buffers). ``dtype`` is
        what travels. ``verifies`` compares the servers' checksums in each update (``verify``).
        ``timeout_s`` bounds a request, ``group_timeout_s`` a bucket of the way ``distributed`` and
        the forming of its group.

        Raises:
            ConfigError: an address is none, or ``parameters`` names one that the model has not.
        """
        urls = [base_urls] if isinstance(base_urls, str) else list(base_urls)
        if not urls:
            raise ConfigError("give SglangWeights one address or several")
        self._clients = [ServerClient(url, api_key=api_key, timeout_s=timeout_s) for url in urls]
        every = list(checkpoint_tensors(config))
        known = dict.fromkeys(tensor.parameter for tensor in every)
        wanted = set(_trained(known) if parameters is None else parameters)
        if unknown := sorted(wanted - set(known)):
            raise ConfigError(f"the model has no parameter '{unknown[0]}'")
        self._config = config
        self._tensors = [tensor for tensor in every if tensor.parameter in wanted]
        self._shapes = _parameter_shapes(self._tensors)
        self._float32 = {tensor.parameter for tensor in every if tensor.is_float32}
        self._way: Way = way
        self._in_flight: InFlight = in_flight
        self._dtype = dtype
        self._bucket_bytes, self._verifies = bucket_bytes, verifies
        self._known: dict[ServerClient, _Facts] = {}
        self._lock = anyio.Lock()
        self._version = 0
        self._unfit: set[ServerClient] = set()
        """Those that must not sample from what they hold: they stay paused."""
        self._in_session: set[ServerClient] = set()
        """Those that were told to begin an update and not yet to end it."""
        self._group: Any = None
        self._group_timeout_s = group_timeout_s
        self._sending: Any = None
        """The last broadcast of the group."""
        self._warned: set[ServerClient] = set()
        self.is_verified: bool | None = None
        """Whether every server's checksums were compared with the last update's and are equal."""

    @property
    def weight_version(self) -> int:
        """As ``WeightSink.weight_version``: of the last update through this sink."""
        return self._version

    async def dtypes(self) -> set[torch.dtype]:
        """Those of the servers' weights.

        Raises:
            ModelError: a server failed.
        """
        async with self._lock:
            await self._each(self._facts)
            return {self._known[client].dtype for client in self._clients}

    async def update_weights(self, state_dict: Mapping[str, Tensor], weight_version: int) -> None:
        """Send all parameters to all servers; see ``WeightSink.update_weights``.

        Raises:
            ConfigError: a tensor is missing, extra or misshapen, a server's weights are quantized,
                or there is no group to send over; nothing was sent.
            ModelError: a server failed, or its checksums differ. Those that may hold a mixture stay
                paused, as it says; the others go on.
        """
        check_shapes(
            {name: tuple(tensor.shape) for name, tensor in state_dict.items()}, self._shapes
        )
        if self._way == "distributed" and self._group is None:
            raise ConfigError("the way 'distributed' needs SglangWeights.join before an update")
        async with self._lock:
            await self._each(self._facts)
            for client in self._clients:
                if quantization := self._known[client].quantization:
                    raise ConfigError(
                        f"{client.base_url} serves quantized weights ({quantization}), which "
                        "cannot be sent to it: save a checkpoint, convert it (swarm checkpoint "
                        "convert SRC DST --to int4) and use SglangWeights.load"
                    )
            async with self._paused():
                await self._each(self._begin)
                content = buckets(state_dict, self._tensors, self._dtype, self._bucket_bytes)
                for bucket, is_last in _marking_the_last(content):
                    how = {"weight_version": str(weight_version)} if is_last else {}
                    self._unfit.update(self._clients)
                    self.is_verified = False
                    await self._send(bucket, {"flush_cache": False, **how})
                    if bucket.content.is_cuda:  # the servers have closed the memory of those before
                        torch.cuda.ipc_collect()  # type: ignore[no-untyped-call]
                await self._each(self._end)
                await self._each(self._flush)
                if self._verifies:
                    await self._verify(state_dict)
                self._unfit.clear()
                self._version = weight_version

    async def load(self, directory: str | Path, weight_version: int) -> None:
        """Have all servers read a checkpoint that they can see at ``directory``.

        SGLang reads it as at its start. Nothing is compared: who has the weights calls ``verify``.

        Raises:
            ConfigError: a tensor in it is missing, extra or misshapen, its experts are in another
                form than a server's, or a file cannot be read; nothing was changed.
            ModelError: a server failed. One that refused goes on with the weights before, one that
                broke off while it read stays paused, as it says.
        """
        directory = Path(await anyio.Path(directory).absolute())  # servers run in other folders
        headers = await anyio.to_thread.run_sync(read_headers, directory)
        is_int4 = any(name.endswith(".weight_packed") for name in headers)
        check_shapes(
            {name: info.shape for name, info in headers.items()},
            {tensor.name: tensor.shape for tensor in stored_tensors(self._config, int4=is_int4)},
            what=f"the weights in '{directory}'",
        )
        payload = {
            "model_path": str(directory),
            "weight_version": str(weight_version),
            "flush_cache": False,
        }

        async def load(client: ServerClient) -> None:
            was_unfit = client in self._unfit
            self._unfit.add(client)
            self.is_verified = False
            if client in self._in_session:  # before it reads: its end processes what is there
                await self._end(client)
            try:
                await self._post(client, "/update_weights_from_disk", payload)
            except ModelError as error:
                # SGLang refuses with these; another status is a gateway's, and it may still read.
                may_refuse = error.status in (HTTPStatus.OK, HTTPStatus.BAD_REQUEST)
                # A failed read is another thing than a refusal: SGLang's way back reads the new
                # files once more, under the old version's number.
                is_failed_read = "Failed to update weights" in str(error)
                if may_refuse and not is_failed_read and not was_unfit:
                    self._unfit.discard(client)
                raise
            await self._flush(client)
            self._unfit.discard(client)

        async with self._lock:
            await self._each(self._facts)
            for client in self._clients:
                quantization = self._known[client].quantization
                if quantization is not None and is_int4 != (quantization == INT4):
                    held, given = ("bf16", "INT4") if is_int4 else ("INT4", "bf16")
                    raise ConfigError(
                        f"{client.base_url} serves {held} experts and '{directory}' holds {given}: "
                        f"swarm checkpoint convert SRC DST --to {held.lower()}"
                    )
            async with self._paused():
                await self._each(load)
                self._version = weight_version

    async def verify(self, state_dict: Mapping[str, Tensor]) -> bool:
        """Compare the servers' checksums with those of ``state_dict``; also sets ``is_verified``.

        ``True`` proves that the tensors of all servers are these, bit for bit. ``False``, with one
        warning a server, if that cannot be told: it tells no checksums, has the tensors in parts
        (tensor parallelism), or keeps or hashes them in another way.

        Raises:
            ModelError: a server failed, or holds a tensor that is another.
        """
        async with self._lock:
            await self._each(self._facts)
            return await self._verify(state_dict)

    async def checksums(self) -> list[dict[str, str] | None]:
        """Of each server: hash of each of its tensors by SGLang's name.

        ``None`` if it tells none, or has them in parts on several GPUs.

        Raises:
            ModelError: a server failed.
        """
        found: list[dict[str, str] | None] = []
        for client in self._clients:
            try:
                answer = await client.post("/weights_checker", {"action": "checksum"})
                ranks = answer["ranks"]
            except ModelError as error:
                if error.status is None:
                    raise
                found.append(None)  # SGLang 0.5.11 knows no such action
            except (KeyError, TypeError):
                found.append(None)
            else:
                found.append(dict(ranks[0]["checksums"]) if len(ranks) == 1 else None)
        return found

    async def release_memory(self) -> None:
        """Give back the servers' GPU memory: weights and cache are gone, requests wait.

        For servers started with ``--enable-memory-saver``. Undo it with ``resume_memory`` and an
        update, which lets requests go on.

        Raises:
            ModelError: a server holds requests (with ``in_flight="abort"`` it never does), or
                failed.
        """
        async with self._lock, self._paused():
            await self._each(self._check_idle)
            self._unfit.update(self._clients)
            self.is_verified = False
            await self._all("/release_memory_occupation", {})

    async def resume_memory(self) -> None:
        """Take the memory again; what is in it is undefined until the next update.

        Raises:
            ModelError: a server failed.
        """
        async with self._lock:
            await self._all("/resume_memory_occupation", {})

    async def join(self, master_address: str, master_port: int, backend: str = "gloo") -> None:
        """Form the process group of the way ``distributed``: this process is its rank 0.

        ``backend`` is ``nccl`` between GPUs; two processes of one GPU cannot form such a group.

        Raises:
            ModelError: a server refused or did not join in time.
        """
        await self._each(self._facts)
        sizes = [self._known[client].num_ranks for client in self._clients]
        world_size, address = 1 + sum(sizes), f"tcp://{master_address}:{master_port}"
        told = {
            "master_address": master_address,
            "master_port": master_port,
            "world_size": world_size,
            "group_name": GROUP,
            "backend": backend,
        }
        path = "/init_weights_update_group"
        with self._as_one_failure():
            async with anyio.create_task_group() as tasks:
                for index, client in enumerate(self._clients):
                    rank_offset = {"rank_offset": 1 + sum(sizes[:index])}
                    name = f"join {client.base_url}"
                    tasks.start_soon(self._post, client, path, told | rank_offset, name=name)
                self._group = await anyio.to_thread.run_sync(
                    _new_group,
                    address,
                    world_size,
                    backend,
                    self._group_timeout_s,
                    abandon_on_cancel=True,
                )

    async def leave(self) -> None:
        """Dissolve the process group.

        Raises:
            ModelError: a server failed.
        """
        if self._group is not None:
            await self._all("/destroy_weights_update_group", {"group_name": GROUP})
            torch.distributed.destroy_process_group(self._group)
            self._group = None

    async def aclose(self) -> None:
        """Close the connections."""
        for client in self._clients:
            await client.aclose()

    # -- steps -----------------------------------------------------------------------------------

    @asynccontextmanager
    async def _paused(self) -> AsyncIterator[None]:
        """Pause all servers; at the end all but the unfit go on, whatever happened.

        Each is paused anew: one that was started again meanwhile has forgotten it.
        """
        try:
            await self._all("/pause_generation", {"mode": _PAUSE_MODE[self._in_flight]})
            yield
        except BaseException as error:
            try:
                await self._go_on()
            except ModelError as another:
                error.add_note(str(another))
            if not self._unfit:
                raise
            unfit = ", ".join(sorted(client.base_url for client in self._unfit))
            says = (
                "may hold a mixture of old and new, and stays paused until an update succeeds: "
                + unfit
            )
            if isinstance(error, ModelError):
                raise ModelError(
                    f"{error}; {says}", status=error.status, retryable=error.retryable
                ) from error
            error.add_note(says)
            raise
        await self._go_on()

    async def _go_on(self) -> None:
        """Have all but the unfit go on, also if this task is cancelled."""

        async def go_on(client: ServerClient) -> None:
            try:
                with anyio.fail_after(UNDO_S):
                    await self._continue(client)
            except TimeoutError as error:
                raise ModelError(
                    f"{client.base_url} was told to go on and gave no answer within {UNDO_S:g} s: "
                    "it may stay paused until the next update"
                ) from error

        with anyio.CancelScope(shield=True):
            await self._each(go_on)

    async def _continue(self, client: ServerClient) -> None:
        """Let a server go on, unless it is unfit; it must not sample while its session is open."""
        if client in self._unfit:
            return
        if client in self._in_session:
            self._unfit.add(client)
            try:
                await self._end(client)
            except ModelError as error:
                if "no weight-update session is open" not in str(error):  # it refused to begin
                    raise
            self._in_session.discard(client)
            self._unfit.discard(client)
        await self._post(client, "/continue_generation", {})

    async def _begin(self, client: ServerClient) -> None:
        """Open a session, where a server has them; one that a broken update left is closed."""
        self._in_session.add(client)
        try:
            await self._post(client, "/begin_weight_update", {}, or_missing=True)
        except ModelError as error:
            if "already open" not in str(error):
                raise
            await self._post(client, "/end_weight_update", {})
            await self._post(client, "/begin_weight_update", {})

    async def _end(self, client: ServerClient) -> None:
        await self._post(client, "/end_weight_update", {}, or_missing=True)
        self._in_session.discard(client)

    async def _send(self, bucket: Bucket, how: dict[str, Any]) -> None:
        if self._way == "tensor":
            content = await anyio.to_thread.run_sync(serialized, bucket)
            if bucket.content.is_cuda:
                torch.cuda.synchronize()  # the server's process reads it next
            for_ranks = {
                client: [content] * self._known[client].num_ranks for client in self._clients
            }

            async def post(client: ServerClient) -> None:
                await self._post(
                    client,
                    "/update_weights_from_tensor",
                    {
                        "serialized_named_tensors": for_ranks[client],
                        "load_format": "flattened_bucket",
                        **how,
                    },
                )

            await self._each(post)
            return
        told = {
            "names": bucket.names,
            "dtypes": [str(dtype).removeprefix("torch.") for dtype in bucket.dtypes],
            "shapes": bucket.shapes,
            "group_name": GROUP,
            "load_format": "flattened_bucket",
            **how,
        }
        path = "/update_weights_from_distributed"
        with self._as_one_failure():
            async with anyio.create_task_group() as tasks:
                for client in self._clients:
                    name = f"weights of {client.base_url}"
                    tasks.start_soon(self._post, client, path, told, name=name)
                await self._broadcast(bucket.content)

    async def _broadcast(self, content: Tensor) -> None:
        """Send to all ranks of the group; can be cancelled, as a collective cannot."""
        group = self._group
        with anyio.fail_after(self._group_timeout_s):
            work: Any = await anyio.to_thread.run_sync(
                lambda: torch.distributed.broadcast(content, src=0, group=group, async_op=True),
                abandon_on_cancel=True,  # NCCL meets the others in its first collective
            )
            self._sending = work
            while not work.is_completed():  # noqa: ASYNC110 - it tells nobody when it is
                await anyio.sleep(0.001)
        work.wait()

    @contextmanager
    def _as_one_failure(self) -> Iterator[None]:
        """Raise what failed in a group as one error, a server's before ours; the group is gone."""
        try:
            yield
        except BaseException as error:
            group, sending, self._group, self._sending = self._group, self._sending, None, None
            if group is not None:
                threading.Thread(target=_abort, args=[group, sending], daemon=True).start()
            found = list(error.exceptions) if isinstance(error, BaseExceptionGroup) else [error]
            del group
            for one in found:
                if isinstance(one, ModelError):
                    raise one from error
            if isinstance(found[0], RuntimeError | TimeoutError):  # torch's are RuntimeErrors
                reason = str(found[0]) or f"no answer within {self._group_timeout_s:g} s"
                raise ModelError(f"the process group failed: {reason}; join again") from error
            raise

    async def _verify(self, state_dict: Mapping[str, Tensor]) -> bool:
        self.is_verified = False
        told = await self.checksums()
        doubts: dict[ServerClient, str] = {}
        for client, checksums in zip(self._clients, told, strict=True):
            if checksums is None:
                doubts[client] = "it tells no checksums of whole tensors"
                continue
            wrong, unclear = await anyio.to_thread.run_sync(
                self._unlike, state_dict, checksums, self._known[client]
            )
            if wrong:
                raise ModelError(
                    f"{client.base_url} holds other weights than were sent: {len(wrong)} tensors "
                    f"differ, the first is {wrong[0]}"
                )
            if unclear:
                doubts[client] = (
                    f"it keeps or hashes all tensors of a kind in another way ({len(unclear)} "
                    f"tensors, the first is {unclear[0]})"
                )
        for client, doubt in doubts.items():
            if client not in self._warned:
                _log.warning("%s: updates are not verified, for %s", client.base_url, doubt)
        self._warned |= set(doubts)
        self.is_verified = not doubts
        return self.is_verified

    def _unlike(
        self, state_dict: Mapping[str, Tensor], checksums: Mapping[str, str], facts: _Facts
    ) -> tuple[list[str], list[str]]:
        """Names of the tensors that are wrong, and of those that differ with all of their kind."""
        differ, agreeing = [], set()
        for name, tensor in state_dict.items():
            sent = tensor.detach()
            if name not in self._float32:
                sent = sent.to(self._dtype).to(facts.dtype)
            if checksums.get(sglang_name(name)) == checksum(sent, on_gpu=facts.is_on_gpu):
                agreeing.add(_kind(name, sent))
            else:
                differ.append((name, _kind(name, sent)))
        # What it has packed only, it has passed over: the server is quantized after all.
        wrong = [
            name
            for name, kind in differ
            if kind in agreeing or f"{sglang_name(name)}_packed" in checksums
        ]
        return wrong, [name for name, _ in differ if name not in wrong]

    async def _flush(self, client: ServerClient) -> None:
        """Forget the keys of the old weights, unless requests are to keep them.

        By a call of its own: SGLang 0.5.11 ends if it cannot flush within an update. It cannot
        while requests wait, retracted ones too, so these are ended then.
        """
        if self._in_flight == "keep":
            return
        for _ in range(FLUSH_TRIES):
            try:
                await client.command("/flush_cache", {})
            except ModelError as error:
                if error.status != HTTPStatus.BAD_REQUEST:
                    raise
            else:
                return
            await self._post(client, "/abort_request", {"abort_all": True})
            await anyio.sleep(FLUSH_WAIT_S)
        raise ModelError(
            f"{client.base_url} keeps keys of the old weights: it does not flush its cache, though "
            "its requests were told to end",
            status=HTTPStatus.BAD_REQUEST,
        )

    async def _check_idle(self, client: ServerClient) -> None:
        loads = (await client.get("/v1/loads"))["loads"]
        num = sum(load["num_running_reqs"] + load["num_waiting_reqs"] for load in loads)
        if num:
            raise ModelError(f"{client.base_url} holds {num} requests; wait for them or abort them")

    async def _post(
        self, client: ServerClient, path: str, payload: dict[str, Any], *, or_missing: bool = False
    ) -> None:
        """Post to a server; with ``or_missing`` one without ``path`` is passed by."""
        try:
            answer = await client.post(path, payload)
        except ModelError as error:
            if or_missing and error.status == HTTPStatus.NOT_FOUND:
                return
            raise
        if isinstance(answer, dict) and answer.get("success") is False:
            raise ModelError(
                f"{client.base_url}{path} failed: {answer.get('message')}", status=HTTPStatus.OK
            )

    async def _all(self, path: str, payload: dict[str, Any], *, or_missing: bool = False) -> None:
        """Post the same to all servers at once."""
        await self._each(lambda client: self._post(client, path, payload, or_missing=or_missing))

    async def _each(self, do: Callable[[ServerClient], Awaitable[object]]) -> None:
        """Run ``do`` for all servers side by side, each to its end; then raise the first failure.

        None is broken off because another failed: it may be reading our memory.
        """
        failures: list[Exception] = []

        async def run(client: ServerClient) -> None:
            try:
                await do(client)
            except Exception as error:  # noqa: BLE001 - raised below, as it is
                failures.append(error)

        async with anyio.create_task_group() as tasks:
            for client in self._clients:
                tasks.start_soon(run, client, name=f"weights of {client.base_url}")
        if failures:
            raise failures[0]

    async def _facts(self, client: ServerClient) -> None:
        """Ask anew what an update must know of a server: it may have been started again."""
        told = await client.get("/server_info")
        try:
            dtype = "bfloat16" if told["dtype"] == "auto" else str(told["dtype"])
            num_ranks, known = int(told["tp_size"]), getattr(torch, dtype)
        except (KeyError, TypeError, AttributeError) as error:
            raise ModelError(
                f"{client.base_url} answers, but not as a SGLang server does"
            ) from error
        is_on_gpu = str(told.get("device", "")).startswith("cuda")
        self._known[client] = _Facts(num_ranks, known, is_on_gpu, _quantization(told))


def _marking_the_last(content: Iterator[Bucket]) -> Iterator[tuple[Bucket, bool]]:
    held: Bucket | None = None
    for bucket in content:
        if held is not None:
            yield held, False
        held = bucket
    if held is not None:
        yield held, True


def _kind(name: str, tensor: Tensor) -> str:
    """What a server keeps in the same form: a matrix of all layers; vectors, but for the biases.

    The router's correction biases may have a precision of their own.
    """
    is_plain = tensor.dim() == 1 and not name.endswith("e_score_correction_bias")
    return "vector" if is_plain else re.sub(r"\d+", "", name)


def _trained(names: Mapping[str, None]) -> Iterator[str]:
    return (name for name in names if not name.endswith("e_score_correction_bias"))


def _parameter_shapes(tensors: Sequence[CheckpointTensor]) -> dict[str, tuple[int, ...]]:
    """Shapes of our parameters, put together from the parts of the checkpoint."""
    rows: dict[str, int] = {}
    experts: dict[str, int] = {}
    tails: dict[str, tuple[int, ...]] = {}
    for tensor in tensors:
        name = tensor.parameter
        rows[name] = max(rows.get(name, 0), (tensor.first_row or 0) + tensor.shape[0])
        experts[name] = max(experts.get(name, 0), 0 if tensor.expert is None else tensor.expert + 1)
        tails[name] = tensor.shape[1:]
    return {
        name: (*((experts[name],) if experts[name] else ()), rows[name], *tails[name])
        for name in rows
    }


def _quantization(told: Mapping[str, Any]) -> str | None:
    """How a server's weights are quantized: ``""`` for not at all, ``None`` if it cannot be known.

    By its own word, which 0.5.11 and 0.5.23 keep for some GPUs, or by its model's ``config.json``,
    if that can be read from here.
    """
    if told.get("quantization"):
        return str(told["quantization"])
    try:
        config_json = read_json(Path(told["model_path"]))
    except (ConfigError, KeyError, TypeError):
        return None
    return str((found_quantization(config_json) or {}).get("quant_method", ""))


def _new_group(init_method: str, world_size: int, backend: str, timeout_s: float) -> Any:
    """A process group beside the trainer's own, met by SGLang's in every key of the store."""
    from torch.distributed import distributed_c10d as c10d
    from torch.distributed.rendezvous import rendezvous

    timeout = timedelta(seconds=timeout_s)
    store, rank, size = next(rendezvous(init_method, 0, world_size, timeout=timeout))
    group, _ = c10d._new_process_group_helper(  # noqa: SLF001 - the public way makes subgroups only
        size,
        rank,
        [],
        c10d.Backend(backend),
        c10d.PrefixStore(GROUP, store),
        group_name=c10d.GroupName(GROUP),
        timeout=2 * timeout,  # after ours: NCCL's own ends the process
    )
    c10d._world.pg_group_ranks[group] = {index: index for index in range(size)}  # noqa: SLF001
    return group


def _abort(group: Any, sending: Any) -> None:
    """End a group; gloo must be waited for, or its end would hold up every thread of Python."""
    for end in (
        group.abort,
        *([sending.wait] if sending is not None else []),
        lambda: torch.distributed.destroy_process_group(group),
    ):
        with suppress(RuntimeError):
            end()
