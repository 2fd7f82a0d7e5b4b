"""The wheel holds every package, and nothing outside ``swarm_sdk``."""

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAYERS = ("runtime", "tools", "traces", "model_backend")


def packages_on_disk() -> set[str]:
    found = {"swarm_sdk"}
    for layer in LAYERS:
        for init in (ROOT / layer).rglob("__init__.py"):
            found.add("swarm_sdk." + ".".join(init.parent.relative_to(ROOT).parts))
    for init in (ROOT / "swarm_sdk").glob("*/__init__.py"):
        if not init.parent.is_symlink():
            found.add(f"swarm_sdk.{init.parent.name}")
    return found


def test_every_package_is_shipped() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert set(project["tool"]["setuptools"]["packages"]) == packages_on_disk()


def test_links_point_at_the_root_folders() -> None:
    for layer in LAYERS:
        link = ROOT / "swarm_sdk" / layer
        assert link.is_symlink(), f"{link} must be a symlink to ../{layer}"
        assert link.resolve() == ROOT / layer


def test_no_layer_is_imported_under_its_bare_name() -> None:
    code = (
        "import sys, swarm_sdk\n"
        "from swarm_sdk.testing import ScriptedModel\n"
        "import tempfile\n"
        "swarm_sdk.Swarm(ScriptedModel(lambda m, t: 'a'), runs=tempfile.mkdtemp()).run_sync('q')\n"
        f"print({{name.partition('.')[0] for name in sys.modules}} & set({LAYERS!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", out, ROOT],
        check=True,
        capture_output=True,
    )
    return next(out.glob("*.whl"))


def test_the_wheel_holds_code_data_and_types_and_no_foreign_top_level(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"swarm_sdk"}
    needed = ["py.typed", "runtime/agent_loop.py", "model_backend/engine/engine.py"]
    needed += ["atlas/atlas.json.gz"]
    for name in needed:
        assert f"swarm_sdk/{name}" in names


def test_a_host_app_with_folders_of_the_same_names_can_use_the_wheel(
    wheel: Path, tmp_path: Path
) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    app = tmp_path / "app"
    for layer in LAYERS:
        (app / layer).mkdir(parents=True)
        (app / layer / "__init__.py").write_text(f"MINE = '{layer}'\n")
    (app / "main.py").write_text(
        "import sys\n"
        "import tools, runtime, traces, model_backend\n"
        "from swarm_sdk import Swarm\n"
        "from swarm_sdk.testing import ScriptedModel\n"
        "import swarm_sdk\n"
        "result = Swarm(ScriptedModel(lambda m, t: 'fine'), runs='runs').run_sync('hello')\n"
        "print(tools.MINE, runtime.MINE, traces.MINE, model_backend.MINE, result.output)\n"
        "print(swarm_sdk.__file__)\n"
    )
    done = subprocess.run(
        [sys.executable, "main.py"],
        cwd=app,
        env={"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.strip().splitlines()
    assert first == "tools runtime traces model_backend fine"
    assert second.startswith(str(site))


def test_the_public_interface_is_completely_typed(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    binaries = Path(sys.executable).parent
    done = subprocess.run(
        [binaries / "pyright", "--verifytypes", "swarm_sdk", "--ignoreexternal"],
        cwd=tmp_path,
        env=os.environ
        | {
            "PYTHONPATH": str(tmp_path / "site"),
            "VIRTUAL_ENV": str(binaries.parent),
            "PATH": f"{binaries}:{os.environ['PATH']}",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Type completeness score: 100%" in done.stdout, done.stdout[-3000:]
