"""The demo's documents, compared with what botocore's own loader says of the same services."""

from __future__ import annotations

import re

import botocore.session
import pytest

from forge_ray.config import BotocoreSource, IngestConfig
from forge_ray.data.reading import botocore_docs
from forge_ray.data.reading.botocore_docs import plain
from forge_ray.data.reading.formats import Document, Skipped
from forge_ray.errors import DataError

SERVICES = ("sts", "sqs", "dynamodb")


def documents(*services: str) -> list[Document]:
    source = BotocoreSource(kind="botocore", services=services)
    unit = botocore_docs.unit(source, botocore_docs.listing(source))
    found = list(botocore_docs.read(unit, IngestConfig()))
    assert not [item for item in found if isinstance(item, Skipped)]
    return found


def test_a_service_that_botocore_does_not_have_is_named() -> None:
    with pytest.raises(DataError, match="sqss"):
        botocore_docs.listing(BotocoreSource(kind="botocore", services=("sqs", "sqss")))


@pytest.mark.parametrize("service", SERVICES)
def test_every_operation_of_the_newest_version_is_one_document(service: str) -> None:
    model = botocore.session.Session().get_service_model(service)
    found = documents(service)
    prefix = f"botocore:{service}/{model.api_version}/"
    assert {item.source for item in found} == {prefix + name for name in model.operation_names}
    assert {item.group for item in found} == {service}
    by_name = {item.source.rpartition("/")[2]: item.text for item in found}
    for name in model.operation_names:
        operation, text = model.operation_model(name), by_name[name]
        shape = operation.input_shape
        for member, kind in shape.members.items() if shape else ():
            need = ", required" if member in shape.required_members else ""
            values = f", one of {' '.join(kind.enum[:8])}" if getattr(kind, "enum", None) else ""
            assert f"\n- {member} ({kind.type_name}{need}{values})" in text, (name, member)
        assert all(f"\n- {error.name}" in text.partition("\nErrors:")[2] for error in operation.error_shapes), name


def test_the_text_has_no_tags_no_entities_and_no_blank_lines() -> None:
    for item in documents(*SERVICES):
        assert not re.search(r"</?(p|a|b|i|ul|li|code|div|note|important|br)\b[^>]*>", item.text), item.source
        assert not re.search(r"&(amp|lt|gt|quot|nbsp|#\d+);", item.text), item.source
        assert not re.search(r"\n\s*\n|^-$", item.text, re.MULTILINE), item.source


def test_every_service_is_listed_with_about_the_size_of_its_text() -> None:
    rows = {row["name"]: row for row in botocore_docs.listing(BotocoreSource(kind="botocore"))}
    assert list(rows) == botocore.session.Session().get_available_services()
    assert {row["state"] for row in rows.values()} == {botocore.__version__}
    for service in SERVICES:
        size = sum(len(item.text.encode()) for item in documents(service))
        assert size / 4 < rows[service]["size"] < size * 8
        assert all(item.key.startswith(f"{rows[service]['key']}/") for item in documents(service))


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("<p>1 &lt; 2 &amp; &quot;x&quot; &#8212; y</p>", '1 < 2 & "x" — y'),
        ("<p>Write <code>&lt;bucket&gt;</code></p>", "Write <bucket>"),
        ("<p>List:</p><ul> <li> <p>One</p> </li> <li>Two</li> </ul>", "List:\n- One\n- Two"),
        ("one<br/>two<note> <p>three</p> </note>", "one\ntwo\nthree"),
    ],
)
def test_the_html_dialect_becomes_lines(html: str, text: str) -> None:
    assert plain(html) == text
