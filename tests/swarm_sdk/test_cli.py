"""The command line as a person or a script uses it."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

SWARM = [sys.executable, "-c", "from swarm_sdk.cli import main; main()"]


def swarm(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"COLUMNS": "200", "OMP_NUM_THREADS": "2"}
    return subprocess.run(
        [*SWARM, *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )


class ChatServer(BaseHTTPRequestHandler):
    """Speaks chat completions: searches once, then answers with what was found."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        results = [m for m in body["messages"] if m["role"] == "tool"]
        message: dict[str, object] = {"role": "assistant", "content": None}
        if results:
            message["content"] = results[-1]["content"]
        else:
            function = {"name": "search", "arguments": json.dumps({"query": "notice"})}
            message["tool_calls"] = [{"id": "a", "type": "function", "function": function}]
        reply = {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [
                {
                    "index": 0,
                    "message": message,
                    "finish_reason": "stop" if results else "tool_calls",
                }
            ],
            "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
        }
        data = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def chat_url() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), ChatServer)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_question_over_ones_own_folder_through_an_openai_compatible_server(
    tmp_path: Path, chat_url: str
) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "contract.md").write_text("# Contract\n\nThe notice period is three months.\n")
    done = swarm(
        *("run", "What is the notice period?", "--docs", docs, "--json"),
        *("--model", f"openai:{chat_url}#tiny"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert "notice period is three months" in result["output"]
    assert (result["critical_steps"], result["total_steps"]) == (2, 2)

    shown = swarm("trace", "show", result["episode_id"][:17], "--json", cwd=tmp_path)
    trace = json.loads(shown.stdout)
    assert [node["critical"] for node in trace["graph"]["nodes"]] == [True, True]
    drawn = swarm("trace", "show", result["episode_id"], cwd=tmp_path).stdout
    assert "* stage 0" in drawn
    assert "critical steps 2 of 2" in drawn
    listed = json.loads(swarm("trace", "list", "--json", cwd=tmp_path).stdout)
    assert [episode["status"] for episode in listed] == ["done"]
    assert "What is the notice" in swarm("trace", "list", cwd=tmp_path).stdout
    refused = swarm("trace", "export", result["episode_id"], cwd=tmp_path)
    assert refused.returncode == 2
    assert "chat completions only" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("run", "x", "--model", "gpt"), "unknown model 'gpt'"),
        (("run", "x", "--model", "path:/nowhere"), "no checkpoint directory"),
        (("run", "  ", "--model", "openai:http://127.0.0.1:1/v1#m"), "the task is empty"),
        (("run", "x", "--docs", "/nowhere"), "/nowhere"),
        (("run", "x", "--docs", "."), "document"),
        (("run", "x", "--file", "a.png"), "there is no file 'a.png'"),
        (("run", "x", "--steps", "-1"), "steps must be >= 0"),
        (("trace", "list"), "no episodes are recorded"),
        (("trace", "show", "nothing"), "no episodes are recorded"),
    ],
)
def test_a_users_mistake_is_one_sentence_and_exit_code_2(
    tmp_path: Path, arguments: tuple[str, ...], told: str
) -> None:
    done = swarm(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / ".swarm" / "ledger.db").exists()


def test_no_server_at_the_address_ends_the_episode_typed(tmp_path: Path) -> None:
    done = swarm("run", "x", "--model", "openai:http://127.0.0.1:9/v1#m", "--json", cwd=tmp_path)
    assert done.returncode == 1
    assert json.loads(done.stdout)["status"] == "failed"
    assert "no server answers" in done.stderr


def test_doctor_tells_what_is_installed(tmp_path: Path) -> None:
    done = swarm("doctor", "--json", cwd=tmp_path)
    checks = json.loads(done.stdout)["checks"]
    assert {check["part"] for check in checks} >= {"nano checkpoint", "IPython sandboxes"}
    isolation = json.loads(done.stdout)["isolation"]
    assert isolation["level"] in ("L3", "L2", "L1", "L0")
    assert (
        bool(isolation["not_enforced"]) == bool(isolation["reason"]) == (isolation["level"] < "L3")
    )
    assert done.returncode == 0
    assert "nano checkpoint" in swarm("doctor", cwd=tmp_path).stdout


def test_a_task_longer_than_the_context_is_told_with_the_numbers(tmp_path: Path) -> None:
    done = swarm("run", "word " * 9000, "--json", cwd=tmp_path)
    assert done.returncode == 1
    assert "tokens" in json.loads(done.stdout)["error"]


def test_a_corrupt_checkpoint_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    done = swarm("run", "x", "--model", f"path:{broken}", cwd=tmp_path)
    assert done.returncode == 2
    assert str(broken) in done.stderr


def test_the_demo_answers_with_subagents_that_the_model_created(tmp_path: Path) -> None:
    done = swarm("demo", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["item_f1"] >= 0.9
    assert report["look_exact"] is True
    assert report["subagents"] >= 4
    assert report["critical_steps"] * 2 <= report["total_steps"]
    exported = swarm("trace", "export", report["episode_ids"][0], cwd=tmp_path).stdout.splitlines()
    assert len(exported) == 1 + report["subagents"]
    main = json.loads(exported[0])
    assert len(main["token_ids"]) == len(main["is_sampled"]) == len(main["logprobs"])
    assert any(main["is_sampled"])
