"""What is wrong or unsafe in a cluster's file is found before a cloud is asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from forge_ray.cluster import checks, definition
from forge_ray.cluster.checks import Finding

ROOT = Path(__file__).parents[3]
Config = dict[str, Any]


def _found(config: Config, tmp_path: Path) -> list[Finding]:
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(config))
    return checks.findings(definition.read(path))


def _read(name: str) -> Config:
    found: Config = yaml.safe_load((ROOT / "cluster" / f"{name}.yaml").read_text())
    return found


def _is_example(finding: Finding) -> bool:
    return "still an example" in finding.what or "no such file" in finding.what


@pytest.mark.parametrize("path", sorted((ROOT / "cluster").glob("*.yaml")), ids=lambda path: path.stem)
def test_ours_are_wrong_in_nothing_but_their_examples(path: Path) -> None:
    found = checks.findings(definition.read(path))
    assert found
    assert [each for each in found if not _is_example(each)] == []


def _worker(config: Config) -> Config:
    types = config["available_node_types"]
    name = next(name for name in types if name != config["head_node_type"])
    found: Config = types[name]["node_config"]
    return found


def _start(config: Config, old: str, new: str) -> None:
    config["head_start_ray_commands"][-1] = config["head_start_ray_commands"][-1].replace(old, new)


# What a hand may do to a file, on which provider, and what is said of it.
HARM: dict[str, tuple[str, Callable[[Config], Any], str]] = {
    "a mistyped field": ("aws", lambda c: c.update(max_wrkers=1), "max_wrkers"),
    "a mistyped machine field on AWS": ("aws", lambda c: _worker(c).update(InstanceTyp="p5"), "InstanceTyp"),
    "a wrong kind on AWS": ("aws", lambda c: _worker(c).update(EbsOptimized="yes"), "EbsOptimized"),
    "a mistyped machine field on GCP": ("gcp", lambda c: _worker(c).update(machineTypee="x"), "machineTypee"),
    "a mistyped market on GCP": ("gcp", lambda c: _worker(c).update(scheduling={"preemptable": 1}), "preemptable"),
    "a mistyped parameter on Azure": (
        "azure",
        lambda c: _worker(c)["azure_arm_parameters"].update(vmSizee="x"),
        "vmSizee",
    ),
    "a wrong kind on Azure": ("azure", lambda c: _worker(c)["azure_arm_parameters"].update(vmSize=3), "wants a value"),
    "Ray's own commands": ("aws", lambda c: c.pop("setup_commands"), "setup_commands"),
    "Ray without a token": ("onprem", lambda c: _start(c, ". ~/forge-ray/cluster/node.sh &&", ""), "without a token"),
    "an open dashboard": ("onprem", lambda c: _start(c, "127.0.0.1", "0.0.0.0"), "opens the dashboard"),
    "a secret": ("onprem", lambda c: c["setup_commands"].append("export RAY_AUTH_TOKEN=abc"), "holds a secret"),
    "another cluster's identity": (
        "aws",
        lambda c: c.update(cluster_name="other"),
        "does not hand this cluster's token",
    ),
    "no identity": ("gcp", lambda c: c.update(file_mounts={}), "does not hand this cluster's token"),
    "a port for everyone": (
        "aws",
        lambda c: c["provider"]["security_group"]["IpPermissions"].append(
            {"FromPort": 8265, "ToPort": 8265, "IpProtocol": "tcp", "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}
        ),
        "opens ports 8265 to 8265 to everyone",
    ),
    "a spot head": (
        "aws",
        lambda c: c["available_node_types"]["head"]["node_config"].update(InstanceMarketOptions={"MarketType": "spot"}),
        "the head is a spot machine",
    ),
}


@pytest.mark.parametrize("harm", HARM)
def test_harm_is_refused_and_named(tmp_path: Path, harm: str) -> None:
    provider, do, said = HARM[harm]
    config = _read(provider)
    do(config)
    new = [each for each in _found(config, tmp_path) if each.refused and not _is_example(each)]
    assert new
    assert all(said in f"{each.where} {each.what}" for each in new), new
    assert all(each.do for each in new)


def test_advice_refuses_nothing(tmp_path: Path) -> None:
    config = _read("aws")
    config["provider"]["use_internal_ips"] = False
    del config["available_node_types"]["head"]["node_config"]["IamInstanceProfile"]
    del config["available_node_types"]["l40s"]
    config["provider"]["security_group"]["IpPermissions"][0]["IpRanges"] = [{"CidrIp": "0.0.0.0/0"}]
    advice = [each for each in _found(config, tmp_path) if not each.refused]
    assert {each.where.rpartition(".")[2] for each in advice} == {
        "use_internal_ips",
        "node_config",
        "security_group",
        "available_node_types",
    }
