import hashlib
import time
from contextlib import contextmanager
from pathlib import Path

import anyio
import pytest

from swarm_sdk.errors import ConfigError, SandboxDied
from swarm_sdk.tools.sandbox.kernel import KernelSandbox
from swarm_sdk.tools.sandbox.pool import KernelPool
from swarm_sdk.types import Image

pytestmark = pytest.mark.anyio
FILE = Image(b"bytes", name="coins.png")


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def children_of(pid):
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


@contextmanager
def at_most(limit_s):
    started = time.perf_counter()
    yield
    assert time.perf_counter() - started < limit_s


async def run(sandbox, code, timeout_s=20.0):
    result = await sandbox.run(code, timeout_s=timeout_s)
    return result.status, result.text


async def test_a_session_keeps_variables_and_tells_what_happened(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "canary")
    async with KernelSandbox([FILE], max_chars=200) as sandbox:
        assert await run(sandbox, "x = 41") == ("ok", "")
        assert await run(sandbox, "print('a')\nx + 1") == ("ok", "a\n42")
        status, text = await run(sandbox, "y = 0\nprint('before')\n1 / y")
        assert (status, text) == (
            "error",
            "before\nZeroDivisionError: division by zero\n  line 3: 1 / y",
        )
        status, text = await run(sandbox, "x = = 2")
        assert (status, text) == ("error", "SyntaxError: invalid syntax\n  line 1: x = = 2")
        assert (await run(sandbox, "input()"))[0] == "error"
        assert await run(sandbox, "open('coins.png', 'rb').read()") == ("ok", "b'bytes'")
        assert await run(sandbox, "import os; 'SECRET_TOKEN' in os.environ") == ("ok", "False")
        assert await run(sandbox, "open('/proc/self/environ').read().count('canary')") == (
            "ok",
            "0",
        )
        assert await run(sandbox, "await __import__('asyncio').sleep(0, 7)") == ("ok", "7")
        long = await sandbox.run("print('head', '.' * 5000, 'tail')", timeout_s=20)
        assert long.num_dropped_chars == 5011 - 200
        assert long.text.startswith("head ..")
        assert long.text.endswith(".. tail")
        assert long.wall_s > 0


async def test_plots_and_pictures_come_back_as_png():
    async with KernelSandbox() as sandbox:
        code = "import matplotlib.pyplot as plt\nplt.plot([1, 2]);"
        plot = await sandbox.run(code, timeout_s=60)
        assert [image.data[:4] for image in plot.images] == [b"\x89PNG"]
        code = "from PIL import Image\nImage.new('L', (4, 3))"
        picture = await sandbox.run(code, timeout_s=20)
        assert [image.media_type for image in picture.images] == ["image/png"]


async def test_a_late_cell_is_interrupted_and_variables_are_kept():
    async with KernelSandbox() as sandbox:
        await run(sandbox, "x = 1")
        with at_most(8):
            status, text = await run(sandbox, "print('on')\nwhile True: pass", timeout_s=0.5)
        assert status == "wall_timeout"
        assert text.startswith("on\nKeyboardInterrupt")
        assert text.endswith("[stopped after 0.5 s; variables are kept]")
        assert await run(sandbox, "x") == ("ok", "1")


async def test_endless_output_is_cut_and_stopped():
    async with KernelSandbox() as sandbox:
        with at_most(15):
            result = await sandbox.run("while True: print('x' * 999)", timeout_s=0.5)
        assert result.status in ("output_limit", "wall_timeout")
        assert len(result.text) < 4300
        assert result.num_dropped_chars > 10_000


async def test_a_cell_that_ignores_the_interrupt_is_killed_and_the_loss_is_told():
    async with KernelSandbox([FILE], interrupt_grace_s=0.3) as sandbox:
        first = sandbox.pid
        code = "x = 1\nimport signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        with at_most(8):
            status, text = await run(sandbox, code + "while True: time.sleep(1)", timeout_s=0.5)
        assert status == "wall_timeout"
        assert "did not stop after 0.5 s and its process was killed: variables are lost" in text
        assert not is_running(first)
        status, text = await run(sandbox, "x")
        assert status == "error"
        assert "variables are lost" in text
        assert "NameError" in text
        assert await run(sandbox, "open('coins.png').read()") == ("ok", "'bytes'")


