"""Fixtures that every test folder shares."""

import pytest


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
