"""The uncached reference and a tiny model of random weights."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

REFERENCE_PATH = Path(__file__).with_name("reference.py")


def load_reference():
    name = "engine_reference"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, REFERENCE_PATH)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture(autouse=True, scope="package")
def _one_thread():
    """Tiny products gain nothing from a second thread, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def reference():
    return load_reference()


@pytest.fixture(scope="session")
def model(reference):
    return reference.random_model()
