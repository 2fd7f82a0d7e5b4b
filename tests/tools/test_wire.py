import hashlib
import hmac
import json

import pytest
import zmq
import zmq.asyncio
from hypothesis import given
from hypothesis import strategies as st

from swarm_sdk.tools.sandbox.kernel import _Cell
from swarm_sdk.tools.sandbox.output import CellOutput
from swarm_sdk.tools.sandbox.wire import MAX_MESSAGE_BYTES, Wire, _framed, _Peer, packed, unpacked

KEY = b"key"
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)
KINDS = st.sampled_from(
    ["status", "stream", "display_data", "execute_result", "error", "execute_input"]
) | st.just("execute_reply")
MIMES = ["image/png", "text/plain", "swarm", "application/x-swarm-cut"]
CONTENTS = st.dictionaries(
    st.sampled_from(["data", "metadata"]), st.dictionaries(st.sampled_from(MIMES), JSON)
)


def frames(*parts, key=KEY):
    encoded = [part if isinstance(part, bytes) else json.dumps(part).encode() for part in parts]
    signature = hmac.new(key, b"".join(encoded), hashlib.sha256).hexdigest().encode()
    return [b"topic", b"<IDS|MSG>", signature, *encoded]


def test_a_request_is_signed_and_readable():
    number, made = packed("execute_request", {"code": "1"}, KEY)
    heard = unpacked(made, KEY)
    assert (heard.kind, heard.parent, heard.content) == ("execute_request", "", {"code": "1"})
    assert json.loads(made[2])["msg_id"] == number
    assert unpacked(made, b"another") is None


@given(st.lists(st.binary(max_size=40), max_size=8))
def test_frames_that_are_no_message_are_none(garbage):
    assert unpacked(garbage, KEY) is None
    assert unpacked([b"<IDS|MSG>", *garbage], KEY) is None


@given(st.lists(JSON, min_size=4, max_size=4))
def test_signed_parts_that_are_no_objects_are_none(parts):
    heard = unpacked(frames(*parts), KEY)
    assert (heard is None) != all(isinstance(part, dict) for part in parts)


def test_nested_and_endless_json_is_none():
    assert unpacked(frames(*[b"[" * 10**5 + b"]" * 10**5] * 4), KEY) is None
    assert unpacked(frames(*[b'{"a": ' + b"9" * 10**5 + b"}"] * 4), KEY) is None


@given(
    st.lists(st.tuples(KINDS, st.dictionaries(st.sampled_from(
        ["data", "metadata", "text", "name", "ename", "evalue", "traceback", "execution_state",
         "execution_count", "payload", "swarm", "status", "image/png", "text/plain"]), JSON))),
)  # fmt: skip
def test_no_content_of_a_forged_message_breaks_the_client(messages):
    output = CellOutput("1 / 0\n", max_chars=200)
    cell = _Cell("request", output, 0)
    for kind, content in messages:
        header, parent = {"msg_type": kind}, {"msg_id": "request"}
        cell.hear(unpacked(frames(header, parent, {}, content), KEY))
    assert len(output.text) < 400
    assert all(isinstance(name, str) for name in cell.variables)
    assert cell.asks_to_exit in (True, False)


@given(CONTENTS)
def test_no_forged_display_breaks_the_output(content):
    output = CellOutput("x", max_chars=100)
    output.add("display_data", content)
    assert output.images == ()
    assert isinstance(output.text, str)


def test_messages_of_another_cell_are_not_heard():
    cell = _Cell("mine", CellOutput("", max_chars=100), 0)
    for parent in ({"msg_id": "other"}, {}):
        cell.hear(unpacked(frames({"msg_type": "stream"}, parent, {}, {"text": "no"}), KEY))
    assert cell.output.text == ""
    assert not cell.has_begun


GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"NULL".ljust(52, b"\0")
READY = _framed(b"\x05READY", 4)


class Cut:
    """A transport that remembers whether it was cut off."""

    def __init__(self):
        self.is_cut, self.is_paused = False, False

    def abort(self):
        self.is_cut = True

    def write(self, data):
        pass

    def is_closing(self):
        return self.is_cut

    def pause_reading(self):
        self.is_paused = True

    def resume_reading(self):
        self.is_paused = False


def fed(data, size):
    """A peer that was given ``data`` in pieces, and its transport."""
    peer, transport = _Peer(lambda: None), Cut()
    peer.connection_made(transport)
    for start in range(0, len(data), size):
        if not transport.is_cut:
            peer.data_received(data[start : start + size])
    return peer, transport


def message(frames):
    return b"".join(_framed(one, 1) for one in frames[:-1]) + _framed(frames[-1], 0)


@given(
    st.lists(st.lists(st.binary(max_size=300), min_size=1, max_size=5), max_size=5),
    st.integers(1, 400),
)
def test_messages_are_whole_however_their_bytes_arrive(messages, size):
    peer, transport = fed(GREETING + READY + b"".join(map(message, messages)), size)
    assert not transport.is_cut
    assert [peer.take() for _ in messages] == messages
    assert peer.take() is None


@given(st.binary(max_size=600), st.sampled_from([b"", GREETING, GREETING + READY]))
def test_no_bytes_raise_and_none_are_held_beyond_one_frame(noise, before):
    peer, _ = fed(before + noise, 50)
    assert len(peer._buffer) <= len(noise) + 64


def test_who_is_no_peer_or_sends_without_an_end_is_cut_off():
    frame = b"\x03" + (2**20).to_bytes(8, "big") + bytes(2**20)
    for data in (
        b"HTTP/1.1 200 OK".ljust(64),
        GREETING + READY + b"\x02" + (MAX_MESSAGE_BYTES + 1).to_bytes(8, "big"),
        GREETING + READY + b"\x06" + (2**63).to_bytes(8, "big"),
        GREETING + READY + frame * 13,
        GREETING + READY + b"\x01\x00" * 65,
    ):
        peer, transport = fed(data, 2**16)
        assert transport.is_cut
        assert peer.take() is None


def test_what_nobody_asks_for_waits_at_the_other_end():
    peer, transport = fed(GREETING + READY + message([bytes(2**20)]) * 30, 2**18)
    assert transport.is_paused
    for _ in range(30):
        assert peer.take() == [bytes(2**20)]
    assert not transport.is_paused


@pytest.mark.anyio
async def test_it_speaks_with_libzmq(tmp_path):
    context = zmq.asyncio.Context()
    shell, iopub = context.socket(zmq.ROUTER), context.socket(zmq.XPUB)
    shell.bind(f"ipc://{tmp_path}/s-1")
    iopub.bind(f"ipc://{tmp_path}/s-2")
    wire = await Wire.connect(f"{tmp_path}/s", KEY)
    number = wire.send("execute_request", {"code": "x" * 70_000})
    identity, *request = await shell.recv_multipart()
    assert unpacked(request, KEY).content == {"code": "x" * 70_000}
    assert await iopub.recv_multipart() == [b"\x01"]
    answer = frames({"msg_type": "status"}, {"msg_id": number}, {}, {"text": "y" * 300_000})
    await iopub.send_multipart(answer)
    await shell.send_multipart([identity, *answer[1:]])
    for take in (wire.output, wire.reply):
        while (heard := take()) is None:
            await wire.news()
        assert (heard.parent, len(heard.content["text"])) == (number, 300_000)
    wire.close()
    context.destroy(linger=0)
    with pytest.raises(OSError, match="No such file"):
        await Wire.connect(f"{tmp_path}/t", KEY)
