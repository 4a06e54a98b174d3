"""Units and generations: what was read together stays together while a corpus grows, shrinks and changes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from forge_ray.artifact import Manifest, Workspace
from forge_ray.config import IngestConfig
from forge_ray.data import layout
from forge_ray.errors import DataError

Publish = Callable[[list[layout.Unit]], None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b", "d", "f", "h"):
        (tmp_path / f"{name}.txt").write_text(name * 100)
    return tmp_path


@pytest.fixture
def config(folder: Path, monkeypatch: pytest.MonkeyPatch) -> IngestConfig:
    monkeypatch.setattr(layout, "UNIT_BYTES", 200)
    return IngestConfig(sources=[{"kind": "files", "uri": str(folder)}])


@pytest.fixture
def publish(workspace: Workspace, config: IngestConfig) -> Publish:
    """Publishes a layout as a run would."""

    def make(units: list[layout.Unit]) -> None:
        manifest = Manifest("ingest", layout.digest(units)[:16], (layout.store(workspace, units),))
        workspace.set_ref(layout.lineage(config), workspace.publish(manifest).ref)

    return make


def names(units: list[layout.Unit]) -> list[tuple[int, str]]:
    return [(unit.generation, "".join(Path(row["name"]).stem for row in unit.rows)) for unit in units]


def test_a_first_layout_depends_on_the_files_alone(config: IngestConfig, workspace: Workspace) -> None:
    units = layout.plan(config, workspace)
    assert names(units) == [(0, "bd"), (0, "fh")]
    assert layout.digest(units) == layout.digest(layout.plan(config, workspace))


def test_new_files_form_a_generation_behind_the_old_units(
    config: IngestConfig, workspace: Workspace, folder: Path, publish: Publish
) -> None:
    publish(layout.plan(config, workspace))
    for name in ("a", "c", "z"):
        (folder / f"{name}.txt").write_text(name * 100)
    grown = layout.plan(config, workspace)
    assert names(grown) == [(0, "bd"), (0, "fh"), (1, "ac"), (1, "z")]
    publish(grown)
    assert layout.digest(layout.plan(config, workspace)) == layout.digest(grown)


@pytest.mark.parametrize("change", ["delete", "append", "touch"])
def test_a_unit_that_lost_a_file_is_dissolved_and_the_others_stay(
    config: IngestConfig, workspace: Workspace, folder: Path, publish: Publish, change: str
) -> None:
    publish(layout.plan(config, workspace))
    if change == "delete":
        (folder / "d.txt").unlink()
    elif change == "append":
        (folder / "d.txt").write_text("other" * 30)
    else:
        os.utime(folder / "d.txt", (1, 1))
    units = layout.plan(config, workspace)
    assert names(units)[0] == (0, "fh")
    assert {generation for generation, _ in names(units)[1:]} == {1}
    assert "".join(sorted(letters for _, letters in names(units)[1:])) in (["b"] if change == "delete" else ["bd"])[0]


def test_a_damaged_record_means_a_fresh_start(config: IngestConfig, workspace: Workspace, publish: Publish) -> None:
    units = layout.plan(config, workspace)
    publish(units)
    path = workspace.resolve(layout.lineage(config)).local_path(layout.FILE)
    path.chmod(0o644)
    path.write_bytes(b"x")
    assert names(layout.plan(config, Workspace(workspace.uri))) == names(units)


def test_a_record_holds_what_the_units_held(config: IngestConfig, workspace: Workspace, publish: Publish) -> None:
    units = layout.plan(config, workspace)
    publish(units)
    assert [unit.digest() for unit in layout._before(config, workspace)] == [unit.digest() for unit in units]


def test_another_configuration_has_a_lineage_of_its_own(config: IngestConfig) -> None:
    assert layout.lineage(config) != layout.lineage(config.replace(held_out_frac=0.5))
    assert layout.lineage(config) == layout.lineage(config.replace(retry_s=1.0))


def test_units_hold_few_files_however_small(
    config: IngestConfig, workspace: Workspace, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "UNIT_FILES", 3)
    for i in range(10):
        (folder / f"t{i}.txt").write_text("")
    assert max(len(unit.rows) for unit in layout.plan(config, workspace)) == 3


def test_sources_share_no_unit_and_the_botocore_listing_is_cut_too(workspace: Workspace, folder: Path) -> None:
    sources = [{"kind": "files", "uri": str(folder)}, {"kind": "botocore"}]
    units = layout.plan(IngestConfig(sources=sources), workspace)
    assert len(units) > 4  # two CPUs and more have work
    assert [unit.source for unit in units] == [0] + [1] * (len(units) - 1)


def test_an_unknown_service_is_refused(workspace: Workspace) -> None:
    with pytest.raises(DataError, match="no such service"):
        layout.plan(IngestConfig(sources=[{"kind": "botocore", "services": ["sqss"]}]), workspace)
