"""What is wrong with a cluster's file, as far as that can be told without a cloud.

Ray's own schema leaves `provider` and `node_config` open, so a mistyped field there passes and is found by the bill.
Here node configurations are held against what the providers' own clients know: AWS against botocore's model of
RunInstances, Azure against the template that Ray deploys; of GCP the names of the fields alone. Then what makes a
cluster safe: a token, TLS between hosts, no port that others reach. Owns judging. Reads no file but the definition's.
"""

from __future__ import annotations

import copy
import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from forge_ray.cluster import identity
from forge_ray.cluster.definition import COMMANDS, LOCAL, SPOT, Definition

ENTRY = "cluster/node.sh"
"""Sourced before Ray starts on a node: token, TLS, no reports. Below the repository's folder there."""
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_ANYONE = ("0.0.0.0/0", "::/0")
_SSH = 22
# Addresses that are kept for documentation (RFC 5737), and what our files say where a value of yours belongs.
_TO_BE_REPLACED = re.compile(r"\b(?:192\.0\.2|198\.51\.100|203\.0\.113)\.\d+\b|\bREPLACE-[A-Z-]+")
_SECRET = re.compile(r"\b(?:RAY_AUTH_TOKEN|AWS_SECRET_ACCESS_KEY|[A-Z_]*PASSWORD)=\S")

# Fields of an instance and of its scheduling in Compute Engine's API v1 (its reference, 2025-11).
_GCP_INSTANCE = """
advancedMachineFeatures canIpForward confidentialInstanceConfig deletionProtection description disks displayDevice
guestAccelerators hostname instanceEncryptionKey keyRevocationActionType labels machineType metadata minCpuPlatform name
networkInterfaces networkPerformanceConfig params privateIpv6GoogleAccess reservationAffinity resourcePolicies
scheduling serviceAccounts shieldedInstanceConfig sourceMachineImage sourceMachineImageEncryptionKey tags zone
"""
_GCP_SCHEDULING = """
automaticRestart availabilityDomain hostErrorTimeoutSeconds instanceTerminationAction localSsdRecoveryTimeout
locationHint maxRunDuration minNodeCpus nodeAffinities onHostMaintenance onInstanceStopAction preemptible
provisioningModel terminationTime
"""


@dataclass(frozen=True)
class Finding:
    """Something to mend. With `refused` no cluster is created before it is."""

    where: str
    what: str
    do: str
    refused: bool = True


def findings(definition: Definition) -> list[Finding]:
    """All that is wrong with a file; what refuses it first.

    Cost: 2 s, most of it loading Ray and AWS's model.
    """
    found = [
        *_schema(definition),
        *_nodes(definition),
        *_safety(definition),
        *_markets(definition),
        *_values(definition),
    ]
    return sorted(found, key=lambda each: not each.refused)


# ---------------------------------------------------------------------------------------------------------- its fields


def _schema(definition: Definition) -> Iterator[Finding]:
    """What Ray's launcher would refuse, before it calls a cloud."""
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    logging.getLogger("ray.autoscaler._private.util").setLevel(logging.WARNING)
    try:
        validate_config(prepare_config(copy.deepcopy(dict(definition.config))))
    except jsonschema.ValidationError as error:
        yield Finding(
            ".".join(map(str, error.absolute_path)) or "file", error.message, "see Ray's cluster YAML reference"
        )
    except Exception as error:  # Ray raises all kinds
        yield Finding("file", f"Ray's launcher refuses it: {error}", "see Ray's cluster YAML reference")
    for key in COMMANDS:
        if key not in definition.config:
            yield Finding(
                key,
                "is missing: Ray would take its own, which install a nightly wheel (AWS) and start Ray without a token",
                "write it, [] for nothing",
            )


def _nodes(definition: Definition) -> Iterator[Finding]:
    """What a provider would not understand of its machines."""
    check = {"aws": _aws, "gcp": _gcp, "azure": _azure}.get(definition.kind)
    if not check:
        return
    for name, row in definition.config["available_node_types"].items():
        for field, what in check(row.get("node_config") or {}):
            where = f"available_node_types.{name}.node_config{field and '.' + field}"
            yield Finding(where, what, "the provider's reference lists the fields")
    for each in definition.node_types():
        if not each.machine:
            yield Finding(f"available_node_types.{each.name}.node_config", "names no machine type", "see cluster/")


@cache
def _run_instances() -> Any:
    import botocore.session

    return botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape


