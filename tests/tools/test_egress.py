import anyio
import pytest

from swarm_sdk.errors import ConfigError
from swarm_sdk.tools.sandbox.egress import Proxy
from swarm_sdk.tools.sandbox.kernel import KernelSandbox
from swarm_sdk.tools.sandbox.launcher import shared_zygote
from swarm_sdk.tools.sandbox.levels import SandboxSettings

pytestmark = pytest.mark.anyio
FETCH = """
import urllib.request, urllib.error
def fetch(url):
    try:
        return urllib.request.urlopen(url, timeout=5).read().decode()
    except urllib.error.HTTPError as error:
        return error.code
"""


def test_a_list_holds_names_all_below_a_name_and_ports():
    proxy = Proxy(["example.org", "*.data.org", "one.org:8080", "10.0.0.7:9"])
    allowed = [
        ("example.org", 443), ("EXAMPLE.org.", 80), ("a.data.org", 443), ("one.org", 8080),
        ("10.0.0.7", 9),
    ]  # fmt: skip
    refused = [
        ("example.org", 22), ("evil-example.org", 443), ("data.org", 443), ("one.org", 443),
        ("a.data.org.evil.org", 443), ("10.0.0.7", 80), ("10.0.0.8", 9),
    ]  # fmt: skip
    assert [proxy.allows(*one) for one in allowed] == [True] * len(allowed)
    assert [proxy.allows(*one) for one in refused] == [False] * len(refused)
    for wrong in ("", "a b", "http://example.org", "x:y", "*", "*."):
        with pytest.raises(ConfigError, match="no host"):
            Proxy([wrong])


HEARD = []


async def answer(stream):
    async with stream:
        HEARD.append(await stream.receive())
        await stream.send(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello")


@pytest.mark.skipif(
    shared_zygote().isolation.level < 2, reason="this machine gives no network namespace"
)
async def test_code_reaches_the_hosts_of_its_list_and_no_other():
    async with anyio.create_task_group() as group:
        listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
        port = listener.extra(anyio.abc.SocketAttribute.local_port)
        group.start_soon(listener.serve, answer)
        settings = SandboxSettings(hosts=(f"127.0.0.1:{port}", f"localhost:{port}"))
        async with KernelSandbox(settings=settings) as sandbox:
            code = FETCH + f"fetch('http://127.0.0.1:{port}/x'), fetch('http://127.0.0.1:1/')"
            assert (await sandbox.run(code, timeout_s=20)).text == "('hello', 403)"
            # Nor another host at the same address, by the name that the code gives.
            assert HEARD[-1].count(b"Host: ") == 1
            code = f"r = urllib.request.Request('http://127.0.0.1:{port}/x', headers="
            code += "{'Host': 'evil.org'}); urllib.request.urlopen(r, timeout=5).read()"
            assert (await sandbox.run(code, timeout_s=20)).text == "b'hello'"
            assert f"Host: 127.0.0.1:{port}\r\n".encode() in HEARD[-1]
            assert b"evil" not in HEARD[-1]
            # A name must not lead to the machine's own services, though the list holds it.
            result = await sandbox.run(f"fetch('http://localhost:{port}/')", timeout_s=20)
            assert result.text == "502"
            code = f"import socket; socket.create_connection(('127.0.0.1', {port}), 2)"
            assert (await sandbox.run(code, timeout_s=20)).status == "error"
            code = "import http.client\nc = http.client.HTTPConnection('127.0.0.1', 3128)\n"
            code += (
                f"c.set_tunnel('127.0.0.1', {port}); c.request('GET', '/'); c.getresponse().read()"
            )
            assert (await sandbox.run(code, timeout_s=20)).text == "b'hello'"
            code = "s = socket.create_connection(('127.0.0.1', 3128))\n"
            code += "s.send(b'\\0' * 40000); s.close()"
            assert (await sandbox.run(code, timeout_s=20)).status == "ok"
            await sandbox.run("import os; os._exit(1)", timeout_s=20)
            code = FETCH + f"fetch('http://127.0.0.1:{port}/x')"
            assert (await sandbox.run(code, timeout_s=20)).text.endswith("'hello'")
        group.cancel_scope.cancel()
    await listener.aclose()


async def test_without_a_list_there_is_no_proxy():
    async with KernelSandbox() as sandbox:
        code = "import os; [name for name in os.environ if 'proxy' in name.lower()]"
        assert (await sandbox.run(code, timeout_s=10)).text == "[]"
