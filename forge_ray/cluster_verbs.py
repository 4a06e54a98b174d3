"""What `forge cluster`, `submit`, `jobs`, `logs`, `stop` and `resume` do and say; the work is in `cluster/`."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import yaml

from forge_ray import prices
from forge_ray.cluster import checks, identity, jobs, launcher
from forge_ray.cluster.definition import LOCAL, Definition
from forge_ray.cluster.jobs import Record
from forge_ray.errors import ConfigError
from forge_ray.settings import Resolved

Told = tuple[Any, str, int]
"""The result as JSON values and as text, and the exit code."""


def plan(named: str, price_file: str | None) -> Told:
    """What a file would create, what that costs, and what is wrong with it."""
    cluster = launcher.find(named)
    found = checks.findings(cluster)
    known = prices.read(price_file)
    types = cluster.node_types()
    usd = {each.name: each.usd_per_hour(known) for each in types}
    fewest = sum((usd[each.name] or 0.0) * each.nodes[0] for each in types)
    most = fewest + _dearest(cluster, {name: price or 0.0 for name, price in usd.items()})
    result = {
        "cluster": cluster.name,
        "file": str(cluster.path),
        "place": cluster.place,
        "node_types": [{**asdict(each), "usd_per_hour": usd[each.name]} for each in types],
        "usd_per_hour": [round(fewest, 4), round(most, 4)],
        "prices_as_of": known.as_of.isoformat(),
        "findings": [asdict(each) for each in found],
    }
    lines = [f"{cluster.name}: {cluster.place}, {cluster.path}", ""]
    lines += [f"  {'':<12} {'machine':<26} {'market':<10} {'nodes':<8} $/hour each"]
    for each in types:
        low, high = each.nodes
        nodes, price = f"{low} to {high}" if low != high else str(low), usd[each.name]
        cost = "yours" if cluster.kind == LOCAL else "unknown" if price is None else f"{price:,.2f}"
        labels = " ".join(f"{key}={value}" for key, value in each.labels.items())
        row = f"  {each.name:<12} {each.machine:<26} {each.market:<10} {nodes:<8} {cost:<8} {labels}"
        lines.append(row.rstrip())
    if cluster.kind != LOCAL:
        without = "" if None not in usd.values() else ", without what has no price in the file"
        lines += ["", f"  {fewest:,.2f} dollars an hour with the fewest nodes, {most:,.2f} with the most{without}"]
        lines += [f"  (list prices of {known.as_of}, without storage and traffic; --prices takes a file of yours)"]
    place = identity.folder(cluster.name)
    made = "made" if (place / identity.NODE).exists() else "`forge cluster up` makes it"
    lines += ["", f"ok    {'identity':<20} {made}: {place}"]
    lines += _told(found) or [f"ok    {'file':<20} Ray's schema, machines, ports, secrets, markets"]
    return result, "\n".join(lines), ConfigError.exit_code if any(each.refused for each in found) else 0


def doctor(named: str) -> Told:
    """What this machine lacks to start a cluster, and what the machines of one of your own lack."""
    cluster = launcher.find(named)
    programs = {name: shutil.which(name) for name in ("ssh", "rsync")}
    lines = [_line(bool(path), name, path or "is missing: install it") for name, path in programs.items()]
    found = checks.findings(cluster)
    lines += _told(found) or [_line(True, "file", str(cluster.path))]
    lacking = {host: launcher.lacks(cluster, host) for host in launcher.hosts(cluster)}
    lines += [_line(not lacks, host, lacks or "SSH, rsync, make, Python") for host, lacks in lacking.items()]
    fine = all(programs.values()) and not any(each.refused for each in found) and not any(lacking.values())
    result = {"programs": programs, "findings": [asdict(each) for each in found], "hosts": lacking}
    return result, "\n".join(lines), 0 if fine else 1


def identify(name: str) -> Told:
    """Makes a cluster's token and authority by themselves, for Kubernetes."""
    place = identity.make(name) / identity.NODE
    return {"cluster": name, "folder": str(place)}, f"{name}: {place}", 0


def up(named: str) -> Told:
    """Creates a cluster, or brings one to what its file says."""
    cluster = launcher.find(named)
    head = launcher.up(cluster)
    text = f"""{cluster.name} is up, its head is {head}

Next
  forge submit JOB.yaml --cluster {cluster.name}
  forge cluster status {cluster.name}
  ray dashboard {cluster.path}
  forge cluster down {cluster.name}"""
    return {"cluster": cluster.name, "head": head}, text, 0


