"""``SglangWeights``: what it refuses before it sends, what it sends, and in which order.

The server is a real one on the loopback that does with buckets what SGLang does (0.5.23: sessions
and checksums; 0.5.11: neither). What SGLang makes of them: ``tests/model_backend/sglang``.
"""

import base64
import json
import pickle
import socket
import sys
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import anyio
import anyio.from_thread
import pytest
import torch
from aiohttp import web
from safetensors.torch import load_file, save_file

from swarm_sdk.errors import ConfigError, ModelError
from swarm_sdk.model_backend import sglang_weights
from swarm_sdk.model_backend.model.config import tiny
from swarm_sdk.model_backend.model.kimi import KimiModel
from swarm_sdk.model_backend.sglang_checksums import checksum
from swarm_sdk.model_backend.sglang_weights import SglangWeights, buckets, sglang_name
from swarm_sdk.model_backend.weight_sink import FrozenWeights, WeightSink
from swarm_sdk.model_backend.weights import checkpoint
from swarm_sdk.model_backend.weights.names import checkpoint_tensors


@pytest.fixture(scope="module")
def model() -> KimiModel:
    model = KimiModel(tiny())
    model.init_weights(seed=3)
    return model


@pytest.fixture(scope="module")
def weights(model):
    return {name: tensor.detach() for name, tensor in model.named_parameters()}


@dataclass
class Receiver:
    """Takes buckets as SGLang does, and keeps the tensors by their Hugging Face names."""

    has_sessions: bool = True
    has_checksums: bool = True
    can_flush: bool = True
    is_open: bool = False
    """Whether a session is, left by a trainer that died."""
    num_waiting: int = 0
    """Requests in its queue, for which 0.5.11 does not flush; each abort ends one."""
    spoils: str = ""
    """The path that fails."""
    hangs: str = ""
    """The path that is taken and never answered."""
    says: str = "no memory"
    """Why it does."""
    status: int = 400
    """What it fails with."""
    info: dict = field(default_factory=lambda: {"tp_size": 1, "dtype": "auto", "device": "cpu"})
    base_url: str = ""
    paths: list = field(default_factory=list)
    bodies: list = field(default_factory=list)
    tensors: dict = field(default_factory=dict)
    checksums: dict = field(default_factory=dict)

    async def take(self, request: web.Request) -> web.Response:
        body = await request.json()
        path = request.path.strip("/")
        self.paths.append(path)
        self.bodies.append(body)
        if path == self.spoils:
            return web.json_response({"success": False, "message": self.says}, status=self.status)
        if path in ("begin_weight_update", "end_weight_update"):
            if not self.has_sessions:
                return web.json_response({"detail": "Not Found"}, status=404)
            is_begin = path == "begin_weight_update"
            if self.is_open and is_begin:
                told = {"success": False, "message": "a session is already open"}
                return web.json_response(told, status=400)
            if not self.is_open and not is_begin:
                told = {"success": False, "message": "no weight-update session is open"}
                return web.json_response(told, status=400)
            self.is_open = is_begin
        if path == self.hangs:
            await anyio.sleep_forever()
        if path == "abort_request":
            self.num_waiting = max(0, self.num_waiting - 1)
            return web.Response()
        if path == "flush_cache":
            is_done = self.can_flush and not self.num_waiting
            return web.Response(text="Flush cache.", status=200 if is_done else 400)
        if path == "weights_checker":
            if not self.has_checksums:
                return web.json_response({"success": False, "message": "Unsupported"}, status=400)
            ranks = [{"checksums": self.checksums}] * self.info["tp_size"]
            response = web.json_response({"ranks": ranks})
            response.force_close()  # as SGLang does five seconds later: hashes take longer
            return response
        if path == "update_weights_from_tensor":
            assert body["load_format"] == "flattened_bucket"
            (content,) = body["serialized_named_tensors"]
            bucket = pickle.loads(base64.b64decode(content))
            flat = bucket["flattened_tensor"]
            for meta in bucket["metadata"]:
                part = flat[meta.start_idx : meta.end_idx].view(meta.dtype)
                self.tensors[meta.name] = part.reshape(meta.shape)
        return web.json_response({"success": True, "message": ""})

    async def tell(self, request: web.Request) -> web.Response:
        if request.path == "/v1/loads":
            load = {"num_running_reqs": 0, "num_waiting_reqs": self.num_waiting}
            return web.json_response({"loads": [load]})
        return web.json_response(self.info)

    @property
    def is_paused(self) -> bool:
        """By the last of the two that it was told."""
        told = [path for path in self.paths if path.endswith("_generation")]
        return told[-1:] == ["pause_generation"]


