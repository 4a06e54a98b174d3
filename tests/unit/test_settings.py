"""Layers, origins and the traps of YAML and pydantic-settings, each of which must be a clear error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from forge_ray.config import AdamWConfig, ForgeConfig, ModelConfig, PretrainConfig
from forge_ray.config.train import shape_of
from forge_ray.errors import ConfigError
from forge_ray.settings import Resolved, reference, resolve

WriteYaml = Callable[..., Path]
TWO_SOURCES = "ingest: {sources: [{kind: botocore, services: [s3]}, {kind: files, uri: docs}]}"


def _values(resolved: Resolved) -> dict[str, Any]:
    return {name: value for name, value, _ in resolved.rows()}


def _refused(files: list[Path], flags: tuple[str, ...] = (), environ: dict[str, str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(files, flags, environ or {})
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize(
    ("flags", "environ", "origin"),
    [(["--model.depth", "6"], {}, "--model.depth"), ([], {"FORGE_MODEL__DEPTH": "6"}, "$FORGE_MODEL__DEPTH")],
)
def test_one_dial_sets_the_whole_shape_and_says_so(flags: list[str], environ: dict[str, str], origin: str) -> None:
    resolved = resolve([], flags, environ)
    rows = {name: (value, origin) for name, value, origin in resolved.rows()}
    assert rows["model.d_model"] == (384, origin)
    assert rows["model.d_ff"] == (1024, origin)
    assert resolved.config.model.replace(init_std=0.1).num_layers == 6
    assert resolved.config.model.fingerprinted() == ModelConfig(**shape_of(6)).fingerprinted()


def test_the_dial_and_a_field_that_says_something_else_are_refused(write_yaml: WriteYaml) -> None:
    told = _refused([write_yaml("model: {d_model: 128}")], ("--model.depth=6",))
    assert "depth 6 makes d_model 384, but 128 is given: leave one out" in told


def test_each_layer_overrides_the_ones_before_it(write_yaml: WriteYaml) -> None:
    files = [write_yaml("pretrain: {steps: 2, seed: 2, seq_len: 32, grad_clip: 2.0}", "a.yaml")]
    files += [write_yaml("pretrain: {seed: 3, seq_len: 33, grad_clip: 3.0}", "b.yaml")]
    environ = {"FORGE_PRETRAIN__SEQ_LEN": "34", "FORGE_PRETRAIN__GRAD_CLIP": "4.0", "HOME": "/"}
    resolved = resolve(files, ["--pretrain.grad_clip", "5"], environ)
    rows = {name.removeprefix("pretrain."): (value, origin) for name, value, origin in resolved.rows()}
    assert rows["micro_batch"] == (8, "default")
    assert rows["steps"] == (2, str(files[0]))
    assert rows["seed"] == (3, str(files[1]))
    assert rows["seq_len"] == (34, "$FORGE_PRETRAIN__SEQ_LEN")
    assert rows["grad_clip"] == (5.0, "--pretrain.grad_clip")


def test_flags_take_a_value_after_a_space_or_an_equals_sign_and_the_last_one_wins() -> None:
    flags = ["--pretrain.steps", "5", "--pretrain.steps=6", "--serve.max_model_len=null", "--evaluate.prompts=[a, b]"]
    config = resolve([], flags, {}).config
    assert (config.pretrain.steps, config.serve.max_model_len, config.evaluate.prompts) == (6, None, ("a", "b"))


@pytest.mark.parametrize("text", ["4e-3", "4.0e-3", "0.004"])
def test_every_spelling_of_a_small_number_is_one(write_yaml: WriteYaml, text: str) -> None:
    files = [write_yaml(f"pretrain: {{optimizer: {{kind: adamw, learning_rate: {text}}}}}")]
    assert resolve(files, (), {}).config.pretrain.optimizer.learning_rate == 0.004


def test_environment_variables_hold_scalars_lists_and_whole_sections() -> None:
    environ = {
        "FORGE_EXPORT__NAME": "123",
        "FORGE_INGEST__SOURCES": '[{"kind": "botocore", "services": ["s3", "ec2"]}]',
        "FORGE_MODEL": '{"num_layers": 7, "tied_embeddings": false}',
    }
    resolved = resolve([], (), environ)
    assert resolved.config.export.name == "123"
    assert resolved.config.ingest.sources[0].services == ("s3", "ec2")
    assert (resolved.config.model.num_layers, resolved.config.model.tied_embeddings) == (7, False)
    assert resolved.origin("ingest.sources.0.services") == "$FORGE_INGEST__SOURCES"
    assert resolved.origin("model.num_layers") == "$FORGE_MODEL"
    assert resolved.origin("model.d_model") == "default"


@pytest.mark.parametrize(
    ("flags", "environ", "origin"),
    [
        (["--ingest.sources.0.services", "[ec2]"], {}, "--ingest.sources.0.services"),
        ([], {"FORGE_INGEST__SOURCES__0__SERVICES": '["ec2"]'}, "$FORGE_INGEST__SOURCES__0__SERVICES"),
    ],
)
def test_one_field_of_one_list_item_can_be_set(
    write_yaml: WriteYaml, flags: list[str], environ: dict[str, str], origin: str
) -> None:
    job = write_yaml(TWO_SOURCES)
    resolved = resolve([job], flags, environ)
    values = _values(resolved)
    assert (values["ingest.sources.0.services"], values["ingest.sources.1.uri"]) == (["ec2"], "docs")
    assert resolved.origin("ingest.sources.0.services") == origin
    assert resolved.origin("ingest.sources.0.kind") == resolved.origin("ingest.sources.1.uri") == str(job)


def test_a_list_set_again_as_a_whole_forgets_the_origins_of_its_old_items(write_yaml: WriteYaml) -> None:
    flags = ["--ingest.sources.0.services=[ec2]", "--ingest.sources=[{kind: botocore}]"]
    resolved = resolve([write_yaml(TWO_SOURCES)], flags, {})
    assert len(resolved.config.ingest.sources) == 1
    assert resolved.origin("ingest.sources.0.services") == "--ingest.sources"


def test_an_item_that_the_list_does_not_have_is_refused(write_yaml: WriteYaml) -> None:
    text = _refused([write_yaml(TWO_SOURCES)], ("--ingest.sources.2.uri=x",))
    assert "--ingest.sources.2.uri" in text
    assert "wanted: 0 to 1" in text


def test_an_anchor_can_be_merged_and_overridden(write_yaml: WriteYaml) -> None:
    item = "ingest:\n  sources:\n    - &one {kind: files, uri: a, licence: mit}\n    - {<<: *one, uri: b}\n"
    first, second = resolve([write_yaml(item)], (), {}).config.ingest.sources
    assert (first.uri, second.uri, second.licence) == ("a", "b", "mit")


# -------------------------------------------------------------------------------------------------------------- traps


@pytest.mark.parametrize("word", ["off", "no", "yes"])
def test_a_word_that_yaml_1_1_takes_for_a_boolean_stays_a_word(write_yaml: WriteYaml, word: str) -> None:
    text = f"pretrain: {{preemption: off}}\nworkspace: {word}\nmodel: {{tied_embeddings: true}}"
    config = resolve([write_yaml(text)], (), {}).config
    assert (config.workspace, config.pretrain.preemption, config.model.tied_embeddings) == (word, "off", True)


def test_a_missing_file_is_refused_with_the_nearest_one_there_is(write_yaml: WriteYaml) -> None:
    job = write_yaml("pretrain: {steps: 5}", "demo.yaml")
    text = _refused([job.with_name("dmeo.yaml")])
    assert "dmeo.yaml" in text
    assert f"did you mean {job}?" in text


@pytest.mark.parametrize("content", ["", "# only a comment\n", "---\n", "- a\n- b\n", "just words"])
def test_a_file_without_a_mapping_is_refused(write_yaml: WriteYaml, content: str) -> None:
    job = write_yaml(content)
    assert f"{job} holds no configuration" in _refused([job])


def test_a_folder_or_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path, tmp_path / "job.yaml"):
        assert "cannot be read" in _refused([path])


def test_a_key_given_twice_is_refused_with_both_lines(write_yaml: WriteYaml) -> None:
    text = _refused([write_yaml("pretrain:\n  steps: 5\n  seed: 1\n  steps: 6\n")])
    assert "'steps'" in text
    assert "lines 2 and 4" in text


def test_a_key_given_twice_within_a_flag_is_refused() -> None:
    assert "--ingest.sources" in _refused([], ("--ingest.sources=[{kind: files, uri: a, uri: b}]",))


NO_YAML = ["pretrain: {[a]: 1}", "? {a: 1}\n: 2", "pretrain: &a {steps: *a}", "a: [", "x: !!python/name:os.system"]


@pytest.mark.parametrize("content", NO_YAML)
def test_yaml_that_is_no_configuration_is_refused_by_file(write_yaml: WriteYaml, content: str) -> None:
    job = write_yaml(content)
    assert f"{job} is not valid YAML" in _refused([job])


@pytest.mark.parametrize("name", ["FORGE_PRETRAIN__STEP", "FORGE_PRETRAIN_STEPS", "forge_pretrian__steps"])
def test_a_mistyped_variable_is_refused_with_the_nearest_field(name: str) -> None:
    text = _refused([], (), {name: "5"})
    assert name in text
    assert "did you mean pretrain.steps?" in text


def test_a_variable_that_is_no_json_where_json_is_wanted_is_refused() -> None:
    assert "FORGE_INGEST__SOURCES is not valid JSON" in _refused([], (), {"FORGE_INGEST__SOURCES": "[1"})


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--pretrain.step=5",), "did you mean pretrain.steps?"),
        (("--pretrain.steps",), "write --pretrain.steps=VALUE"),
        (("--pretrain.steps", "--pretrain.seed=1"), "write --pretrain.steps=VALUE"),
        (("--pretrain.steps=[",), "--pretrain.steps is not a valid YAML value"),
        (("--pretrain.steps=5", "6"), "unexpected argument"),
    ],
)
def test_a_mistyped_flag_is_refused_with_what_to_do(flags: tuple[str, ...], told: str) -> None:
    assert told in _refused([], flags)


def test_a_change_of_kind_is_refused_while_values_of_the_old_kind_remain(write_yaml: WriteYaml) -> None:
    first = write_yaml("pretrain: {optimizer: {kind: muon, momentum: 0.9, adamw: {kind: adamw, beta1: 0.8}}}", "a.yaml")
    second = write_yaml("pretrain: {optimizer: {kind: adamw}}", "b.yaml")
    text = _refused([first, second])
    assert "'muon' to 'adamw'" in text
    assert f"pretrain.optimizer.momentum (from {first})" in text
    assert f"pretrain.optimizer.adamw (from {first})" in text
    assert f"set them again in {second}" in text


def test_a_change_of_kind_within_a_list_names_the_file_that_set_the_list(write_yaml: WriteYaml) -> None:
    job = write_yaml(TWO_SOURCES)
    assert f"ingest.sources.0.services (from {job})" in _refused([job], ("--ingest.sources.0.kind=files",))


def test_a_change_of_kind_passes_once_every_old_value_is_set_again(write_yaml: WriteYaml) -> None:
    first = write_yaml("pretrain: {optimizer: {kind: muon, learning_rate: 0.1}}", "a.yaml")
    second = write_yaml("pretrain: {optimizer: {kind: adamw, learning_rate: 0.2}}", "b.yaml")
    assert resolve([first, second], (), {}).config.pretrain.optimizer == AdamWConfig(kind="adamw", learning_rate=0.2)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("pretrain: {learning_rate: 1}", "did you mean pretrain.optimizer.learning_rate?"),
        ("pretrian: {steps: 1}", "pretrian: no such field"),
        ("ingest: {sources: [{kind: files, uri: a, license: mit}]}", "ingest.sources.0.license: no such field"),
        ("ingest: {sources: [{kind: files}]}", "ingest.sources.0.uri: Field required"),
        ("ingest: {sources: [{kind: file, uri: a}]}", "'files', 'http', 'botocore'"),
        ("pretrain: {steps: many}", "pretrain.steps: Input should be a valid integer"),
        ("pretrain: {optimizer: {kind: muon, adamw: {kind: adamw, beta1: 2}}}", "pretrain.optimizer.adamw.beta1"),
        ("pretrain:", "pretrain: Input should be a valid dictionary"),
        ("1: 2", "1: Keys should be strings"),
    ],
)
def test_a_wrong_field_or_value_is_named_with_its_file(write_yaml: WriteYaml, content: str, told: str) -> None:
    job = write_yaml(content)
    text = _refused([job])
    assert told in text
    assert f"[{job}]" in text


def test_every_wrong_value_is_told_at_once_each_with_its_own_origin(write_yaml: WriteYaml) -> None:
    job = write_yaml("pretrain: {steps: 0}")
    text = _refused([job], ("--serve.port=70000",), {"FORGE_MODEL__NUM_LAYERS": "x"})
    rows = text.split(";")
    told = {"pretrain.steps": job, "serve.port": "--serve.port", "model.num_layers": "$FORGE_MODEL__NUM_LAYERS"}
    for field, origin in told.items():
        assert f"[{origin}]" in next(row for row in rows if field in row)


def test_a_rule_between_fields_names_the_layer_of_the_field_that_broke_it(write_yaml: WriteYaml) -> None:
    job = write_yaml("pretrain: {steps: 5, max_workers: 4}")
    assert "[--pretrain.slots]" in _refused([job], ("--pretrain.slots=3",))
    both = _refused([job], ("--pretrain.min_workers=5",))
    assert f"[--pretrain.min_workers, {job}]" in both


# ------------------------------------------------------------------------------------------------------------- schema


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"pretrain": {"slots": 12}}, "power of two"),
        ({"pretrain": {"min_workers": 3, "max_workers": 2}}, "more than max_workers"),
        ({"pretrain": {"max_workers": 32, "slots": 16}}, "some would have no work"),
        ({"pretrain": {"warmup_frac": 0.5, "decay_frac": 0.6}}, "more than 1"),
        ({"model": {"num_heads": 6, "num_kv_heads": 4}}, "does not divide"),
        ({"tokenizer": {"special_tokens": []}}, "at least one"),
        ({"tokenizer": {"special_tokens": ["<a>", "<a>"]}}, "each once"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        ForgeConfig.model_validate(wrong)


def test_the_edges_of_those_rules_are_allowed() -> None:
    PretrainConfig(slots=1, max_workers=1)
    PretrainConfig(slots=64, min_workers=64, max_workers=64, warmup_frac=0.4, decay_frac=0.6)


def test_a_copy_with_changes_is_validated_or_refused() -> None:
    config = PretrainConfig()
    with pytest.raises(TypeError, match="replace"):
        config.model_copy(update={"steps": -1})
    with pytest.raises(ValidationError):
        config.replace(steps=-1)
    with pytest.raises(ValidationError, match="power of two"):
        config.replace(slots=3)
    changed = config.replace(steps=7, optimizer=AdamWConfig(kind="adamw"))
    assert (changed.steps, changed.optimizer.kind, config.optimizer.kind) == (7, "adamw", "muon")
    assert config.model_copy() == config


def test_a_configuration_cannot_be_changed_in_place() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        ForgeConfig().pretrain.steps = 5


def test_operational_fields_do_not_change_what_is_fingerprinted_and_all_others_do() -> None:
    deciding = {
        "steps": 7,
        "slots": 32,
        "micro_batch": 4,
        "seq_len": 64,
        "warmup_frac": 0.1,
        "decay_frac": 0.2,
        "grad_clip": 0.5,
        "precision": "fp32",
        "compile": "off",
        "extends": "pretrain/0123456789abcdef",
        "seed": 1,
        "optimizer": {"kind": "adamw"},
        "mixture": {"epochs": {"botocore": 2.0}},
        "window_bytes": 1 << 20,
        "reduction": "exact",
    }
    operational = {
        "min_workers": 2,
        "max_workers": 4,
        "cpus_per_worker": 2,
        "gpus_per_worker": 1,
        "max_failures": 3,
        "checkpoint_every_s": 1.0,
        "checkpoints_kept": 9,
        "cache_bytes": 1 << 31,
        "store_wait_s": 5.0,
        "sharding": "fsdp",
        "guard": {"max_skips": 1},
        "disk_every_s": 1.0,
        "orphan_s": 1.0,
        "hang_s": 1.0,
        "digest_every_steps": 1,
        "preemption": "off",
        "usd_per_node_hour": 1.0,
        "at_once": 1,
        "recompute": "on",
    }
    base = PretrainConfig(reduction="fast")
    assert set(deciding) | set(operational) == set(PretrainConfig.model_fields)
    for name, value in (deciding | operational).items():
        changed = base.replace(**{name: value})
        assert changed != base
        assert (changed.fingerprinted() == base.fingerprinted()) == (name in operational), name


def test_operational_sections_stay_out_of_the_whole_jobs_fingerprint() -> None:
    base = ForgeConfig().fingerprinted()
    moved = {"workspace": "/elsewhere", "ray": {"num_cpus": 9}, "serve": {"port": 9}, "pretrain": {"max_workers": 1}}
    assert ForgeConfig.model_validate(moved).fingerprinted() == base
    deeper = {"pretrain": {"optimizer": {"kind": "muon", "momentum": 0.5}}}
    assert ForgeConfig.model_validate(deeper).fingerprinted() != base


def test_every_field_is_documented_and_says_whether_it_is_operational() -> None:
    rows = {name: text for name, _, _, text in reference()}
    assert [name for name, text in rows.items() if not text.removesuffix(" (operational)").strip()] == []
    named = {name for name, _, _ in resolve([], (), {}).rows()}
    # The keys of a mapping are the user's own: only the mapping is documented.
    assert {name for name in named if name not in rows and name.rpartition(".")[0] not in rows} == set()
    assert "ingest.sources.licence" in rows
    assert "(operational)" in rows["pretrain.max_workers"]
    assert "(operational)" not in rows["pretrain.steps"]


def test_fp8_refuses_widths_that_its_products_cannot_have(write_yaml: WriteYaml) -> None:
    path = write_yaml("model: {d_ff: 200}")
    fp8 = ("--pretrain.precision=fp8", "--pretrain.gpus_per_worker=1")
    text = _refused([path], fp8)
    assert (
        f"model.d_ff to be a multiple of 16, got 200: take 208, or precision bf16 [--pretrain.precision, {path}]"
        in text
    )
    assert "model.d_model to be a multiple of 16, got 100: take 112" in _refused([], (*fp8, "--model.d_model=100"))
    experts = ("--model.num_experts=4", "--model.expert_d_ff=100")  # which stay bf16
    assert resolve([path], (*fp8, *experts), {}).config.model.expert_width == 100
    assert resolve([path], ("--pretrain.precision=bf16",), {}).config.model.d_ff == 200


def test_a_key_of_a_mapping_can_be_set_by_yaml_and_by_flag(write_yaml: WriteYaml) -> None:
    path = write_yaml("pretrain: {mixture: {weights: {aws: 2.0, kernel: 1.0}}}")
    resolved = resolve([path], ["--pretrain.mixture.weights.aws=3"], {})
    assert resolved.config.pretrain.mixture.weights == {"aws": 3.0, "kernel": 1.0}
    assert resolved.origin("pretrain.mixture.weights.aws") == "--pretrain.mixture.weights.aws"
    assert "names no field" in _refused([], ("--pretrain.mixture.weights.aws.deeper=3",))


def test_a_field_of_a_union_set_without_its_kind_means_the_default_kind() -> None:
    flags = ["--pretrain.optimizer.momentum=0.9", "--pretrain.optimizer.adamw.beta2=0.99"]
    optimizer = resolve([], flags, {}).config.pretrain.optimizer
    assert (optimizer.kind, optimizer.momentum, optimizer.adamw.beta2) == ("muon", 0.9, 0.99)
    with pytest.raises(ConfigError, match=r"optimizer\.beta1"):
        resolve([], ["--pretrain.optimizer.beta1=0.9"], {})