def down(named: str) -> Told:
    """Ends a cluster and says where nothing of it is left."""
    cluster = launcher.find(named)
    ended = launcher.down(cluster)
    text = f"{cluster.name} is down; nothing is left on {', '.join(ended)}"
    return {"cluster": cluster.name, "ended": ended}, text, 0


def status(named: str) -> Told:
    """What Ray says of a running cluster."""
    cluster = launcher.find(named)
    text = launcher.status(cluster)
    return {"cluster": cluster.name, "status": text}, text.rstrip(), 0


def listed() -> Told:
    """The clusters that were started from here."""
    rows = [{"name": each.name, "file": str(each.file), "started": each.started} for each in launcher.known()]
    text = "\n".join(f"{row['name']:<24} {row['started']}  {row['file']}" for row in rows)
    return {"clusters": rows}, text or "no cluster was started from here", 0


CLUSTER: Mapping[str, Callable[[str], Told]] = {
    "up": up,
    "status": status,
    "down": down,
    "doctor": doctor,
    "identity": identify,
}


# --------------------------------------------------------------------------------------------------------------- jobs


def submit(verb: str, resolved: Resolved, values: Mapping[str, str], *, detach: bool) -> Told:
    """Submits a job, and follows it unless it is to be left alone."""
    cluster, address = values.get("--cluster", ""), values.get("--address", "")
    if bool(cluster) == bool(address):
        raise ConfigError(
            "where is the job to run?",
            got="--cluster and --address" if cluster else "neither --cluster nor --address",
            wanted="one of --cluster FILE|NAME and --address http://HEAD:8265",
            do="`forge cluster list` names the clusters that were started from here",
        )
    config = yaml.safe_dump(resolved.config.model_dump(mode="json", exclude_unset=True), sort_keys=False)
    return _followed(jobs.submit(verb, config, cluster=cluster, address=address), detach=detach)


def resume(job: str, *, detach: bool) -> Told:
    """Submits a job again; its run goes on where it stopped."""
    return _followed(jobs.resume(job), detach=detach)


def logs(job: str) -> Told:
    """Shows a job's log until it ends."""
    return _followed(jobs.find(job), detach=False)


def stop(job: str) -> Told:
    """Ends a job in order."""
    record = jobs.find(job)
    state = jobs.stop(record)
    text = f"{record.job}: {state.lower()}; `forge resume {record.job}` goes on"
    return {"job": record.job, "status": state}, text, 0


def all_jobs() -> Told:
    """What was submitted from here, and what became of it."""
    records = jobs.records()
    states = jobs.states(records)
    rows = [{**asdict(record), "status": states[record.job]} for record in records]
    lines = [f"{each.job:<28} {states[each.job]:<10} {each.submitted}  {each.where}" for each in records]
    return {"jobs": rows}, "\n".join(lines) or "no job was submitted from here", 0


def _followed(record: Record, *, detach: bool) -> Told:
    result = {"job": record.job, "where": record.where}
    if detach:
        text = f"{record.job} is submitted to {record.where}; `forge logs {record.job}` shows how it goes"
        return result, text, 0
    code = jobs.follow(record)
    text = f"{record.job} has ended well"
    if code:
        text = f"{record.job} ended with exit code {code}; `forge resume {record.job}` goes on from its workspace"
    return {**result, "exit_code": code}, text, code


# ------------------------------------------------------------------------------------------------------------ helpers


def _dearest(cluster: Definition, usd: Mapping[str, float]) -> float:
    """Dollars an hour of all nodes that may come on top of the fewest, if they are the dearest ones."""
    _, *workers = cluster.node_types()
    room = int(cluster.config.get("max_workers", 2)) - sum(each.nodes[0] for each in workers)
    total = 0.0
    for each in sorted(workers, key=lambda each: -usd[each.name]):
        more = max(0, min(room, each.nodes[1] - each.nodes[0]))
        room -= more
        total += more * usd[each.name]
    return total


def _line(fine: bool, name: str, text: str) -> str:
    return f"{'ok  ' if fine else 'MEND'}  {name:<20} {text}"


def _told(found: list[checks.Finding]) -> list[str]:
    return [f"{'MEND' if f.refused else 'note'}  {f.where}\n      {f.what}\n      {f.do}" for f in found]