@asynccontextmanager
async def receiving(**how):
    receiver = Receiver(**how)
    app = web.Application(client_max_size=2**28)
    app.router.add_post("/{path:.*}", receiver.take)
    app.router.add_get("/server_info", receiver.tell)
    app.router.add_get("/v1/loads", receiver.tell)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    receiver.base_url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield receiver
    finally:
        await runner.cleanup()


def expects(receiver, weights):
    """Have the receiver tell the checksums of ``weights`` in bfloat16, but for the biases."""
    on_gpu = receiver.info["device"] == "cuda"
    receiver.checksums = {
        sglang_name(name): checksum(
            tensor if name.endswith("correction_bias") else tensor.to(torch.bfloat16), on_gpu=on_gpu
        )
        for name, tensor in weights.items()
    }


@pytest.mark.parametrize("max_bytes", [1, 5_000, 2**30])
def test_buckets_hold_the_tensors_of_the_saved_checkpoint_bit_for_bit(model, tmp_path, max_bytes):
    checkpoint.save(model, tmp_path, dtype=torch.bfloat16)
    saved = load_file(tmp_path / "model.safetensors")
    found = {}
    tensors = list(checkpoint_tensors(model.config))
    for bucket in buckets(model.state_dict(), tensors, torch.bfloat16, max_bytes):
        if len(bucket.names) > 1:
            assert bucket.content.nbytes <= max_bytes
        start = 0
        for name, shape, dtype in zip(bucket.names, bucket.shapes, bucket.dtypes, strict=True):
            end = start + torch.Size(shape).numel() * dtype.itemsize
            found[name] = bucket.content[start:end].view(dtype).reshape(shape)
            start = end
        assert start == bucket.content.nbytes
    assert found.keys() == saved.keys()
    assert all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
        for name, tensor in saved.items()
    )


@pytest.mark.anyio
async def test_an_update_pauses_sends_all_verifies_and_goes_on(model, weights):
    async with receiving() as receiver:
        expects(receiver, weights)
        sink = SglangWeights(receiver.base_url, model.config, bucket_bytes=20_000)
        await sink.update_weights(weights, 4)
        await sink.aclose()
    assert (sink.weight_version, sink.is_verified) == (4, True)
    updates = receiver.paths.count("update_weights_from_tensor")
    assert updates > 2
    assert receiver.paths == [
        "pause_generation",
        "begin_weight_update",
        *["update_weights_from_tensor"] * updates,
        "end_weight_update",
        "flush_cache",
        "weights_checker",
        "continue_generation",
    ]
    sent = [body for body in receiver.bodies if "load_format" in body]
    assert [body.get("weight_version") for body in sent] == [None] * (updates - 1) + ["4"]
    assert not any(body["flush_cache"] for body in sent)
    names = {t.name for t in checkpoint_tensors(model.config) if not t.is_float32}
    assert receiver.tensors.keys() == names


@pytest.mark.parametrize(
    ("in_flight", "mode", "flushes"),
    [("retract", "retract", True), ("keep", "in_place", False), ("abort", "abort", True)],
)
@pytest.mark.anyio
async def test_requests_in_flight_are_retracted_kept_or_ended(
    model, weights, in_flight, mode, flushes
):
    async with receiving() as receiver:
        expects(receiver, weights)
        sink = SglangWeights(receiver.base_url, model.config, in_flight=in_flight)
        await sink.update_weights(weights, 1)
        await sink.aclose()
    assert receiver.bodies[0]["mode"] == mode
    assert ("flush_cache" in receiver.paths) is flushes


@pytest.mark.anyio
async def test_a_server_without_sessions_and_checksums_is_served_and_not_called_verified(
    model, weights, caplog
):
    async with receiving(has_sessions=False, has_checksums=False) as receiver:
        sink = SglangWeights(receiver.base_url, model.config)
        await sink.update_weights(weights, 1)
        await sink.aclose()
    assert sink.is_verified is False
    assert "not verified" in caplog.text
    assert receiver.paths[-1] == "continue_generation"


