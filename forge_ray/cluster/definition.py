"""A cluster's file, as Ray's launcher reads it: which machines it may create, in which market, and who reaches them.

Owns reading it. What is wrong with one is `checks.py`; the file stays the launcher's, so `ray up FILE` works too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge_ray.errors import ConfigError
from forge_ray.prices import Machine, Prices
from forge_ray.settings import read_yaml

ON_DEMAND, SPOT, OWN = "on demand", "spot", "own"
LOCAL = "local"
"""Ray's name of the provider of machines that stand there already."""
CLOUDS = ("aws", "gcp", "azure")
COMMANDS = (
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)


@dataclass(frozen=True)
class NodeType:
    """Machines of one kind that a cluster may have.

    Args:
        machine: What the provider calls it, such as `p5.48xlarge`; nothing for machines of your own.
        market: `on demand`, `spot`, or `own`.
        nodes: Fewest and most of them.
        priced_as: Its name in the price file.
    """

    name: str
    machine: str
    market: str
    nodes: tuple[int, int]
    labels: Mapping[str, str]
    priced_as: str
    is_head: bool = False

    def usd_per_hour(self, prices: Prices) -> float | None:
        """Price of one of them; none where the price file has none for it."""
        found: Machine | None = prices.machines.get(self.priced_as)
        if found is None:
            return None
        return found.spot_usd_per_hour if self.market == SPOT else found.usd_per_hour


@dataclass(frozen=True)
class Definition:
    """A cluster's file."""

    path: Path
    config: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Of the cluster."""
        return str(self.config["cluster_name"])

    @property
    def provider(self) -> Mapping[str, Any]:
        """Its section of that name."""
        return self.config["provider"]

    @property
    def kind(self) -> str:
        """`aws`, `gcp`, `azure` or `local`."""
        return str(self.provider["type"])

    @property
    def place(self) -> str:
        """Where it would stand, for people."""
        where = self.provider.get("region") or self.provider.get("location") or self.provider.get("head_ip", "")
        return f"{self.kind} {where}".strip()

    def node_types(self) -> list[NodeType]:
        """What it may have, the head first."""
        if self.kind == LOCAL:
            workers = len(self.provider.get("worker_ips") or ())
            fewest = min(workers, int(self.config.get("min_workers", workers)))
            return [
                NodeType("head", "", OWN, (1, 1), {}, "", is_head=True),
                NodeType("worker", "", OWN, (fewest, workers), {}, ""),
            ]
        most = int(self.config.get("max_workers", 2))  # Ray's default
        head, found = self.config.get("head_node_type"), []
        for name, row in self.config["available_node_types"].items():
            machine, market = _machine(self.kind, row.get("node_config") or {})
            fewest = int(row.get("min_workers", 0))
            nodes = (1, 1) if name == head else (fewest, min(most, int(row.get("max_workers", fewest))))
            priced_as = f"{self.kind}/{machine.removeprefix('Standard_')}"
            found.append(NodeType(name, machine, market, nodes, row.get("labels") or {}, priced_as, name == head))
        return sorted(found, key=lambda each: not each.is_head)

    def commands(self) -> list[tuple[str, str]]:
        """Every shell command that it runs on nodes, with where it stands."""
        found = [(key, self.config.get(key) or ()) for key in COMMANDS]
        for name, row in (self.config.get("available_node_types") or {}).items():
            found += [(f"available_node_types.{name}.{key}", row.get(key) or ()) for key in COMMANDS[:4]]
        return [(where, str(command)) for where, commands in found for command in commands]


def read(path: str | Path) -> Definition:
    """A cluster's file.

    Raises:
        ConfigError: It is missing, no YAML, or lacks what every cluster's file has.
    """
    config = read_yaml(Path(path))
    for key, kind in (("cluster_name", str), ("provider", dict), ("auth", dict)):
        if not isinstance(config.get(key), kind):
            raise ConfigError(
                f"this is no cluster's file: it lacks {key}",
                got=f"{path}: {', '.join(map(str, config)) or 'nothing'}",
                wanted="a file of Ray's cluster launcher, such as cluster/aws.yaml",
                do="give the cluster's file, not the job's",
            )
    kind = config["provider"].get("type")
    if kind not in (*CLOUDS, LOCAL):
        raise ConfigError(
            "no such provider",
            got=f"{path}: provider.type {kind}",
            wanted=", ".join((*CLOUDS, LOCAL)),
            do="for Kubernetes apply cluster/kubernetes/ with kubectl",
        )
    if kind != LOCAL and not isinstance(config.get("available_node_types"), dict):
        raise ConfigError("a cluster in a cloud needs available_node_types", got=path, do="see cluster/aws.yaml")
    if kind == LOCAL and not config["provider"].get("head_ip"):
        raise ConfigError(
            "a cluster of your own machines needs provider.head_ip", got=path, do="see cluster/onprem.yaml"
        )
    return Definition(Path(path), config)


def _machine(kind: str, node: Mapping[str, Any]) -> tuple[str, str]:
    """What the provider calls a machine, and its market."""
    if kind == "aws":
        spot = (node.get("InstanceMarketOptions") or {}).get("MarketType") == "spot"
        return str(node.get("InstanceType", "")), SPOT if spot else ON_DEMAND
    if kind == "gcp":
        said = node.get("scheduling") or {}
        rows = said if isinstance(said, list) else [said]  # Ray takes both
        spot = any(row.get("provisioningModel") == "SPOT" or row.get("preemptible") for row in rows)
        return str(node.get("machineType", "")).rpartition("/")[2], SPOT if spot else ON_DEMAND
    parameters = node.get("azure_arm_parameters") or {}
    return str(parameters.get("vmSize", "")), SPOT if parameters.get("priority") == "Spot" else ON_DEMAND
