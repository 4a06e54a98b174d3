"""What may be shown of a document: its names and its beginning after the finders of private data have gone over them.

Owns what a report may take from a document. Everything that is found is replaced, whatever the job does about it.
Not covered: what the finders do not find; names of persons are looked for only where the job names a model for them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from forge_ray.config import PrivacyConfig
from forge_ray.data.account.builds import Build
from forge_ray.data.pii.privacy import KINDS, Scrubber
from forge_ray.errors import ArtifactError, NotInstalledError

EXCERPT_CHARS = 300
_SCRUBBED_CHARS = 1 << 20


def privacy_config(build: Build) -> PrivacyConfig | None:
    """What a build was told to do about private data; none if it was not curated."""
    if build.curate is None:
        return None
    try:
        return PrivacyConfig.model_validate(build.curate.manifest.config["curate"]["privacy"])
    except (ValueError, KeyError, TypeError):
        return None


class Shown:
    """What may be shown of a document: texts after the finders of private data have replaced all that they find."""

    def __init__(self, build: Build) -> None:
        config = privacy_config(build) or PrivacyConfig()
        actions = dict.fromkeys(KINDS, "replace")
        self.finds_names = bool(config.name_model)
        if not self.finds_names:
            actions["name"] = "keep"  # nobody looks for names without a model
        self._scrubber = Scrubber(PrivacyConfig(**actions, name_model=config.name_model, regions=config.regions))
        self._plain = Scrubber(PrivacyConfig(**(actions | {"name": "keep"}), regions=config.regions))

    def text(self, text: str | None) -> str:
        """A short text: a name, a detail."""
        return self._scrub([text[:1000]])[0] if text else ""

    def place(self, source: str | None) -> str:
        """A path or URI: each of its names by itself too, and without its suffixes, which hide where an address ends.

        What follows a question mark in a URI may be a key, and is not shown.
        """
        shown, mark, _ = (source or "").partition("?") if "://" in (source or "") else (source or "", "", "")
        names = re.split(r"([/#])", self.text(shown))
        for suffixes in (r"", r"\.\w{1,8}", r"(?:\.\w{1,8}){2}"):
            found = [re.fullmatch(rf"(.+?)({suffixes})", name) for name in names]
            stems = self._scrub([match[1] if match else name for match, name in zip(found, names, strict=True)])
            names = [stem + (match[2] if match else "") for match, stem in zip(found, stems, strict=True)]
        return "".join(names) + ("?…" if mark else "")

    def example(self, row: Mapping[str, Any], excerpt: str | None) -> dict[str, Any]:
        """A document that was left out."""
        return {
            "id": row["id"],
            "source": self.place(row["source"]),
            "detail": self.text(row["detail"]),
            "duplicate_of": row["duplicate_of"],
            "excerpt": excerpt,
        }

    def excerpts(self, build: Build, chosen: Mapping[str, str]) -> dict[str, str]:
        """The beginnings of documents, by id.

        A whole document is scrubbed before it is cut, so that no cut hides half of a detail from the finders; of a
        very long one its first million characters, and what is near that end is not shown.
        """
        import pyarrow.dataset as ds

        by_part: dict[str, list[str]] = defaultdict(list)
        for doc_id, part in chosen.items():
            by_part[part].append(doc_id)
        found = {}
        for part, ids in sorted(by_part.items()):
            try:
                path = build.ingest.local_path(part)  # the dataset opens it late, by name
                dataset = ds.dataset(path, format="parquet")
            except ArtifactError as error:
                found |= dict.fromkeys(ids, f"({error.what})")
                continue
            scanner = dataset.scanner(
                columns=["id", "text"],
                filter=ds.field("id").isin(ids),
                batch_size=64,
                batch_readahead=1,
                fragment_readahead=1,
            )
            for batch in scanner.to_batches():
                found |= {row["id"]: self._excerpt(row["text"]) for row in batch.to_pylist()}
        return found

    def _excerpt(self, text: str) -> str:
        shown = self._scrub([text[:_SCRUBBED_CHARS]])[0]
        if len(text) > _SCRUBBED_CHARS:
            shown = shown[: -_SCRUBBED_CHARS // 16]
        return shown if len(shown) <= EXCERPT_CHARS else f"{shown[:EXCERPT_CHARS]}…"

    def _scrub(self, texts: list[str]) -> list[str]:
        try:
            scrubbed = self._scrubber.scrub(texts)
        except NotInstalledError:  # the model of names is on other machines
            self.finds_names, self._scrubber = False, self._plain
            scrubbed = self._plain.scrub(texts)
        return [one.text for one in scrubbed]
