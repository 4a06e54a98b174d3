"""Verbs, words, exit codes, and what goes to stdout and to stderr."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from forge_ray import cli, pipeline
from forge_ray.artifact import Manifest, Workspace
from forge_ray.config import ForgeConfig, ModelConfig
from forge_ray.errors import ConfigError, ForgeError
from forge_ray.model.arithmetic import block_parameters
from forge_ray.words import OTHER_VERBS, STAGE_VERBS


@pytest.fixture
def job(tmp_path: Path, write_yaml: Callable[..., Path]) -> Path:
    """A job over one small folder of documents, in a workspace that does not exist yet."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "one.txt").write_text("A document. " * 20)
    sources = f"[{{kind: files, uri: {tmp_path}/docs}}]"
    return write_yaml(f"workspace: {tmp_path}/workspace\ningest: {{sources: {sources}}}\n")


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(str(tmp_path / "workspace"))


@pytest.fixture
def forge(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs `forge` with these words; gives exit code, stdout and stderr."""

    def run(*words: object) -> tuple[int, str, str]:
        code = cli.main([str(word) for word in words])
        told = capsys.readouterr()
        return code, told.out, told.err

    return run


Forge = Callable[..., tuple[int, str, str]]


# -------------------------------------------------------------------------------------------------------------- words


def test_a_command_line_is_verb_places_flags_and_switches_anywhere() -> None:
    words = cli.parse(
        ["run", "a.yaml", "--json", "--pretrain.steps", "5", "--serve.port=9", "b.yaml", "--dry-run", "--x.y", "-1"]
    )
    assert (words.verb, words.places) == ("run", ("a.yaml", "b.yaml"))
    assert words.flags == ("--pretrain.steps", "5", "--serve.port=9", "--x.y", "-1")
    assert words.switches == {"--json", "--dry-run"}


def test_the_verb_comes_first() -> None:
    with pytest.raises(ConfigError, match="verb comes first"):
        cli.parse(["--pretrain.steps", "5", "run"])


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["--json"]])
def test_help_names_every_verb(forge: Forge, words: list[str]) -> None:
    code, out, err = forge(*words)
    assert (code, err) == (0, "")
    assert [verb for verb in cli.VERBS if f"\n  {verb} " not in out] == []


def test_an_unknown_verb_is_refused_with_the_nearest(forge: Forge) -> None:
    code, out, err = forge("pretrian")
    assert (code, out) == (2, "")
    assert "did you mean `forge pretrain`?" in err


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_of_a_verb_names_it_and_the_fields_of_its_stage(forge: Forge, verb: str) -> None:
    code, out, _ = forge(verb, "--help")
    assert code == 0
    assert out.startswith(f"usage: forge {verb} ")
    assert (f"\n{verb}." in out) == (verb in STAGE_VERBS or verb in ("plan", "serve"))
    assert {**STAGE_VERBS, **OTHER_VERBS}[verb] in out


def test_help_of_pretrain_gives_type_default_and_meaning(forge: Forge) -> None:
    assert "\npretrain.steps: int = 1000\n    Optimizer steps of the run.\n" in forge("pretrain", "--help")[1]


def test_the_version_is_that_of_the_package(forge: Forge) -> None:
    assert forge("--version") == (0, f"forge-ray {cli.__version__}\n", "")


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["run", "--dryrun"], "did you mean --dry-run?"),
        (["run", "--jsn"], "did you mean --json?"),
        (["--verson"], "did you mean --version?"),
        (["show", "one", "two"], "takes one REF"),
        (["serve", "one", "two"], "takes one REF"),
        (["config", "pretrian"], "did you mean `forge config pretrain`?"),
        (["config", "--pretrain.steps=5"], "takes no values"),
        (["gc", "export"], "configuration file not found"),
    ],
)
def test_a_word_that_is_not_understood_is_refused(forge: Forge, words: list[str], hint: str) -> None:
    code, out, err = forge(*words)
    assert (code, out) == (2, "")
    assert hint in err


@pytest.mark.parametrize("flag", ["--serve={port: 7}", "--ray={num_cpus: 7}", "--model={num_layers: 7}"])
def test_a_whole_section_is_no_misspelt_switch(forge: Forge, job: Path, flag: str) -> None:
    code, out, _ = forge("run", job, "--dry-run", flag)
    assert code == 0
    assert f" 7  [{flag.partition('=')[0]}]" in out


# --------------------------------------------------------------------------------------------------------- exit codes


@pytest.mark.parametrize(
    ("words", "code", "error"),
    [
        (("serv",), 2, "ConfigError"),
        (("run", "no-such.yaml"), 2, "ConfigError"),
        (("run", "--dry-run"), 2, "ConfigError"),
        (("serve",), 2, "ConfigError"),
        (("show", "--workspace=nosuchscheme://x"), 3, "StorageError"),
        (("show", "nothing-of-that-name"), 4, "NotFoundError"),
        (("serve", "nothing-of-that-name"), 4, "NotFoundError"),
    ],
)
def test_a_refusal_has_its_exit_code_and_one_json_object_on_stdout(
    forge: Forge, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: tuple[str, ...], code: int, error: str
) -> None:
    monkeypatch.chdir(tmp_path)
    found, out, err = forge(*words, "--json")
    row = json.loads(out)
    assert (found, row["exit_code"], row["error"]) == (code, code, error)
    assert err.startswith(f"error: {row['what']}")
    assert forge(*words)[1] == ""


@pytest.mark.parametrize(
    ("raised", "code", "told"),
    [
        (KeyError("a bug"), 1, "a defect in forge-ray"),
        (KeyboardInterrupt(), 130, "goes on from what is published"),
        (ForgeError("unforeseen", do="call"), 1, "do: call"),
        (BrokenPipeError(), 141, "before the work was done"),
    ],
)
def test_whatever_escapes_a_verb_becomes_an_exit_code(
    forge: Forge, monkeypatch: pytest.MonkeyPatch, raised: BaseException, code: int, told: str
) -> None:
    def verb(words: cli.Words) -> int:
        raise raised

    monkeypatch.setitem(cli.VERBS, "config", verb)
    found, out, err = forge("config")
    assert (found, out) == (code, "")
    assert told in err
    assert ("Traceback" in err) == isinstance(raised, KeyError)


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["config"], ["config", "nosuch", "--json"], ["show"]])
def test_a_reader_that_has_gone_is_no_failure_of_the_work(tmp_path: Path, words: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "forge_ray.cli", *words]
    done = subprocess.run(command, cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writer)
    assert done.returncode == (2 if "nosuch" in words else 0)
    assert ("error" in done.stderr) == ("nosuch" in words)


def test_run_refuses_an_address_and_a_port_before_it_works(
    forge: Forge, job: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(pipeline, "run", lambda *_: pytest.fail("work was begun"))
    assert forge("run", job, "--serve.host=0.0.0.0")[0] == 8
    with socket.create_server(("127.0.0.1", 0)) as server:
        code, _, err = forge("run", job, f"--serve.port={server.getsockname()[1]}")
    assert (code, "cannot listen on" in err) == (8, True)
    assert not (tmp_path / "workspace").exists()


@pytest.mark.parametrize("verb", ["run", "ingest"])
def test_a_submitted_job_wants_a_workspace_that_outlives_it(
    forge: Forge, job: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    for place in ("./workspace", "file://workspace"):
        code, _, err = forge(verb, job, f"--workspace={place}", "--dry-run")
        assert (code, "--workspace=" in err) == (2, True)
    for place in ("/srv/w", "~/w", "memory://w"):
        assert forge(verb, job, f"--workspace={place}", "--dry-run")[0] == 0


# ------------------------------------------------------------------------------------------------------------ dry run


def _refs(forge: Forge, *words: object) -> list[str]:
    code, out, _ = forge(*words, "--dry-run", "--json")
    assert code == 0
    return [row["ref"] for row in json.loads(out)["stages"]]


def test_a_dry_run_shows_values_origins_and_stages_and_writes_nothing(forge: Forge, job: Path, tmp_path: Path) -> None:
    code, out, err = forge("run", job, "--pretrain.steps=7", "--dry-run")
    assert (code, err) == (0, "")
    rows = {line.split()[0]: line for line in out.splitlines() if line}
    assert rows["pretrain.steps"].split()[1:] == ["7", "[--pretrain.steps]"]
    assert rows["ingest.sources.0.uri"].endswith(f'"{tmp_path}/docs"  [{job}]')
    stages = [line.split()[1].partition("/")[0] for line in out.splitlines() if line.startswith("run ")]
    assert stages == [*STAGE_VERBS, "serve"]
    assert not (tmp_path / "workspace").exists()


def test_the_json_of_a_dry_run_holds_the_same(forge: Forge, job: Path) -> None:
    _, out, _ = forge("tokenizer", job, "--dry-run", "--json", "--pretrain.steps", "7")
    told = json.loads(out)
    rows = {row["name"]: (row["value"], row["origin"]) for row in told["config"]}
    assert rows["pretrain.steps"] == (7, "--pretrain.steps")
    assert rows["pretrain.slots"] == (16, "default")
    assert [row["ref"].partition("/")[0] for row in told["stages"]] == ["ingest", "curate", "tokenizer"]
    assert {row["published"] for row in told["stages"]} == {False}


def test_a_change_renames_the_stages_from_there_on_and_an_operational_one_renames_none(forge: Forge, job: Path) -> None:
    base = _refs(forge, "run", job)
    longer = _refs(forge, "run", job, "--pretrain.steps=7")
    assert [a == b for a, b in zip(base, longer, strict=True)] == [True] * 4 + [False] * 3
    assert _refs(forge, "run", job, "--pretrain.max_workers=1", "--serve.port=9", "--ray.num_cpus=1") == base


def test_a_changed_document_renames_every_stage(forge: Forge, job: Path, tmp_path: Path) -> None:
    base = _refs(forge, "run", job)
    (tmp_path / "docs" / "one.txt").write_text("Another document. " * 20)
    assert not set(base) & set(_refs(forge, "run", job))


def test_what_is_published_is_shown_as_skipped(forge: Forge, job: Path, workspace: Workspace) -> None:
    ingest, curate, tokenizer = _refs(forge, "tokenizer", job)
    stage, _, name = ingest.partition("/")
    workspace.publish(Manifest(stage=stage, fingerprint=name, files=()))
    _, out, _ = forge("tokenizer", job, "--dry-run")
    assert out.splitlines()[-3:] == [f"skip  {ingest}", f"run   {curate}", f"run   {tokenizer}"]


# --------------------------------------------------------------------------------------------------- show, gc, config


def test_show_of_an_empty_workspace_says_so(forge: Forge, job: Path, workspace: Workspace) -> None:
    flag = f"--workspace={workspace.uri}"
    assert forge("show", job) == forge("show", flag)
    assert forge("show", flag) == (0, f"nothing is published in {workspace.uri}\n", "")
    assert json.loads(forge("show", flag, "--json")[1]) == {"artifacts": []}


def test_show_walks_from_an_artifact_to_its_ancestors(forge: Forge, job: Path, workspace: Workspace) -> None:
    a, b, c = ("a" * 16, "b" * 16, "c" * 16)
    entry = workspace.put_bytes("part", b"1234")
    workspace.publish(Manifest(stage="ingest", fingerprint=a, files=(entry,), metrics={"documents": 3}))
    workspace.publish(Manifest(stage="tokenizer", fingerprint=b, files=(), inputs={"ingest": a}))
    workspace.publish(Manifest(stage="tokenize", fingerprint=c, files=(entry,), inputs={"ingest": a, "tokenizer": b}))
    flag = f"--workspace={workspace.uri}"
    rows: list[dict[str, Any]] = json.loads(forge("show", "tokenize", flag, "--json")[1])["lineage"]
    assert [row["ref"] for row in rows] == [f"tokenize/{c}", f"tokenizer/{b}", f"ingest/{a}"]
    assert (rows[0]["bytes"], rows[2]["metrics"]) == (4, {"documents": 3})
    code, out, _ = forge("show", job, "cccc")
    assert code == 0
    assert f"from tokenizer/{b}" in out
    assert "documents: 3" in out
    assert set(forge("show", flag)[1].split()) == {row["ref"] for row in rows}


def test_gc_deletes_what_its_dry_run_lists_and_nothing_else(forge: Forge, workspace: Workspace) -> None:
    kept, unused = workspace.put_bytes("kept", b"kept"), workspace.put_bytes("unused", b"of nobody")
    workspace.publish(Manifest(stage="ingest", fingerprint="a" * 16, files=(kept,)))
    for name in workspace.storage.list("blobs"):
        os.utime(workspace.storage.local_path(name), (1, 1))
    before, flag = workspace.storage.list(""), f"--workspace={workspace.uri}"
    code, out, _ = forge("gc", flag, "--dry-run")
    assert code == 0
    assert "would delete 1 files, 9 B" in out
    assert workspace.uri in out
    assert workspace.storage.list("") == before
    told = json.loads(forge("gc", flag, "--json")[1])
    name = f"blobs/{unused.sha256[:2]}/{unused.sha256}"
    assert told == {"workspace": workspace.uri, "deleted": True, "bytes": 9, "names": [name]}
    assert set(before) - set(workspace.storage.list("")) == set(told["names"])


def test_config_lists_every_field_with_its_meaning(forge: Forge) -> None:
    rows = {row["name"]: row for row in json.loads(forge("config", "--json")[1])}
    assert rows["pretrain.precision"]["type"] == "auto | bf16 | fp32 | fp8"
    assert rows["pretrain.steps"]["default"] == "1000"
    assert rows["serve.max_model_len"]["type"] == "int | None"
    assert rows["evaluate.baselines"]["type"] == "tuple[gzip | zstd | bigram | smollm2, ...]"
    assert {"ingest.sources[files].uri", "pretrain.optimizer[muon].adamw.beta1"} <= set(rows)
    text = forge("config")[1]
    assert [name for name, row in rows.items() if name not in text or row["text"] not in text] == []


def test_config_of_a_section_or_field_lists_no_other(forge: Forge) -> None:
    told = json.loads(forge("config", "tokenizer", "pretrain.optimizer.beta1", "--json")[1])
    names = [row["name"] for row in told]
    assert names[0] == "tokenizer"
    assert names[-1] == "pretrain.optimizer[adamw].beta1"
    assert {name.partition(".")[0] for name in names[:-1]} == {"tokenizer"}


def test_serve_of_an_unpublished_job_names_the_export_that_is_there(
    forge: Forge, job: Path, workspace: Workspace
) -> None:
    code, _, err = forge("serve", job)
    assert (code, "latest export" in err) == (4, False)
    for name in ("a" * 16, "b" * 16):
        workspace.publish(Manifest(stage="export", fingerprint=name, files=()))
    code, _, err = forge("serve", job)
    assert code == 4
    assert f"forge serve export/{'b' * 16} --workspace={workspace.uri}`" in err


def test_what_a_verb_prints_by_itself_does_not_spoil_the_json(forge: Forge, monkeypatch: pytest.MonkeyPatch) -> None:
    def noisy(words: cli.Words) -> int:
        print("a library says hello")
        cli._print_result(words, {"a": 1}, "text")
        return 0

    monkeypatch.setitem(cli.VERBS, "config", noisy)
    code, out, err = forge("config", "--json")
    assert (code, json.loads(out)) == (0, {"a": 1})
    assert "hello" in err


# --------------------------------------------------------------------------------------------------------------- plan


def test_a_plan_is_told_and_written(forge: Forge, tmp_path: Path) -> None:
    words = ("plan", "--plan.usd", "100", "--plan.corpus_bytes", "8e9", "--out", tmp_path / "plan.yaml")
    code, out, err = forge(*words)
    assert (code, err) == (0, "")
    assert out.startswith("2,000,000,000 tokens of training documents.")
    assert out.endswith(f"written to {tmp_path}/plan.yaml\n")
    best = json.loads(forge(*words, "--json")[1])["options"][0]
    assert f"depth {best['depth']}, with a vocabulary of {best['vocab_size']:,} entries\n" in out
    assert best["usd"] <= 100


def test_a_plan_needs_a_corpus(forge: Forge, job: Path) -> None:
    code, _, err = forge("plan", job, "--plan.usd", "100")
    assert code == 2
    assert "run `forge tokenize` with the job" in err


def test_a_plan_counts_the_jobs_own_tokens(forge: Forge, job: Path, workspace: Workspace) -> None:
    for ref in _refs(forge, "tokenize", job):
        stage, _, name = ref.partition("/")
        workspace.publish(Manifest(stage=stage, fingerprint=name, files=(), metrics={"train_tokens": 123_456_789}))
    assert forge("plan", job, "--plan.usd", "100")[1].startswith("123,456,789 tokens of training documents.")


def test_a_plan_tells_what_the_jobs_ladder_expects(forge: Forge, job: Path, workspace: Workspace) -> None:
    for ref in _refs(forge, "tokenize", job):
        stage, _, name = ref.partition("/")
        workspace.publish(Manifest(stage=stage, fingerprint=name, files=(), metrics={"train_tokens": 123_456_789}))
    words = ("plan", job, "--plan.usd", "2")
    _, out, _ = forge(*words)
    assert "No loss is promised" in out
    best = json.loads(forge(*words, "--json")[1])["options"][0]
    size = block_parameters(ModelConfig(depth=best["depth"]))
    rungs = [{"size": size * frac, "bits_per_byte": 1 + 0.1 * frac**-0.3} for frac in (0.05, 0.1, 0.15, 0.2, 0.25)]
    fitted = {"size": size, "tokens": best["tokens"], "rungs": rungs}
    tokenized = _refs(forge, "tokenize", job)[-1].partition("/")[2]
    config = ForgeConfig().model_dump(mode="json")
    longer = {**config, "pretrain": {**config["pretrain"], "seq_len": 512}}
    for name, of, made_with in (("a", tokenized, config), ("b", "0" * 16, config), ("c", tokenized, longer)):
        found = Manifest("plan", name * 16, (), config=made_with, inputs={"tokenize": of}, metrics=fitted)
        workspace.publish(found)
    _, out, _ = forge(*words)
    assert "\n  expected  1." in out
    assert f"(plan/{'a' * 16})" in out
    assert "No loss is promised" not in out
    (option, *_) = json.loads(forge(*words, "--json")[1])["options"]
    expected = option["bits_per_byte"]
    assert expected["median"] == pytest.approx(1.1, rel=0.03)
    assert expected["low"] < 1.1 < expected["high"]
    _, out, _ = forge(*words, "--model.depth", "3")
    assert "No option is near those" in out
    _, out, _ = forge(*words, "--plan.corpus_tokens", "123456789")
    assert "No loss is promised" in out, "another corpus than the ladder's"
