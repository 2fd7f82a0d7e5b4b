"""A small tokenizer, trained on text made here, and the independent reference renderer."""

import importlib.util
import sys
from pathlib import Path

import pytest

REFERENCE_PATH = Path(__file__).with_name("reference.py")


def load_reference():
    name = "chat_reference"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, REFERENCE_PATH)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture(scope="session")
def reference():
    return load_reference()


@pytest.fixture(scope="session")
def tokenizer(reference):
    return reference.small_tokenizer()
