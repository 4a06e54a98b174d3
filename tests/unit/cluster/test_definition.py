"""A cluster's file is read as Ray's launcher reads it, and what is no such file is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from forge_ray import prices
from forge_ray.cluster import definition
from forge_ray.cluster.definition import ON_DEMAND, OWN, SPOT
from forge_ray.errors import ConfigError

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("name", ["aws", "gcp", "azure"])
def test_our_clouds_have_an_on_demand_head_spot_workers_and_a_floor_and_every_machine_has_a_price(name: str) -> None:
    found = definition.read(ROOT / "cluster" / f"{name}.yaml")
    head, *workers = found.node_types()
    assert head.is_head
    assert head.market == ON_DEMAND
    assert head.nodes == (1, 1)
    assert {each.market for each in workers} == {SPOT, ON_DEMAND}
    assert [each for each in workers if each.market == ON_DEMAND and each.nodes[0] > 0]
    known = prices.read(None)
    for each in (head, *workers):
        usd = each.usd_per_hour(known)
        assert usd, each.priced_as
        assert each.labels["cloud"] == name
        assert each.labels["market"] == each.market.replace(" ", "-")
        if each.market == SPOT:
            assert usd == known.machines[each.priced_as].spot_usd_per_hour


def test_own_machines_are_a_head_and_workers() -> None:
    found = definition.read(ROOT / "cluster" / "onprem.yaml")
    assert [(each.market, each.nodes) for each in found.node_types()] == [(OWN, (1, 1)), (OWN, (2, 2))]


def test_more_workers_than_the_cluster_may_have_are_not_counted(tmp_path: Path) -> None:
    config = yaml.safe_load((ROOT / "cluster" / "aws.yaml").read_text())
    path = tmp_path / "aws.yaml"
    path.write_text(yaml.safe_dump({**config, "max_workers": 3}))
    assert {each.nodes[1] for each in definition.read(path).node_types()} == {1, 3}


@pytest.mark.parametrize("scheduling", [{"preemptible": True}, [{"preemptible": True}], {"provisioningModel": "SPOT"}])
def test_every_way_to_say_spot_on_google_is_understood(tmp_path: Path, scheduling: object) -> None:
    config = yaml.safe_load((ROOT / "cluster" / "gcp.yaml").read_text())
    config["available_node_types"]["l4"]["node_config"]["scheduling"] = scheduling
    path = tmp_path / "gcp.yaml"
    path.write_text(yaml.safe_dump(config))
    (l4,) = [each for each in definition.read(path).node_types() if each.name == "l4"]
    assert l4.market == SPOT


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("pretrain: {steps: 5}\n", "lacks cluster_name"),
        ("cluster_name: c\nprovider: {type: awss}\nauth: {}\n", "no such provider"),
        ("cluster_name: c\nprovider: {type: aws}\nauth: {}\n", "needs available_node_types"),
        ("cluster_name: c\nprovider: {type: local}\nauth: {}\n", "needs provider.head_ip"),
    ],
)
def test_what_is_no_clusters_file_is_refused(tmp_path: Path, text: str, what: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=what) as caught:
        definition.read(path)
    assert str(path) in str(caught.value.got)