@pytest.mark.anyio
async def test_requests_that_a_server_cannot_keep_while_it_flushes_are_ended(model, weights):
    async with receiving(has_sessions=False, num_waiting=2) as receiver:
        expects(receiver, weights)
        sink = SglangWeights(receiver.base_url, model.config)
        await sink.update_weights(weights, 1)
        await sink.aclose()
    flushes = ["flush_cache", "abort_request", "flush_cache", "abort_request", "flush_cache"]
    assert receiver.paths[-7:] == [*flushes, "weights_checker", "continue_generation"]
    assert receiver.bodies[-6] == {"abort_all": True}
    assert sink.is_verified


@pytest.mark.anyio
async def test_a_server_that_cannot_flush_stays_paused_until_an_update_succeeds(model, weights):
    async with receiving(has_sessions=False, can_flush=False) as receiver:
        expects(receiver, weights)
        sink = SglangWeights(receiver.base_url, model.config)
        with pytest.raises(ModelError, match=r"keeps keys of the old.*stays paused until"):
            await sink.update_weights(weights, 1)
        assert receiver.is_paused
        receiver.can_flush = True
        await sink.update_weights(weights, 1)
        await sink.aclose()
    assert not receiver.is_paused


@pytest.mark.anyio
async def test_memory_is_given_back_only_by_a_server_without_requests(model, weights):
    async with receiving(num_waiting=2) as receiver:
        expects(receiver, weights)
        sink = SglangWeights(receiver.base_url, model.config)
        with pytest.raises(ModelError, match="holds 2 requests"):
            await sink.release_memory()
        assert receiver.paths == ["pause_generation", "continue_generation"]
        receiver.num_waiting = 0
        await sink.release_memory()
        await sink.resume_memory()
        await sink.update_weights(weights, 1)
        await sink.aclose()
    assert receiver.paths[2:6] == [
        "pause_generation",
        "release_memory_occupation",
        "resume_memory_occupation",
        "pause_generation",
    ]
    assert receiver.paths.count("continue_generation") == 2


@pytest.mark.anyio
async def test_what_does_not_fit_is_refused_whole_and_named(model, weights):
    name = "layers.1.self_attn.o_proj.weight"
    unlike = {
        "1 missing": {key: tensor for key, tensor in weights.items() if key != name},
        "1 extra": {**weights, "layers.9.norm": torch.zeros(1)},
        "1 misshapen": {**weights, name: weights[name][:-1]},
    }
    async with receiving() as receiver:
        sink: WeightSink = SglangWeights(receiver.base_url, model.config)
        for kind, state in unlike.items():
            with pytest.raises(ConfigError, match=kind) as caught:
                await sink.update_weights(state, 1)
            assert name in str(caught.value) or "layers.9.norm" in str(caught.value)
    assert receiver.paths == []
    assert sink.weight_version == 0


@pytest.mark.anyio
async def test_only_the_parameters_that_train_need_be_sent(model, weights):
    trained = {name: tensor for name, tensor in weights.items() if name.startswith("layers.")}
    async with receiving() as receiver:
        expects(receiver, weights)
        sink = SglangWeights(receiver.base_url, model.config, parameters=list(trained))
        await sink.update_weights(trained, 1)
        with pytest.raises(ConfigError, match="extra"):
            await sink.update_weights(weights, 2)
        await sink.aclose()
    assert all(".layers." in name for name in receiver.tensors)
    with pytest.raises(ConfigError, match=r"no parameter 'layers\.77'"):
        SglangWeights("http://a:1", model.config, parameters=["layers.77"])


@pytest.mark.parametrize("spoils", ["update_weights_from_tensor", "end_weight_update"])
@pytest.mark.anyio
async def test_a_server_that_may_hold_a_mixture_stays_paused_until_an_update_succeeds(
    model, weights, spoils
):
    async with receiving(spoils=spoils) as receiver:
        expects(receiver, weights)
        sink = SglangWeights(receiver.base_url, model.config)
        with pytest.raises(ModelError, match=r"no memory.*a mixture.*stays paused until"):
            await sink.update_weights(weights, 1)
        assert receiver.is_paused
        assert sink.weight_version == 0
        receiver.spoils = "begin_weight_update"  # the next breaks off before its first bucket
        with pytest.raises(ModelError, match=r"no memory.*a mixture.*stays paused until"):
            await sink.update_weights(weights, 1)
        assert receiver.is_paused
        receiver.spoils = ""
        await sink.update_weights(weights, 2)
        await sink.aclose()
    # It is paused anew each time: it may have been started again meanwhile.
    assert receiver.paths.count("pause_generation") == 3
    assert not receiver.is_paused