@pytest.mark.parametrize("code", ["import os; os._exit(3)", "quit()"])
async def test_a_cell_that_ends_its_process_says_so(code):
    async with KernelSandbox() as sandbox:
        status, text = await run(sandbox, code)
        assert status == "died"
        assert "variables are lost" in text
        assert (await run(sandbox, "1 + 1"))[1].endswith("\n2")
        assert await run(sandbox, "1 + 1") == ("ok", "2")


async def test_cells_asked_for_at_once_run_one_after_the_other():
    async with KernelSandbox() as sandbox:
        await run(sandbox, "count = 0")
        code = "import time; seen = count; time.sleep(0.05); count = seen + 1"
        async with anyio.create_task_group() as group:
            for _ in range(4):
                group.start_soon(run, sandbox, code)
        assert await run(sandbox, "count") == ("ok", "4")


async def test_nothing_is_left_after_close_not_even_children():
    async with KernelSandbox() as sandbox:
        pid = sandbox.pid
        await run(sandbox, "import subprocess\nsubprocess.Popen(['sleep', '300'])")
        folder = sandbox._inputs.path
        children = children_of(pid)
        assert children
        assert all(is_running(one) for one in (pid, *children))
    assert not any(is_running(one) for one in (pid, *children))
    assert not await anyio.Path(folder).exists()
    await sandbox.aclose()
    with pytest.raises(SandboxDied, match="closed"):
        await sandbox.run("1", timeout_s=1)


async def test_a_cancelled_cell_does_not_run_on():
    async with KernelSandbox() as sandbox:
        pid = sandbox.pid
        with anyio.move_on_after(0.3):
            await sandbox.run("import time; time.sleep(300)", timeout_s=300)
        assert not is_running(pid)
        assert "variables are lost" in (await run(sandbox, "1"))[1]


async def test_a_cancelled_start_leaves_no_process_behind():
    sandbox = KernelSandbox()
    with anyio.move_on_after(0.01) as scope:
        await sandbox.__aenter__()
    assert scope.cancelled_caught
    assert sandbox.pid is None


async def test_a_kernel_that_does_not_start_in_time_is_one_sentence():
    with pytest.raises(SandboxDied, match="did not start within"):
        async with KernelSandbox(start_timeout_s=0.001):
            pass


@pytest.mark.parametrize("name", ["../a.png", "/etc/passwd", "..", ".", "a\\b", "a\0b", "é" * 200])
async def test_file_names_that_leave_the_folder_are_refused(name):
    with pytest.raises(ConfigError, match="file name"):
        KernelSandbox([Image(b"", name=name)])


async def test_two_files_of_one_name_are_refused():
    with pytest.raises(ConfigError, match=r"two files are named 'coins\.png'"):
        KernelSandbox([FILE, FILE])


async def test_a_pool_hands_out_fresh_kernels_and_ends_them_all():
    pids = set()
    async with KernelPool(1, max_alive=2) as pool:
        for _ in range(2):
            async with pool.lease([FILE]) as sandbox:
                assert await run(sandbox, "'x' in globals(), open('coins.png').read()") == (
                    "ok",
                    "(False, 'bytes')",
                )
                await run(sandbox, "x = 1")
                assert pool.num_alive <= 2
                pids.add(sandbox.pid)
        assert len(pids) == 2
    assert pool.num_alive == 0
    assert not any(map(is_running, pids))


async def test_no_lease_sees_variables_files_or_processes_of_an_earlier_one():
    async with KernelPool(1, max_alive=1) as pool:
        for number in range(3):
            async with pool.lease([Image(b"", name=f"{number}.png")]) as sandbox:
                code = "import glob, os\n'x' in globals(), os.listdir('.'), glob.glob('/tmp/left*')"
                assert await run(sandbox, code) == ("ok", f"(False, ['{number}.png'], [])")
                await run(sandbox, "x = 1; open('left', 'w'); open('/tmp/left', 'w')")


async def test_a_kernel_that_died_in_idleness_is_not_handed_out():
    async with KernelPool(1) as pool:
        await pool.wait_ready(1)
        [idle] = pool._idle
        await idle._process.end()
        async with pool.lease() as sandbox:
            assert sandbox is not idle
            assert await run(sandbox, "1") == ("ok", "1")


