import base64

from hypothesis import given
from hypothesis import strategies as st

from swarm_sdk.tools.sandbox.output import MAX_IMAGES, CellOutput, ClippedText

PNG = b"\x89PNG\r\n\x1a\n" + bytes(20)


def output(*messages, code="", max_chars=1000):
    made = CellOutput(code, max_chars=max_chars)
    for kind, content in messages:
        made.add(kind, content)
    return made


def shown(data):
    return "display_data", {"data": {"image/png": data, "text/plain": "<Figure>"}}


@given(st.lists(st.text()), st.integers(0, 30))
def test_clipping_keeps_head_and_tail_and_counts_the_rest(pieces, max_chars):
    whole, clipped = "".join(pieces), ClippedText(max_chars)
    for piece in pieces:
        clipped.add(piece)
    assert clipped.num_dropped == max(0, len(whole) - max_chars)
    if len(whole) <= max_chars:
        assert str(clipped) == whole
    else:
        head, tail = whole[: (max_chars + 1) // 2], whole[len(whole) - max_chars // 2 :]
        assert str(clipped) == f"{head}\n[{clipped.num_dropped} characters cut]\n{tail}"


def test_prints_and_values_stand_in_their_order_on_lines_of_their_own():
    made = output(
        ("stream", {"name": "stdout", "text": "a\n"}),
        ("stream", {"name": "stderr", "text": "no end"}),
        ("execute_result", {"data": {"text/plain": "3"}}),
        ("status", {"execution_state": "idle"}),
    )
    assert made.text == "a\nno end\n3"
    assert not made.has_error


def test_progress_lines_and_terminal_escapes_are_cleaned():
    text = "\x1b[31mred\x1b[0m\r\n10%\r50%\r100%\nlast\r"
    assert output(("stream", {"text": text})).text == "red\n100%\nlast"


def test_an_error_tells_the_innermost_line_of_this_cell():
    trace = ["Cell In[2], line 1", "File lib.py:7", "Cell In[1], line 9", "boom"]
    made = output(
        ("execute_input", {"execution_count": 2}),
        ("error", {"ename": "ValueError", "evalue": "boom", "traceback": trace}),
        code="f(0)",
    )
    assert made.text == "ValueError: boom\n  line 1: f(0)"
    assert made.has_error


def test_an_error_without_a_place_is_one_line():
    made = output(("error", {"ename": "KeyboardInterrupt", "evalue": "", "traceback": []}))
    assert made.text == "KeyboardInterrupt"


def test_pictures_are_decoded_checked_and_counted():
    encoded = base64.b64encode(PNG).decode()
    made = output(*[shown(encoded + "\n")] * (MAX_IMAGES + 1), shown("@@"), shown("R0lGODlh"))
    assert len(made.images) == MAX_IMAGES
    assert made.images[0].data == PNG
    assert f"[a picture was left out; a cell can show {MAX_IMAGES}]" in made.text
    assert made.text.count("[a picture that is no PNG was left out]") == 2