def _aws(node: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    from botocore.validate import ParamValidator

    shape = _run_instances()
    own = ("SubnetIds",)  # Ray picks one of them
    request = {"MinCount": 1, "MaxCount": 1, **{key: value for key, value in node.items() if key not in own}}
    for key in request.keys() - shape.members.keys():
        yield key, "is no field of RunInstances"
    known = {key: value for key, value in request.items() if key in shape.members}
    for line in ParamValidator().validate(known, shape).generate_report().splitlines():
        yield "", line


def _gcp(node: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if "acceleratorType" in node or "acceleratorConfig" in node:  # a TPU, of which we know nothing
        return
    for key in node.keys() - set(_GCP_INSTANCE.split()):
        yield key, "is no field of an instance"
    scheduling = node.get("scheduling") or {}
    for row in scheduling if isinstance(scheduling, list) else [scheduling]:
        for key in row.keys() - set(_GCP_SCHEDULING.split()):
            yield f"scheduling.{key}", "is no field of an instance's scheduling"


def _azure(node: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    import ray

    template = Path(ray.__file__).parent / "autoscaler" / "_private" / "_azure" / "azure-vm-template.json"
    known = json.loads(template.read_text(encoding="utf-8"))["parameters"]
    kinds = {"string": str, "securestring": str, "int": int, "bool": bool, "array": list, "object": dict}
    for key, value in (node.get("azure_arm_parameters") or {}).items():
        field = f"azure_arm_parameters.{key}"
        if key not in known:
            yield field, "is no parameter of Ray's template"
            continue
        kind, allowed = known[key]["type"], known[key].get("allowedValues")
        if not isinstance(value, kinds[kind.lower()]):
            yield field, f"wants a value of type {kind}, got {value!r}"
        elif allowed and value not in allowed:
            yield field, f"wants one of {', '.join(map(str, allowed))}, got {value!r}"


# --------------------------------------------------------------------------------------------------------- its safety


def _safety(definition: Definition) -> Iterator[Finding]:
    for where, command in definition.commands():
        starts = re.search(r"\bray start\b", command)
        # Alone it would do, but then the next edit forgets one of four variables.
        if starts and ENTRY not in command[: starts.start()]:
            yield Finding(
                where,
                "starts Ray without a token and without TLS between hosts",
                f"source {ENTRY} before `ray start`, as cluster/*.yaml do",
            )
        host = re.search(r"--dashboard-host[= ](\S+)", command)
        if host and host[1] not in _LOOPBACK:
            yield Finding(
                where,
                f"opens the dashboard to others: --dashboard-host={host[1]}",
                "leave it on 127.0.0.1: `forge submit --cluster` and `ray dashboard` reach it through SSH",
            )
        if secret := _SECRET.search(command):
            yield Finding(
                where, f"holds a secret: {secret[0][:-1]}", "secrets come from files and roles, never from YAML"
            )
    mounts = definition.config.get("file_mounts") or {}
    wanted = f"{identity.HOME}/{definition.name}/{identity.NODE}"
    source = next((str(source) for target, source in mounts.items() if target.rstrip("/") == identity.ON_NODES), None)
    if source is None or Path(source).expanduser() != Path(wanted).expanduser():
        yield Finding(
            "file_mounts",
            f"does not hand this cluster's token and certificates to its nodes: {source or 'nothing'}",
            f'write "{identity.ON_NODES}": "{wanted}"',
        )
    if definition.kind == "aws":
        yield from _open_ports(definition)
        for name, row in definition.config["available_node_types"].items():
            if "IamInstanceProfile" not in (row.get("node_config") or {}) and name == definition.config.get(
                "head_node_type"
            ):
                yield Finding(
                    f"available_node_types.{name}.node_config",
                    "names no IamInstanceProfile: Ray makes a role that may do anything with EC2 and S3",
                    "make a role that may start machines and read your buckets, and name it",
                    refused=False,
                )
    if definition.kind != LOCAL and not definition.provider.get("use_internal_ips"):
        yield Finding(
            "provider.use_internal_ips",
            "is off: machines get addresses that the internet reaches",
            "true, with private subnets and a way in (auth.ssh_proxy_command, a VPN)",
            refused=False,
        )


def _open_ports(definition: Definition) -> Iterator[Finding]:
    rules = (definition.provider.get("security_group") or {}).get("IpPermissions") or ()
    for rule in rules:
        ranges = [row.get("CidrIp") for row in rule.get("IpRanges") or ()]
        ranges += [row.get("CidrIpv6") for row in rule.get("Ipv6Ranges") or ()]
        if not set(ranges) & set(_ANYONE):
            continue
        ports = (rule.get("FromPort"), rule.get("ToPort"))
        only_ssh = ports == (_SSH, _SSH)
        yield Finding(
            "provider.security_group",
            f"opens {'SSH' if only_ssh else f'ports {ports[0]} to {ports[1]}'} to everyone",
            "name the addresses that you come from",
            refused=not only_ssh,
        )


def _markets(definition: Definition) -> Iterator[Finding]:
    head, *workers = definition.node_types()
    if head.market == SPOT:
        yield Finding(
            f"available_node_types.{head.name}", "the head is a spot machine, and the cluster ends with it", "on demand"
        )
    if workers and all(each.market == SPOT for each in workers):
        yield Finding(
            "available_node_types",
            "all workers are spot machines: a run may stand still for hours",
            "give one type without spot min_workers of 1 or more",
            refused=False,
        )


def _values(definition: Definition) -> Iterator[Finding]:
    examples: dict[str, list[str]] = {}
    for where, value in _texts("", definition.config):
        if found := _TO_BE_REPLACED.search(value):
            examples.setdefault(found[0], []).append(where)
    for example, places in examples.items():
        more = f", and in {len(places) - 1} more places" if len(places) > 1 else ""
        yield Finding(places[0], f"is still an example: {example}{more}", "put in yours")
    key = definition.config["auth"].get("ssh_private_key")
    if key and not Path(key).expanduser().is_file():
        yield Finding("auth.ssh_private_key", f"there is no such file: {key}", "make it with ssh-keygen, or name yours")


def _texts(where: str, value: Any) -> Iterator[tuple[str, str]]:
    """Every text below, with where it stands."""
    if isinstance(value, Mapping):
        for key, below in value.items():
            yield from _texts(f"{where}.{key}".lstrip("."), below)
    elif isinstance(value, list):
        for number, below in enumerate(value):
            yield from _texts(f"{where}[{number}]", below)
    elif isinstance(value, str):
        yield where, value
