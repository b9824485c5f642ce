"""One local Ray for all tests that need one, and one drawn dataset."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from covergenre.sample import write_sample

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """An embedded Ray, started as the commands start it; several tests run on it."""
    import ray

    from covergenre.runtime import start_ray

    start_ray()
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A catalog of 150 drawn covers."""
    folder = tmp_path_factory.mktemp("drawn")
    return write_sample(folder, 150, seed=0)
