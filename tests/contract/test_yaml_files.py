"""Every YAML file of the repository is accepted by the program that reads it."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from forge_ray import settings
from forge_ray.model.arithmetic import num_parameters, train_flops_per_token

ROOT = Path(__file__).parents[2]
JOBS = sorted((ROOT / "jobs").glob("**/*.y*ml"))
CLUSTERS = sorted((ROOT / "cluster").glob("*.y*ml"))
SERVING = sorted((ROOT / "serving").glob("**/*.y*ml"))


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_there_is_a_job_to_start_with() -> None:
    assert ROOT / "jobs" / "demo.yaml" in JOBS


@pytest.mark.parametrize("path", JOBS, ids=_name)
def test_a_job_resolves_and_names_its_documents(path: Path) -> None:
    resolved = settings.resolve([path], (), {})
    assert resolved.config.ingest.sources
    assert {origin for _, _, origin in resolved.rows()} == {"default", str(path)}


def test_the_comparison_with_a_general_model_costs_what_its_header_says() -> None:
    path = ROOT / "jobs" / "cloud_ops.yaml"
    text, config = path.read_text(), settings.resolve([path], (), {}).config
    model, pretrain, vocab_size = config.model, config.pretrain, config.tokenizer.vocab_size
    per_token = train_flops_per_token(model, vocab_size, pretrain.seq_len)
    tokens = pretrain.steps * pretrain.slots * pretrain.micro_batch * pretrain.seq_len
    flops = per_token * tokens
    assert f"{num_parameters(model, vocab_size):,} parameters" in text
    assert num_parameters(model, vocab_size) <= 10_000_000
    assert f"{tokens / 1e6:.1f} million tokens of {per_token / 1e6:.1f} MFLOP, {flops / 1e12:.0f} TFLOP" in text
    assert f"{flops / 48e9 / 60:.0f} minutes, and" in text


def _launcher_accepts(cluster: dict[str, Any]) -> None:
    """What `ray up` does before it calls a cloud: fills defaults, then validates against ray-schema.json."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(cluster))


@pytest.mark.parametrize("path", CLUSTERS, ids=_name)
def test_a_cluster_is_accepted_by_rays_launcher(path: Path) -> None:
    _launcher_accepts(yaml.safe_load(path.read_text()))


def test_the_launchers_check_would_notice_a_mistyped_field() -> None:
    import jsonschema

    good = {
        "cluster_name": "c",
        "max_workers": 1,
        "auth": {"ssh_user": "u"},
        "provider": {"type": "aws", "region": "us-east-1"},
        "head_node_type": "head",
        "available_node_types": {"head": {"resources": {}, "node_config": {}}},
    }
    _launcher_accepts(good)
    with pytest.raises(jsonschema.ValidationError, match="max_wrkers"):
        _launcher_accepts({**good, "max_wrkers": 1})


@cache
def _kuberay(kind: str) -> Any:
    """A validator of KubeRay's own schema, as strict as an API server: fields that it does not know are errors."""
    import jsonschema

    folder = ROOT.parent / "shared" / "kuberay-crds"
    if not folder.is_dir():
        pytest.skip("KubeRay's schemas lie beside the repository, not in it")
    for path in folder.glob("ray.io_*.yaml"):
        crd = yaml.load(path.read_text(), Loader=yaml.CSafeLoader)
        if crd["spec"]["names"]["kind"] == kind:
            (version,) = [row for row in crd["spec"]["versions"] if row["name"] == "v1"]
            schema = _strict(copy.deepcopy(version["schema"]["openAPIV3Schema"]))
            schema["properties"]["metadata"] = {"type": "object"}
            return jsonschema.Draft202012Validator(schema)
    raise AssertionError(f"no schema of {kind}")


def _strict(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: _strict(value) for key, value in schema.items()}
    if found.get("x-kubernetes-int-or-string"):
        found.pop("type", None)
        found["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    closed = "additionalProperties" not in found and not found.get("x-kubernetes-preserve-unknown-fields")
    if isinstance(found.get("properties"), dict) and closed:
        found["additionalProperties"] = False
    return found


def _documents() -> list[tuple[str, dict[str, Any]]]:
    paths = sorted((ROOT / "cluster" / "kubernetes").glob("*.yaml"))
    return [(f"{path.stem}-{row['kind']}", row) for path in paths for row in yaml.safe_load_all(path.read_text())]


@pytest.mark.parametrize(("name", "row"), _documents(), ids=lambda value: value if isinstance(value, str) else "")
def test_a_manifest_is_accepted_by_kuberay(name: str, row: dict[str, Any]) -> None:
    if row["apiVersion"] != "ray.io/v1":
        pytest.skip("not KubeRay's")
    errors = [
        f"{'/'.join(map(str, e.absolute_path))}: {e.message[:200]}" for e in _kuberay(row["kind"]).iter_errors(row)
    ]
    assert not errors
    spoilt = {**row, "spec": {**row["spec"], "entrypiont": "x"}}
    assert list(_kuberay(row["kind"]).iter_errors(spoilt)), "the check would notice"


def test_pods_run_as_nobody_with_bounds_a_token_and_certificates() -> None:
    (cluster,) = [row for name, row in _documents() if name == "cluster-RayCluster"]
    assert cluster["spec"]["authOptions"]["mode"] == "token"
    groups = [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]
    for pod in (group["template"]["spec"] for group in groups):
        assert pod["securityContext"]["runAsNonRoot"]
        assert [each["name"] for each in pod["initContainers"]] == ["identity"]
        for container in pod["containers"] + pod["initContainers"]:
            assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]
            assert container["resources"]["limits"]["memory"]
        (ray,) = pod["containers"]
        assert {"name": "RAY_USE_TLS", "value": "1"} in ray["env"]
        assert not [row for row in ray["env"] if "TOKEN" in row["name"]], "KubeRay takes it from the Secret"
    (policy,) = [row for name, row in _documents() if name == "cluster-NetworkPolicy"]
    labels = policy["spec"]["podSelector"]["matchLabels"].items()
    assert all(labels <= group["template"]["metadata"]["labels"].items() for group in groups)


@pytest.mark.parametrize("path", SERVING, ids=_name)
def test_a_serving_file_is_accepted_by_ray_serve(path: Path) -> None:
    from ray.serve.schema import ServeDeploySchema

    assert ServeDeploySchema.parse_obj(yaml.safe_load(path.read_text())).applications