@pytest.mark.anyio
async def test_whatever_breaks_an_update_off_says_that_servers_stay_paused(
    model, weights, monkeypatch
):
    join, joined = sglang_weights._bucket, []

    def join_four(held):  # two buckets are ready before the first is sent
        joined.append(held)
        return join(held) if len(joined) < 4 else out_of_memory()

    async with receiving() as receiver:
        expects(receiver, weights)
        sink = SglangWeights(receiver.base_url, model.config, bucket_bytes=20_000)
        await sink.update_weights(weights, 1)
        assert sink.is_verified
        monkeypatch.setattr(sglang_weights, "_bucket", join_four)
        with pytest.raises(torch.OutOfMemoryError) as caught:
            await sink.update_weights(weights, 2)
        await sink.aclose()
    assert "a mixture" in caught.value.__notes__[0]
    assert (
        f"stays paused until an update succeeds: {receiver.base_url}" in caught.value.__notes__[0]
    )
    assert receiver.is_paused
    assert sink.is_verified is False


@pytest.mark.parametrize(
    "spoils", ["end_weight_update", "update_weights_from_disk", "release_memory_occupation"]
)
@pytest.mark.anyio
async def test_weights_that_may_be_others_than_those_verified_are_not_called_verified(
    model, weights, tmp_path, spoils
):
    checkpoint.save(model, tmp_path, dtype=torch.bfloat16)
    async with receiving() as receiver:
        expects(receiver, weights)
        sink = SglangWeights(receiver.base_url, model.config)
        await sink.update_weights(weights, 1)
        assert sink.is_verified
        receiver.spoils, receiver.says = spoils, "Failed to update weights"
        change = {
            "end_weight_update": lambda: sink.update_weights(weights, 2),
            "update_weights_from_disk": lambda: sink.load(tmp_path, 2),
            "release_memory_occupation": sink.release_memory,
        }[spoils]
        with pytest.raises(ModelError, match="stays paused until"):
            await change()
        await sink.aclose()
    assert sink.is_verified is False


@pytest.mark.parametrize("spoils", ["pause_generation", "begin_weight_update"])
@pytest.mark.anyio
async def test_servers_go_on_if_another_fails_before_the_first_bucket(model, weights, spoils):
    async with receiving() as healthy, receiving(spoils=spoils) as broken:
        sink = SglangWeights([healthy.base_url, broken.base_url], model.config)
        with pytest.raises(ModelError, match=r"no memory$"):
            await sink.update_weights(weights, 1)
        await sink.aclose()
    assert not healthy.is_paused
    assert not healthy.is_open
    assert "update_weights_from_tensor" not in healthy.paths


def out_of_memory(*_):
    raise torch.OutOfMemoryError("no memory for a bucket")


@pytest.mark.anyio
async def test_a_session_is_closed_before_servers_go_on_if_the_first_bucket_fails(
    model, weights, monkeypatch
):
    monkeypatch.setattr(sglang_weights, "_bucket", out_of_memory)
    async with receiving() as new, receiving(has_sessions=False) as old:
        sink = SglangWeights([new.base_url, old.base_url], model.config)
        with pytest.raises(torch.OutOfMemoryError) as caught:
            await sink.update_weights(weights, 1)
        await sink.aclose()
    for receiver in (new, old):
        assert receiver.paths == [
            "pause_generation",
            "begin_weight_update",
            "end_weight_update",
            "continue_generation",
        ]
    assert not new.is_open
    assert not hasattr(caught.value, "__notes__")


@pytest.mark.anyio
async def test_a_session_is_closed_before_a_server_goes_on_if_its_beginning_is_cancelled(
    model, weights
):
    async with receiving(hangs="begin_weight_update") as receiver:
        sink = SglangWeights(receiver.base_url, model.config)
        with anyio.move_on_after(0.5):
            await sink.update_weights(weights, 1)
        await sink.aclose()
    assert receiver.paths[1:] == [
        "begin_weight_update",
        "end_weight_update",
        "continue_generation",
    ]
    assert not receiver.is_open


