import os

import anyio
import pytest

from swarm_sdk.errors import ConfigError
from swarm_sdk.tools.sandbox.files import (
    InputFolder,
    check_file_names,
    clear_folder,
    collect,
    open_folder,
)
from swarm_sdk.tools.sandbox.kernel import KernelSandbox
from swarm_sdk.types import Image

pytestmark = pytest.mark.anyio


def collected(path, **caps):
    folder = os.open(path, os.O_RDONLY)
    try:
        return collect(folder, **caps)
    finally:
        os.close(folder)


def test_plain_files_are_collected_and_all_else_is_named(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.txt").write_bytes(b"text")
    (tmp_path / "a" / "link").symlink_to("/etc/passwd")
    (tmp_path / "out").symlink_to("/etc")
    os.mkfifo(tmp_path / "pipe")
    found = collected(tmp_path)
    assert [(file.path, file.data) for file in found.files] == [("a/b.txt", b"text")]
    assert set(found.left_out) == {"a/link", "pipe"}


def test_caps_hold_and_what_they_cut_is_named(tmp_path):
    for name, size in (("a", 10), ("b", 200), ("c", 60), ("d", 60)):
        (tmp_path / name).write_bytes(bytes(size))
    found = collected(tmp_path, max_file_bytes=100, max_total_bytes=100)
    assert ([file.path for file in found.files], found.left_out) == (["a", "c"], ("b", "d"))
    found = collected(tmp_path, max_files=1)
    assert [file.path for file in found.files] == ["a"]


def test_a_tree_without_end_is_left_out(tmp_path):
    folder = tmp_path
    for _ in range(30):
        folder /= "d"
        folder.mkdir()
    (folder / "deep").write_bytes(b"")
    assert collected(tmp_path).files == ()


def test_the_index_names_files_in_the_order_in_which_they_were_given(tmp_path):
    folder = InputFolder(tmp_path / "in")
    folder.put([Image(b"1", name="b.png"), Image(b"2", name="a.png")])
    folder.put([Image(b"3", name="b.png"), Image(b"4")])
    assert (tmp_path / "in" / "b.png").read_bytes() == b"3"
    assert (tmp_path / "in" / ".index.json").read_text() == '["b.png", "a.png"]'
    with pytest.raises(ConfigError, match="index"):
        check_file_names([Image(b"", name=".index.json")])


async def test_files_go_in_read_only_and_come_out_with_caps():
    async with KernelSandbox([Image(b"given", name="in.txt")]) as sandbox:
        code = "open('out.txt', 'w').write(open('in.txt').read() * 2)\n"
        code += "import os; os.symlink('/etc/passwd', 'p')\nopen('in.txt', 'w')"
        result = await sandbox.run(code, timeout_s=10)
        assert "PermissionError" in result.text or "Read-only" in result.text
        outputs = sandbox.outputs()
        assert [(file.path, file.data) for file in outputs.files] == [("out.txt", b"givengiven")]
        sandbox.put([Image(b"more", name="later.txt")])
        assert (await sandbox.run("open('later.txt').read()", timeout_s=10)).text == "'more'"


async def test_files_outlive_the_process_and_not_the_sandbox():
    async with KernelSandbox() as sandbox:
        await sandbox.run("open('kept', 'w').write('x'); import os; os._exit(1)", timeout_s=10)
        result = await sandbox.run("open('kept').read()", timeout_s=10)
        assert result.text.endswith("'x'")
        store = f"{sandbox._zygote._folder}/stores/{sandbox._name}"
    assert not await anyio.Path(store).exists()


def test_a_folder_that_was_replaced_by_a_link_is_neither_read_nor_cleared(tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "file").write_text("canary")
    (tmp_path / "home").symlink_to(tmp_path / "secret")
    folder = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(OSError, match="home"):
        open_folder("home", folder)
    os.close(folder)
    with pytest.raises(OSError, match="home"):
        clear_folder(str(tmp_path / "home"))
    assert (tmp_path / "secret" / "file").exists()
    clear_folder(str(tmp_path / "secret"))
    assert not (tmp_path / "secret" / "file").exists()
