from __future__ import annotations

from collections.abc import Iterator

import pytest

from leapfrog.parallel_backend import supervisor


@pytest.fixture(scope="package", autouse=True)
def no_ranks_afterwards() -> Iterator[None]:
    yield
    supervisor.close_all()