@pytest.mark.anyio
async def test_a_server_whose_session_cannot_be_closed_stays_paused_until_an_update_succeeds(
    model, weights, monkeypatch
):
    async with receiving(spoils="end_weight_update") as receiver:
        expects(receiver, weights)
        sink = SglangWeights(receiver.base_url, model.config)
        with monkeypatch.context() as patched:
            patched.setattr(sglang_weights, "_bucket", out_of_memory)
            with pytest.raises(torch.OutOfMemoryError):
                await sink.update_weights(weights, 1)
        assert receiver.is_paused
        receiver.spoils = ""
        await sink.update_weights(weights, 1)
        await sink.aclose()
    assert not receiver.is_paused
    assert not receiver.is_open


@pytest.mark.anyio
async def test_a_session_that_was_left_open_ends_before_a_checkpoint_is_read(
    model, weights, monkeypatch, tmp_path
):
    checkpoint.save(model, tmp_path, dtype=torch.bfloat16)
    async with receiving(spoils="end_weight_update") as receiver:
        expects(receiver, weights)
        sink = SglangWeights(receiver.base_url, model.config)
        with monkeypatch.context() as patched:
            patched.setattr(sglang_weights, "_bucket", out_of_memory)
            with pytest.raises(torch.OutOfMemoryError):
                await sink.update_weights(weights, 1)
        receiver.spoils, before = "", len(receiver.paths)
        await sink.load(tmp_path, 1)
        await sink.aclose()
    told = receiver.paths[before:]
    assert told.count("end_weight_update") == 1
    assert told.index("end_weight_update") < told.index("update_weights_from_disk")
    assert not receiver.is_paused


@pytest.mark.anyio
async def test_updated_servers_go_on_if_the_update_is_cancelled_at_its_last_step(
    model, weights, monkeypatch
):
    async with receiving() as receiver:
        expects(receiver, weights)
        sink = SglangWeights(receiver.base_url, model.config)
        with anyio.CancelScope() as scope:

            def cancelling(tensor, *, on_gpu):
                anyio.from_thread.run_sync(scope.cancel)
                return checksum(tensor, on_gpu=on_gpu)

            monkeypatch.setattr(sglang_weights, "checksum", cancelling)
            await sink.update_weights(weights, 1)
        await sink.aclose()
    assert (sink.weight_version, sink.is_verified) == (1, True)
    assert not receiver.is_paused


@pytest.mark.anyio
async def test_a_server_that_does_not_go_on_is_named(model, weights, monkeypatch):
    monkeypatch.setattr(sglang_weights, "UNDO_S", 0.3)
    async with receiving() as good, receiving(hangs="continue_generation") as silent:
        sink = SglangWeights([good.base_url, silent.base_url], model.config, verifies=False)
        with pytest.raises(ModelError, match=f"{silent.base_url} .*may stay paused"):
            await sink.update_weights(weights, 1)
        monkeypatch.setattr(sglang_weights, "_bucket", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError) as caught:
            await sink.update_weights(weights, 1)
        await sink.aclose()
    assert f"{silent.base_url} was told to go on" in caught.value.__notes__[0]
    assert not good.is_paused


@pytest.mark.anyio
async def test_a_server_that_does_not_answer_is_told_before_another_is_paused(model, weights):
    async with receiving() as healthy:
        async with receiving() as dead:
            pass
        sink = SglangWeights([healthy.base_url, dead.base_url], model.config)
        with pytest.raises(ModelError, match=dead.base_url):
            await sink.update_weights(weights, 1)
        await sink.aclose()
    assert healthy.paths == []


@pytest.mark.anyio
async def test_servers_go_on_if_one_of_them_holds_requests_and_no_memory_is_given_back(model):
    async with receiving() as idle, receiving(num_waiting=1) as busy:
        sink = SglangWeights([idle.base_url, busy.base_url], model.config)
        with pytest.raises(ModelError, match="holds 1 requests"):
            await sink.release_memory()
        await sink.aclose()
    for receiver in (idle, busy):
        assert receiver.paths == ["pause_generation", "continue_generation"]


@pytest.mark.anyio
async def test_a_server_that_refuses_a_checkpoint_goes_on_and_the_others_have_it(model, tmp_path):
    checkpoint.save(model, tmp_path, dtype=torch.bfloat16)
    async with receiving() as good, receiving(spoils="update_weights_from_disk") as refusing:
        sink = SglangWeights([good.base_url, refusing.base_url], model.config)
        with pytest.raises(ModelError, match=r"no memory$"):
            await sink.load(tmp_path, 1)
        await sink.aclose()
    assert good.paths[1:] == ["update_weights_from_disk", "flush_cache", "continue_generation"]
    assert not refusing.is_paused
    assert sink.weight_version == 0


