"""What README says is true: its commands exist, its paths exist, its file tree is the file tree."""

from __future__ import annotations

import itertools
import re
import subprocess
from pathlib import Path

import pytest

from forge_ray import settings
from forge_ray.cli import SWITCHES, VERBS, parse
from forge_ray.words import OWN_SWITCHES

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FIELDS = {row[0] for row in settings.reference()}
OWN_FLAGS = ("--out", "--cluster", "--address", "--prices")  # whose values are no fields of a job
COMMANDS = [line.strip() for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]


def _tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return listed.stdout.splitlines()


def _words(program: str) -> list[list[str]]:
    found = [re.findall(rf"(?:^|\s){program} (.*?)(?:\s#|$)", line) for line in COMMANDS]
    return [text.split() for texts in found for text in texts]


def test_every_make_target_it_names_is_in_the_makefile() -> None:
    targets = set(re.findall(r"^([a-z0-9]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {words[0] for words in _words("make")} | set(re.findall(r"`make ([a-z0-9]+)", README))
    assert {"demo", "test"} <= named <= targets


def test_every_forge_command_it_shows_parses_and_names_existing_files_and_fields() -> None:
    commands = _words("forge")
    assert {words[0] for words in commands} >= {"run", "serve", "show", "doctor", "pretrain"}
    commands += [text.split() for text in re.findall(r"`forge ([a-z].*?)`", README)]
    written = {after for words in commands for word, after in itertools.pairwise(words) if word == "--out"}
    for words in commands:
        assert parse(words).verb in VERBS, words
        for path in (word for word in words if word.endswith(".yaml")):
            assert path in written or (ROOT / path).is_file(), path
        flags = [word for word in words if word.startswith("--")]
        flags = [flag for flag in flags if flag not in (*SWITCHES, *OWN_SWITCHES.get(words[0], ()), *OWN_FLAGS)]
        unknown = [name.partition("=")[0][2:] for name in flags if name.partition("=")[0][2:] not in FIELDS]
        assert not unknown, words


def test_every_verb_is_explained() -> None:
    assert not [verb for verb in VERBS if f"`{verb}`" not in README and f"forge {verb}" not in README]


def test_the_file_tree_is_the_file_tree() -> None:
    block = re.search(r"<!-- tree -->\n```\n(.*?)```", README, re.DOTALL)
    assert block
    listed, folders = set(), []
    for line in block[1].splitlines():
        name = line.split("  ")[0] if not line.startswith(" ") else line.strip().split("  ")[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folders = [*folders[:depth], name]
        if not name.endswith("/"):
            listed.add("".join(folders))
    assert len(set(folders)) > 1
    tracked = {path for path in _tracked() if not Path(path).name.startswith((".", "__init__"))}
    shown = {
        path for path in tracked if path.startswith(("forge_ray/", "cluster/", "jobs/", "serving/")) or "/" not in path
    }
    assert listed == shown


def test_every_path_it_mentions_exists() -> None:
    mentioned = set(re.findall(r"`((?:forge_ray|jobs|serving|cluster|tests|bench)/[\w./-]*)`", README))
    assert mentioned
    assert not [path for path in mentioned if not (ROOT / path).exists()]
