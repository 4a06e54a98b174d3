"""What all tests share: an environment without the developer's own settings, stores, and a folder of documents."""

from __future__ import annotations

import os
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No `FORGE_*` variable and no cache of the person who runs the tests reaches them."""
    for name in [name for name in os.environ if name.upper().startswith("FORGE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(params=["folder", "object store"])
def store_uri(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty root of each kind; fsspec's `memory://` takes the way that `s3:// gs:// abfs://` take."""
    if request.param == "folder":
        yield str(tmp_path / "store")
        return
    import fsspec

    uri = f"memory://{uuid.uuid4().hex}"
    yield uri
    memory = fsspec.filesystem("memory")
    if memory.exists(uri):
        memory.rm(uri, recursive=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB, really mounted."""
    mount = tmp_path / "small"
    mount.mkdir()
    try:
        words = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(mount)]
        subprocess.run(words, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a tmpfs cannot be mounted here: {getattr(error, 'stderr', '') or error}")
    yield mount
    subprocess.run(["umount", "--lazy", str(mount)], check=True)


@pytest.fixture
def write_yaml(tmp_path: Path) -> Callable[..., Path]:
    """Writes a job file: `write_yaml("pretrain: {steps: 5}")`."""

    def write(text: str, name: str = "job.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write
