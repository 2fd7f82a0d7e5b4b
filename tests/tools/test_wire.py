import hashlib
import hmac
import json

from hypothesis import given
from hypothesis import strategies as st

from swarm_sdk.tools.sandbox.kernel import _Cell
from swarm_sdk.tools.sandbox.output import CellOutput
from swarm_sdk.tools.sandbox.wire import packed, unpacked

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