async def test_no_kernel_starts_ahead_beyond_the_memory_bound():
    async with KernelPool(3, memory_mb=12) as pool:
        await pool.wait_ready(1)
        await anyio.sleep(0.5)
        assert 1 <= pool.num_idle < 3
        async with pool.lease() as first, pool.lease() as second, pool.lease() as third:
            assert len({first.pid, second.pid, third.pid}) == 3


async def test_a_full_pool_makes_a_lease_wait_and_then_says_so():
    async with KernelPool(1, max_alive=1) as pool, pool.lease():
        pool._wait_s = 0.2
        with pytest.raises(SandboxDied, match="all 1 sandboxes are in use"):
            async with pool.lease():
                pass
    with pytest.raises(ConfigError, match="not open"):
        async with pool.lease():
            pass


def test_a_pool_of_impossible_numbers_is_refused():
    for size, max_alive in ((-1, 2), (3, 2), (0, 0)):
        with pytest.raises(ConfigError, match="max_alive"):
            KernelPool(size, max_alive=max_alive)
    with pytest.raises(ConfigError, match="memory_mb"):
        KernelPool(1, memory_mb=11)


async def test_a_cell_sent_to_a_session_that_just_died_is_told_so_and_never_waits():
    async with KernelSandbox() as sandbox:
        code = "x = 1; import os, threading; threading.Timer(0.3, os._exit, [5]).start()"
        assert await run(sandbox, code) == ("ok", "")
        wire = sandbox._wire
        sent = wire.send

        def late(kind, content):
            time.sleep(0.6)  # it is alive when it is looked at, and dead when it is asked
            return sent(kind, content)

        wire.send = late
        status, text = await run(sandbox, "print(6 * 7)")
        assert status == "died"
        assert "exit status 5" in text
        assert (await run(sandbox, "print(6 * 7)"))[1].endswith("\n42")


async def test_a_cell_that_holds_the_interpreters_lock_is_known_to_run(monkeypatch):
    monkeypatch.setattr("swarm_sdk.tools.sandbox.kernel.BUSY_S", 0.5)
    async with KernelSandbox() as sandbox:
        await run(sandbox, "x = 1")
        code = "import re; re.match(r'(a+)+$', 'a' * 40 + 'b')"
        assert (await run(sandbox, code, timeout_s=1.5))[0] == "wall_timeout"
        assert await run(sandbox, "x") == ("ok", "1")


async def test_a_session_that_does_not_answer_is_replaced_and_the_cell_runs(monkeypatch):
    monkeypatch.setattr("swarm_sdk.tools.sandbox.kernel.BUSY_S", 0.5)
    async with KernelSandbox() as sandbox:
        first = sandbox.pid
        await run(sandbox, "get_ipython().kernel.shell_stream.stop_on_recv()")
        status, text = await run(sandbox, "print(6 * 7)")
        assert status == "ok"
        assert "no longer answered and was restarted" in text
        assert text.endswith("\n42")
        assert sandbox.pid != first


async def test_an_app_can_interrupt_a_cell():
    async with KernelSandbox() as sandbox, anyio.create_task_group() as group:
        await run(sandbox, "x = 1")

        async def interrupt():
            await anyio.sleep(0.3)
            sandbox.interrupt()

        group.start_soon(interrupt)
        with at_most(10):
            assert (await run(sandbox, "import time; time.sleep(60)"))[0] == "interrupted"
        assert await run(sandbox, "x") == ("ok", "1")
        assert [entry.status for entry in sandbox.journal] == ["ok", "interrupted", "ok"]


async def test_lost_variables_are_named():
    async with KernelSandbox() as sandbox:
        await run(sandbox, "alpha, beta = 1, 2; import os")
        assert sandbox.variables == ("alpha", "beta")
        result = await sandbox.run("os._exit(1)", timeout_s=10)
        assert result.lost_variables == ("alpha", "beta")
        assert "variables are lost (alpha, beta), files are kept" in result.text


async def test_kernels_draw_differently_unless_they_are_given_one_seed():
    code = "import random, numpy; random.random(), numpy.random.random()"
    drawn = []
    for seed in (None, None, 7, 7):
        async with KernelSandbox(seed=seed) as sandbox:
            drawn.append(await run(sandbox, code))
    assert len(set(drawn)) == 3
    assert drawn[2] == drawn[3]


