"""The demo's documents, compared with what botocore's own loader says of the same services."""

from __future__ import annotations

import re

import botocore.session
import pytest

from forge_ray.config import BotocoreSource, IngestConfig
from forge_ray.data import botocore_docs
from forge_ray.data.botocore_docs import plain
from forge_ray.data.formats import Document, Skipped
from forge_ray.errors import DataError

SERVICES = ("sts", "sqs", "dynamodb")


def documents(*services: str) -> list[Document]:
    units = botocore_docs.units(BotocoreSource(kind="botocore", services=services))
    found = [item for unit in units for item in botocore_docs.read(unit, IngestConfig())]
    assert not [item for item in found if isinstance(item, Skipped)]
    return found


def test_a_service_that_botocore_does_not_have_is_named() -> None:
    with pytest.raises(DataError, match="sqss"):
        botocore_docs.units(BotocoreSource(kind="botocore", services=("sqs", "sqss")))


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


def test_all_services_are_shared_out_over_units_each_once() -> None:
    units = botocore_docs.units(BotocoreSource(kind="botocore"))
    names = [name for unit in units for name in unit["services"]]
    assert sorted(names) == botocore.session.Session().get_available_services()
    assert max(len(unit["services"]) for unit in units) <= botocore_docs.SERVICES_PER_UNIT


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
