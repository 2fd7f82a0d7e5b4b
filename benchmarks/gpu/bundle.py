"""Pack SGLang for a GPU machine without a network: one archive below 40 MB, from public wheels.

    python benchmarks/gpu/bundle.py [--out .bundle/sglang.tar.xz]

    sglang 0.5.11, sglang-kernel 0.4.2, requirements.txt ─ pip download ─> unpacked without what
    one Hopper GPU does not need ─> + stand-ins ─> .tar.xz ─> machine.sh unpacks and sets it up

The machine: Linux x86-64, Python 3.12, torch 2.11 (CUDA 13), transformers 5.17, nvcc. Needs pip, xz
and libnuma.so.1 here. The stand-ins are modules that SGLang imports and, started as server.py does,
never calls: IPython, datasets, soundfile and three of flashinfer. One more module, run at
interpreter start, lets SGLang register a model name that the newer transformers has already.
"""

from __future__ import annotations

import argparse
import fnmatch
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SERVER = ("sglang==0.5.11", "sglang-kernel==0.4.2")
PLATFORMS = (
    "manylinux_2_35_x86_64",
    "manylinux_2_34_x86_64",
    "manylinux_2_31_x86_64",
    "manylinux_2_28_x86_64",
    "manylinux_2_27_x86_64",
    "manylinux_2_24_x86_64",
    "manylinux_2_17_x86_64",
    "manylinux2014_x86_64",
    "manylinux1_x86_64",
)
LIBNUMA = ("/lib/x86_64-linux-gnu/libnuma.so.1", "/usr/lib64/libnuma.so.1")
LEFT_OUT = (
    # SGLang: other products, tests, and a binary of a transport that is not used.
    "sglang/multimodal_gen/*",
    "sglang/test/*",
    "sglang/eval/*",
    "sglang/srt/grpc/_core*",
    "sglang/jit_kernel/tests/*",
    "sglang/jit_kernel/benchmark/*",
    "sglang/jit_kernel/diffusion/*",
    # Kernels of other GPUs and of attention back-ends that server.py does not choose.
    "sgl_kernel/flash_ops*",
    "sgl_kernel/flashmla_ops*",
    "sgl_kernel/spatial_ops*",
    "sgl_kernel/sm100/*",
    "sgl_kernel/testing/*",
    "include/*",
    "deep_gemm/*",
    "triton_kernels/*",
    "*_cu12.abi3.so",
    "tools/*",
    "*.pyi",
    "*.dist-info/RECORD",
    "*.data/*",
)
KERNEL_KEPT = ("sgl_kernel/*", "*.dist-info/METADATA")
STAND_INS = {
    "IPython/__init__.py": "def get_ipython():\n    return None\n",
    "IPython/display.py": (
        "class HTML:\n    pass\n\n\nclass Image:\n    pass\n\n\ndef display(*_, **__):\n    pass\n"
    ),
    "datasets.py": "load_dataset = None\n",
    "soundfile.py": "class SoundFile:\n    pass\n",
    "flashinfer/__init__.py": "",
    "flashinfer/sampling.py": (
        "min_p_sampling_from_probs = top_k_top_p_sampling_from_probs = None\n"
    ),
    "flashinfer/gemm.py": "mm_M1_16_K7168_N256 = None\n",
    "flashinfer/prefill.py": "cudnn_batch_prefill_with_kv_cache = None\n",
    "sitecustomize.py": '''\
"""Let SGLang 0.5.11 register models whose names the newer transformers knows already."""

import importlib.abc
import importlib.util
import sys

MODULE = "transformers.models.auto.configuration_auto"


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            mapping = type(module.CONFIG_MAPPING)
            register = mapping.register

            def anew(self, key, value, exist_ok=False):
                return register(self, key, value, exist_ok=True)

            mapping.register = anew

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _Finder())
''',
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / ".bundle" / "sglang.tar.xz")
    parser.add_argument("--wheels", type=Path, help="a folder that keeps the wheels")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        wheels = options.wheels or Path(scratch) / "wheels"
        site = Path(scratch) / "site"
        download(wheels)
        for wheel in sorted(wheels.glob("*.whl")):
            unpack(wheel, site)
        for name, text in STAND_INS.items():
            (site / name).parent.mkdir(parents=True, exist_ok=True)
            (site / name).write_text(text, encoding="utf-8")
        library = next((path for path in LIBNUMA if Path(path).exists()), None)
        if library is None:
            sys.exit("libnuma.so.1 is not here; install libnuma (Debian: apt install libnuma1)")
        (site / "lib").mkdir()
        shutil.copy(Path(library).resolve(), site / "lib" / "libnuma.so.1")
        archive(site, options.out)
    print(f"{options.out}  {options.out.stat().st_size / 1e6:.1f} MB")


def download(into: Path) -> None:
    """Fetch the pinned wheels for Python 3.12 by pip."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--python-version", "3.12"]
    command += ["--implementation", "cp", "--dest", str(into)]
    command += [part for platform in PLATFORMS for part in ("--platform", platform)]
    subprocess.run([*command, *SERVER, "-r", str(HERE / "requirements.txt")], check=True)


def unpack(wheel: Path, site: Path) -> None:
    """Unpack a wheel but for what is left out."""
    is_kernel = wheel.name.startswith("sglang_kernel")
    with zipfile.ZipFile(wheel) as file:
        for name in file.namelist():
            is_kept = not is_kernel or any(fnmatch.fnmatch(name, one) for one in KERNEL_KEPT)
            if is_kept and not any(fnmatch.fnmatch(name, one) for one in LEFT_OUT):
                file.extract(name, site)


def archive(site: Path, out: Path) -> None:
    """Pack ``site`` so that the same content gives the same bytes."""
    tar = ["tar", "--sort=name", "--mtime=@0", "--owner=0", "--group=0", "--numeric-owner"]
    with out.open("wb") as file:
        packing = subprocess.Popen([*tar, "-C", site, "-cf", "-", "."], stdout=subprocess.PIPE)
        subprocess.run(["xz", "-T2", "-6"], stdin=packing.stdout, stdout=file, check=True)
        if packing.wait():
            sys.exit("tar failed")


if __name__ == "__main__":
    main()