@pytest.mark.anyio
async def test_a_server_that_breaks_off_while_it_reads_a_checkpoint_stays_paused(model, tmp_path):
    checkpoint.save(model, tmp_path, dtype=torch.bfloat16)
    says = "Failed to update weights: bad file.\nRolling back to original weights."
    async with receiving(spoils="update_weights_from_disk", says=says) as receiver:
        sink = SglangWeights(receiver.base_url, model.config)
        with pytest.raises(ModelError, match=r"(?s)bad file.*stays paused until"):
            await sink.load(tmp_path, 1)
        assert receiver.is_paused
        receiver.spoils = ""
        await sink.load(tmp_path, 2)
        await sink.aclose()
    assert not receiver.is_paused


@pytest.mark.parametrize("status", [502, 504])
@pytest.mark.anyio
async def test_a_server_stays_paused_if_its_gateway_answers_while_it_reads_a_checkpoint(
    model, tmp_path, status
):
    checkpoint.save(model, tmp_path, dtype=torch.bfloat16)
    how = {"spoils": "update_weights_from_disk", "says": "Gateway Time-out", "status": status}
    async with receiving(**how) as receiver:
        sink = SglangWeights(receiver.base_url, model.config)
        with pytest.raises(ModelError, match=r"Gateway Time-out.*stays paused until"):
            await sink.load(tmp_path, 1)
        await sink.aclose()
    assert receiver.is_paused


@pytest.mark.anyio
async def test_servers_get_the_whole_path_of_a_checkpoint(model, tmp_path, monkeypatch):
    checkpoint.save(model, tmp_path / "new", dtype=torch.bfloat16)
    monkeypatch.chdir(tmp_path)
    async with receiving() as receiver:
        sink = SglangWeights(receiver.base_url, model.config)
        await sink.load("new", 1)
        await sink.aclose()
    assert receiver.bodies[1]["model_path"] == str(tmp_path / "new")


@pytest.mark.anyio
async def test_a_session_that_a_dead_trainer_left_open_is_closed_first(model, weights):
    async with receiving(is_open=True) as receiver:
        expects(receiver, weights)
        sink = SglangWeights(receiver.base_url, model.config)
        await sink.update_weights(weights, 1)
        await sink.aclose()
    assert receiver.paths[1:4] == [
        "begin_weight_update",
        "end_weight_update",
        "begin_weight_update",
    ]
    assert not receiver.is_open


@pytest.mark.anyio
async def test_checksums_that_differ_are_an_error_that_names_the_tensor(model, weights):
    async with receiving() as receiver:
        expects(receiver, weights)
        receiver.checksums["language_model.model.norm.weight"] = "0" * 16
        sink = SglangWeights(receiver.base_url, model.config)
        with pytest.raises(ModelError, match=r"1 tensors differ, the first is norm\.weight"):
            await sink.update_weights(weights, 1)
        await sink.aclose()
    assert "continue_generation" not in receiver.paths


@pytest.mark.anyio
async def test_the_device_of_the_server_says_how_it_hashes(model, weights):
    async with receiving() as on_cpu, receiving() as on_gpu:
        on_gpu.info["device"] = "cuda"
        expects(on_cpu, weights)
        expects(on_gpu, weights)
        assert on_cpu.checksums != on_gpu.checksums
        sink = SglangWeights([on_cpu.base_url, on_gpu.base_url], model.config)
        await sink.update_weights(weights, 1)
        assert sink.is_verified
        on_gpu.checksums["language_model.model.norm.weight"] = "0" * 16
        with pytest.raises(ModelError, match=r"1 tensors differ, the first is norm\.weight"):
            await sink.update_weights(weights, 2)
        await sink.aclose()


@pytest.mark.parametrize("differing", ["", "experts.w13_weight"])
@pytest.mark.anyio
async def test_a_good_update_is_not_called_bad_by_a_server_that_keeps_or_hashes_in_another_way(
    model, weights, caplog, differing
):
    async with receiving() as receiver:
        expects(receiver, weights)
        for name in receiver.checksums:
            if differing in name:
                receiver.checksums[name] = "0" * 16
        sink = SglangWeights(receiver.base_url, model.config)
        for version in (1, 2):
            await sink.update_weights(weights, version)
            assert sink.is_verified is False
        await sink.aclose()
    assert not receiver.is_paused
    assert caplog.text.count("not verified") == 1