async def test_what_a_cell_started_and_did_not_end_prints_into_no_later_cell():
    async with KernelSandbox() as sandbox:
        code = "import threading, time\n"
        code += "threading.Thread(target=lambda: (time.sleep(0.2), print('LATE'))).start()"
        await run(sandbox, code)
        assert await run(sandbox, "time.sleep(0.5); print('mine')") == ("ok", "mine")


async def test_what_programs_write_is_heard_between_what_the_cell_prints():
    async with KernelSandbox() as sandbox:
        code = "import os, subprocess\nprint('a')\nos.system('echo b; sleep 0.1; echo c >&2')\n"
        code += "subprocess.run(['echo', 'd'])\nif not (pid := os.fork()):\n"
        code += "    print('e')\n    os._exit(0)\nos.waitpid(pid, 0); os.write(1, 'é\\n'.encode());"
        status, text = await run(sandbox, code)
        assert status == "ok"
        assert sorted(text.split()) == ["a", "b", "c", "d", "e", "é"]
        assert [one for one in text if one in "abde"] == list("abde")
        status, text = await run(sandbox, "os.system('seq 200000'); print('end')")
        assert status == "ok"
        assert "characters cut" in text
        assert text.endswith("200000\nend")


async def test_a_signal_in_the_midst_of_output_tears_no_message():
    async with KernelSandbox() as sandbox:
        code = "import signal\ndef end(*_): raise TimeoutError\nsignal.signal(14, end);"
        assert await run(sandbox, code) == ("ok", "")
        for _ in range(10):
            code = "signal.setitimer(signal.ITIMER_REAL, 0.02)\n"
            code += "while True: print('x', flush=True)"
            status, text = await run(sandbox, code)
            assert (status, text.partition("\n")[0]) == ("error", "x")
            assert "TimeoutError" in text
        assert await run(sandbox, "print('on'); 7") == ("ok", "on\n7")


async def test_what_ran_before_the_fork_has_left_nothing_in_a_session():
    async with KernelSandbox() as sandbox:
        code = "[name for name in dir() if name[0] != '_'], In[:-1], Out, shown, get_ipython()"
        status, text = await run(sandbox, f"print({code}.execution_count)")
        assert status == "ok"
        names, rest = text.split("] ", 1)
        assert "'x'" not in names
        assert "'plt'" not in names
        assert rest == "[''] {} shown holds no picture 2"


async def test_characters_that_no_message_can_hold_cost_only_themselves():
    async with KernelSandbox() as sandbox:
        for code in (
            "print('a\\ud800b', 'é')",
            "class A:\n    __repr__ = lambda s: 'a\\ud800b é'\nA()",
        ):
            assert await run(sandbox, code) == ("ok", "a?b é")


TOKENS = """
import hashlib, re
found = set()
with open("/proc/self/mem", "rb", 0) as memory:
    for line in list(open("/proc/self/maps")):
        span, rights = line.split()[:2]
        if "w" not in rights:
            continue
        start, end = (int(one, 16) for one in span.split("-"))
        try:
            memory.seek(start)
            data = memory.read(end - start)
        except (OSError, OverflowError, ValueError):
            continue
        found.update(re.findall(rb"[0-9a-f]{32,}", data))
hashes = {hashlib.sha256(token).hexdigest() for token in found if len(token) == 32}
print([one in hashes for one in WANTED])
"""


async def test_no_kernel_finds_the_key_of_another_in_its_memory():
    async with KernelSandbox() as first, KernelSandbox() as second:
        sandboxes = (first, second)
        wanted = [hashlib.sha256(sandbox._wire._key).hexdigest() for sandbox in sandboxes]
        for sandbox, found in zip(sandboxes, ("[True, False]", "[False, True]"), strict=True):
            assert await run(sandbox, f"WANTED = {wanted}\n{TOKENS}", 60) == ("ok", found)


async def test_a_client_that_is_busy_for_a_moment_misses_nothing():
    async with KernelSandbox() as sandbox, anyio.create_task_group() as group:

        async def be_busy():
            await anyio.sleep(0.1)
            time.sleep(2)  # noqa: ASYNC251 - that is what is tested

        group.start_soon(be_busy)
        code = "from IPython.display import clear_output\nfor _ in range(4000): clear_output()\n"
        assert await run(sandbox, code + "print('end')") == ("ok", "end")
