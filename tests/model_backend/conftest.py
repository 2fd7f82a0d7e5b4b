"""Fixtures of the tests of model and weights: the parity benchmark, and a random tiny model."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from swarm_sdk.model_backend.model.config import tiny
from swarm_sdk.model_backend.model.kimi import KimiModel

PARITY = Path(__file__).parents[2] / "benchmarks" / "parity.py"


@pytest.fixture(scope="session")
def parity() -> ModuleType:
    """``benchmarks/parity.py``: the tests and the benchmark compare with the same code."""
    spec = importlib.util.spec_from_file_location("benchmark_parity", PARITY)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny_model(parity: ModuleType) -> KimiModel:
    torch.set_num_threads(2)
    model: KimiModel = parity.random_model(tiny(), seed=0).eval()
    return model