@pytest.mark.anyio
async def test_a_server_with_tensors_in_parts_is_not_called_verified(model, weights, caplog):
    async with receiving() as whole, receiving() as parted:
        parted.info["tp_size"] = 2
        expects(whole, weights)
        sink = SglangWeights([parted.base_url, whole.base_url], model.config)
        assert not await sink.verify(weights)
        whole.checksums["language_model.model.norm.weight"] = "0" * 16
        with pytest.raises(ModelError, match="differ"):  # the other is compared all the same
            await sink.verify(weights)
        await sink.aclose()
    assert "no checksums of whole tensors" in caplog.text


@pytest.mark.anyio
async def test_a_server_that_passed_over_experts_because_its_own_are_packed_is_found_out(
    model, weights
):
    async with receiving() as receiver:
        expects(receiver, weights)
        for name in list(receiver.checksums):
            if ".experts." in name:
                receiver.checksums[f"{name}_packed"] = receiver.checksums.pop(name)
        sink = SglangWeights(receiver.base_url, model.config)
        with pytest.raises(ModelError, match=r"experts\.gate_up_proj"):
            await sink.update_weights(weights, 1)
        await sink.aclose()
    assert receiver.is_paused


@pytest.mark.anyio
async def test_who_has_the_weights_of_a_loaded_checkpoint_verifies_them(model, weights, tmp_path):
    checkpoint.save(model, tmp_path, dtype=torch.bfloat16)
    async with receiving() as receiver:
        expects(receiver, weights)
        sink = SglangWeights(receiver.base_url, model.config)
        await sink.load(tmp_path, 1)
        assert sink.is_verified is False
        assert await sink.verify(weights)
        assert sink.is_verified
        await sink.aclose()


@pytest.mark.anyio
async def test_the_whole_state_of_a_model_is_verified_its_correction_biases_too(model):
    state = model.state_dict()
    bias = next(name for name in state if name.endswith("e_score_correction_bias"))
    async with receiving() as receiver:
        expects(receiver, state)
        sink = SglangWeights(receiver.base_url, model.config)
        assert await sink.verify(state)
        with pytest.raises(ModelError, match=f"1 tensors differ, the first is {bias}"):
            await sink.verify({**state, bias: state[bias] + 1})
        await sink.aclose()


@pytest.mark.anyio
async def test_a_checkpoint_on_disk_is_checked_by_its_headers_before_the_server_reads_it(
    model, tmp_path
):
    good, short, broken = tmp_path / "good", tmp_path / "short", tmp_path / "broken"
    checkpoint.save(model, good, dtype=torch.bfloat16, max_shard_bytes=50_000)
    shards = sorted(good.glob("*.safetensors"))
    assert len(shards) > 1
    tensors = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    short.mkdir()
    tensors["language_model.lm_head.weight"] = tensors["language_model.lm_head.weight"][:-1].clone()
    del tensors["language_model.model.norm.weight"]
    save_file(tensors, short / "model.safetensors")
    broken.mkdir()
    (broken / "model.safetensors").write_bytes(shards[0].read_bytes()[:1000])
    async with receiving() as receiver:
        sink = SglangWeights(receiver.base_url, model.config)
        with pytest.raises(ConfigError, match=r"1 missing .*norm.*1 misshapen .*lm_head"):
            await sink.load(short, 1)
        with pytest.raises(ConfigError, match=r"broken/model\.safetensors is damaged"):
            await sink.load(broken, 1)
        with pytest.raises(ConfigError, match=r"model\.safetensors is missing"):
            await sink.load(tmp_path, 1)
        assert receiver.paths == []
        await sink.load(good, 3)
        await sink.aclose()
    assert receiver.paths[1] == "update_weights_from_disk"
    assert receiver.bodies[1]["weight_version"] == "3"
    assert sink.weight_version == 3


@pytest.mark.parametrize("tells", [True, False])
@pytest.mark.anyio
async def test_a_server_of_quantized_weights_is_refused_before_anything_is_sent(
    model, weights, tmp_path, tells
):
    described = {"quantization_config": {"quant_method": "compressed-tensors"}}
    (tmp_path / "config.json").write_text(json.dumps(described))
    async with receiving() as receiver:
        more = {"quantization": "compressed-tensors"} if tells else {"model_path": str(tmp_path)}
        receiver.info |= more
        sink = SglangWeights(receiver.base_url, model.config)
        with pytest.raises(ConfigError, match=r"quantized weights \(compressed-tensors\).*\.load"):
            await sink.update_weights(weights, 1)
        await sink.aclose()
    assert receiver.paths == []


