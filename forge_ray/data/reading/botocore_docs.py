"""Real documents for the demo: the AWS service descriptions inside the installed `botocore` package (Apache-2.0).

Each operation of a service becomes one document: what it does, its parameters, its result and its errors. The service
is the group, so that whole services are held out. Only the newest API version of a service is read: older ones are
near-duplicates.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from html import unescape
from importlib import metadata, resources
from typing import Any

from forge_ray.config import BotocoreSource, IngestConfig
from forge_ray.data.reading.formats import Document, Skipped
from forge_ray.errors import DataError

LICENCE = "Apache-2.0"
_KEY, _FILE = "botocore:", "service-2.json.gz"
_UNPACKED = 10  # how many times larger the text is than the packed description


def listing(source: BotocoreSource) -> list[dict[str, Any]]:
    """A row for each service: its name, about the size of its text, and the installed version.

    Raises:
        DataError: A named service is not in the package.
    """
    every = sorted(folder.name for folder in _data().iterdir() if folder.is_dir())
    unknown = sorted(set(source.services) - set(every))
    if unknown:
        raise DataError(
            "botocore has no such service",
            got=", ".join(unknown),
            wanted=f"names such as {', '.join(every[:4])}",
            do="mend ingest.sources.services",
        )
    version = metadata.version("botocore")
    return [
        {"name": name, "key": f"{_KEY}{name}", "size": _size(name), "state": version}
        for name in sorted(source.services) or every
    ]


def unit(source: BotocoreSource, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What `read` needs to read these services."""
    return {"kind": "botocore", "services": [row["name"] for row in rows]}


def read(unit: dict[str, Any], config: IngestConfig) -> Iterator[Document | Skipped]:
    """A document for each operation of the unit's services."""
    for service in unit["services"]:
        versions = _versions(service)
        if not versions:
            yield Skipped(f"{_KEY}{service}", "unreadable: no service-2.json.gz")
            continue
        raw = (_data() / service / versions[-1] / _FILE).read_bytes()
        description = json.loads(gzip.decompress(raw))
        for name in sorted(description["operations"]):
            text = operation_text(description, name)
            place = f"{_KEY}{service}/{versions[-1]}/{name}"
            yield Document(place, place, service, LICENCE, text)


def operation_text(description: dict[str, Any], name: str) -> str:
    """One operation as plain text."""
    operation, shapes = description["operations"][name], description["shapes"]
    title = description["metadata"].get("serviceFullName", description["metadata"].get("serviceId", ""))
    lines = [f"{title}: {name}", plain(operation.get("documentation", ""))]
    for heading, key in (("Parameters", "input"), ("Result", "output")):
        shape = shapes.get(operation.get(key, {}).get("shape", ""), {})
        members = _member_lines(shape, shapes)
        lines += [f"{heading}:", *members] if members else []
    errors = [_error_line(error["shape"], shapes) for error in operation.get("errors", [])]
    lines += ["Errors:", *errors] if errors else []
    return "\n".join(line for line in lines if line)


def _member_lines(shape: dict[str, Any], shapes: dict[str, Any]) -> list[str]:
    required, lines = set(shape.get("required", [])), []
    for member, target in shape.get("members", {}).items():
        kind = shapes.get(target["shape"], {})
        values = f", one of {' '.join(kind['enum'][:8])}" if kind.get("enum") else ""
        need = ", required" if member in required else ""
        text = plain(target.get("documentation", "")).replace("\n", " ")
        lines.append(f"- {member} ({kind.get('type', target['shape'])}{need}{values}): {text}".rstrip(": "))
    return lines


def _error_line(name: str, shapes: dict[str, Any]) -> str:
    text = plain(shapes.get(name, {}).get("documentation", "")).replace("\n", " ")
    return f"- {name}: {text}" if text else f"- {name}"


_BLOCK = re.compile(r"</?(?:p|div|li|ul|ol|dl|dt|dd|note|important|br|h\d|pre|tr|table|section)\b[^>]*>", re.IGNORECASE)
_TAG = re.compile(r"<[^<>]+>")


def plain(html: str) -> str:
    """botocore's small HTML dialect as text; a parser proper took 20 times as long on its 60 MB."""
    text = re.sub(r"<li>", "\n- ", html, flags=re.IGNORECASE)
    text = unescape(_TAG.sub("", _BLOCK.sub("\n", text)))
    lines = (" ".join(line.split()) for line in text.split("\n"))
    joined = "\n".join(line for line in lines if line)
    return re.sub(r"(?m)^-\n", "- ", joined)


def _versions(service: str) -> list[str]:
    return sorted(v.name for v in (_data() / service).iterdir() if (v / _FILE).is_file())


def _size(service: str) -> int:
    versions = _versions(service)
    return _UNPACKED * len((_data() / service / versions[-1] / _FILE).read_bytes()) if versions else 0


def _data() -> Any:
    return resources.files("botocore") / "data"