@pytest.mark.anyio
async def test_a_server_loads_checkpoints_of_its_own_form_alone(model, tmp_path):
    checkpoint.save(model, tmp_path / "int4", is_int4=True)
    checkpoint.save(model, tmp_path / "bf16", dtype=torch.bfloat16)
    async with receiving() as int4, receiving() as bf16:
        int4.info["model_path"] = str(tmp_path / "int4")
        bf16.info["model_path"] = str(tmp_path / "bf16")
        for receiver, own, other in ((int4, "int4", "bf16"), (bf16, "bf16", "int4")):
            sink = SglangWeights(receiver.base_url, model.config)
            with pytest.raises(ConfigError, match=f"convert SRC DST --to {own}"):
                await sink.load(tmp_path / other, 1)
            assert receiver.paths == []
            await sink.load(tmp_path / own, 1)
            await sink.aclose()
            assert "update_weights_from_disk" in receiver.paths


@pytest.mark.anyio
async def test_frozen_weights_refuse_every_update(weights):
    sink: WeightSink = FrozenWeights(2)
    with pytest.raises(ConfigError, match="frozen"):
        await sink.update_weights(weights, 3)
    assert sink.weight_version == 2


@pytest.mark.anyio
async def test_the_way_over_a_process_group_needs_the_group(model, weights):
    async with receiving() as receiver:
        sink = SglangWeights(receiver.base_url, model.config, way="distributed")
        with pytest.raises(ConfigError, match="join"):
            await sink.update_weights(weights, 1)
        await sink.aclose()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


RANK_1 = """
import datetime, sys, time
from torch.distributed import distributed_c10d as c10d
from torch.distributed.rendezvous import rendezvous
print("ready", flush=True)
store, _, _ = next(rendezvous("tcp://127.0.0.1:" + sys.argv[1], 1, 2))
name, backend = c10d.GroupName("swarm_weights"), c10d.Backend("gloo")
store, wait = c10d.PrefixStore("swarm_weights", store), datetime.timedelta(seconds=60)
c10d._new_process_group_helper(2, 1, [], backend, store, group_name=name, timeout=wait)
time.sleep(60)
"""


@pytest.mark.anyio
async def test_a_server_that_refuses_to_join_is_told_at_once_as_one_error(model):
    async with receiving(spoils="init_weights_update_group") as receiver:
        sink = SglangWeights(
            receiver.base_url, model.config, way="distributed", group_timeout_s=8.0
        )
        began_s = time.monotonic()
        with pytest.raises(ModelError, match=r"no memory$"):
            await sink.join("127.0.0.1", free_port())
        assert time.monotonic() - began_s < 7.0
        await sink.aclose()


@pytest.mark.anyio
async def test_a_server_that_never_joins_is_told_after_the_timeout_of_the_group(model):
    async with receiving() as receiver:
        sink = SglangWeights(
            receiver.base_url, model.config, way="distributed", group_timeout_s=1.0
        )
        with pytest.raises(ModelError, match="process group failed"):
            await sink.join("127.0.0.1", free_port())
        await sink.aclose()


@pytest.mark.parametrize(
    ("spoils", "timeout_s", "says"),
    [
        ("update_weights_from_distributed", 60.0, "no memory"),
        ("", 2.0, "no answer within 2 s; join again"),
    ],
)
@pytest.mark.anyio
async def test_a_broadcast_that_a_server_does_not_take_ends_soon_as_one_error(
    model, weights, spoils, timeout_s, says
):
    async with receiving(spoils=spoils) as receiver:
        sink = SglangWeights(
            receiver.base_url, model.config, way="distributed", group_timeout_s=timeout_s
        )
        port = free_port()
        command = [sys.executable, "-c", RANK_1, str(port)]
        rank_1 = await anyio.open_process(command, stderr=None)
        try:
            assert b"ready" in await rank_1.stdout.receive()
            await sink.join("127.0.0.1", port)
            began_s = time.monotonic()
            with pytest.raises(ModelError, match=says + r".*stays paused until"):
                await sink.update_weights(weights, 1)
            assert time.monotonic() - began_s < 10.0
        finally:
            rank_1.kill()
            await rank_1.aclose()
        with pytest.raises(ConfigError, match="join"):
            await sink.update_weights(weights, 1)
        await sink.aclose()
    assert receiver.is_paused
