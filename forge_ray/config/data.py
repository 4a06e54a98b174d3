"""The fields from documents to token shards: sources, curation, vocabulary, shards."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from forge_ray.config.base import OPERATIONAL, Fraction, Positive, Section
from forge_ray.config.train import ModelConfig

Action = Literal["keep", "mask", "replace", "drop"]
ByNgram = dict[Annotated[int, Field(ge=2, le=32)], Fraction]
Pattern = Literal["gpt4", "gpt2", "digits1", "code"]


class _Records(Section):
    """What a source says of its documents, and which fields of its records do."""

    name: str = ""
    """What mixtures and reports call this source's documents; empty for the last part of the URI."""
    text_field: str = "text"
    """The field of `.jsonl` and the column of `.parquet` and `.csv` records that holds the document's text."""
    licence: str = "unknown"
    """SPDX identifier recorded with every document of this source that does not state its own."""
    licence_field: str = "licence"
    """The field of a record that states its own licence."""
    language_field: str = "language"
    """The field of a record that states its language, as an ISO 639 code."""
    created_field: str = "created"
    """The field of a record that states when it was written, as an ISO 8601 date or time."""
    group_field: str = ""
    """The field of a record that names what is held out as a whole (a customer, a case); empty: each by itself."""
    metadata_fields: tuple[str, ...] = ()
    """Further fields of a record that are kept beside the text, as JSON; a value of more than 1 MiB is not."""


class FilesSource(_Records):
    """A folder, one file, or a URI of documents: txt md html jsonl csv parquet pdf docx, compressed or in archives."""

    kind: Literal["files"]
    """Selects this kind of source."""
    uri: str
    """A local path or a URI that fsspec knows (`s3:// gs:// abfs://`); a folder is read recursively, but for symbolic
    links in it."""


class HttpSource(_Records):
    """A list of HTTP(S) addresses, one document, archive or file of records each."""

    kind: Literal["http"]
    """Selects this kind of source."""
    uri: str
    """A text file with one address per line (a path, or a URI that fsspec knows); a line that begins with `#` is a
    comment."""
    max_file_bytes: Positive = 1 << 30
    """A larger answer is skipped and counted."""


class BotocoreSource(Section):
    """The AWS service descriptions inside the installed `botocore` package (Apache-2.0), one document per operation."""

    kind: Literal["botocore"]
    """Selects this kind of source."""
    name: str = "botocore"
    """What mixtures and reports call this source's documents."""
    services: tuple[str, ...] = ()
    """Names of the services to read; empty for all of them."""


Source = Annotated[FilesSource | HttpSource | BotocoreSource, Field(discriminator="kind")]


class IngestConfig(Section):
    """Documents in: what is read, and what is kept back for evaluation."""

    sources: tuple[Source, ...] = ()
    """What to read, in this order. A document's group decides whether it is held out: the service, or the file's path
    below its source (with `#` and the number of a record of `.jsonl`, `.csv` or `.parquet`)."""
    held_out_frac: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.05
    """Share of groups held out for evaluation, chosen by a hash of the group's name; a source that moves keeps them."""
    held_out_groups: tuple[str, ...] = ()
    """Groups held out by name, in addition to `held_out_frac`: `sqs`, `guide/setup.md`, `posts.jsonl#7`."""
    min_document_chars: Positive = 64
    """Shorter documents are skipped and counted."""
    max_document_bytes: Positive = 16 << 20
    """Larger documents (and larger whole files of one document) are skipped and counted."""
    max_unreadable_frac: Fraction = 0.1
    """Share of the documents that may be unreadable (not UTF-8, torn, without text) before it is an error."""
    part_bytes: Positive = 32 << 20
    """Size of text after which a part of the output is closed."""
    retry_s: Annotated[float, Field(ge=0.0), OPERATIONAL] = 60.0
    """How long a file is tried again, with growing pauses, when its server does not answer. A request to an object
    store is tried for a minute at least."""


class NormalizeConfig(Section):
    """Unicode repair and normalisation, before everything else."""

    enabled: bool = False
    """Whether the step runs."""
    form: Literal["NFC", "NFKC"] = "NFC"
    """Unicode normalisation form."""
    repair: bool = True
    """Whether mojibake (UTF-8 read as another encoding) is turned back, with ftfy."""
    drop_controls: bool = True
    """Whether control characters other than tab and line end, and zero-width ones, are removed."""


class LanguageConfig(Section):
    """Language identification (fastText lid.176)."""

    enabled: bool = False
    """Whether the step runs; it also fills in the language of documents that do not state theirs."""
    keep: tuple[str, ...] = ()
    """ISO 639-1 codes to keep, of what was found whatever a document states; empty keeps all and only records."""
    min_score: Fraction = 0.5
    """Documents whose likeliest language has a lower probability are dropped, if `keep` names any."""


class QualityConfig(Section):
    """Quality heuristics. Defaults are those of the Gopher, C4 and FineWeb papers, which were tuned on English web
    pages: look at the report of a domain before using them on it."""

    enabled: bool = False
    """Whether the step runs."""
    min_words: int = 50
    """Gopher: fewest words of a document."""
    max_words: int = 100_000
    """Gopher: most words of a document."""
    min_mean_word_chars: float = 3.0
    """Gopher: shortest mean word length."""
    max_mean_word_chars: float = 10.0
    """Gopher: longest mean word length."""
    max_symbol_word_ratio: float = 0.1
    """Gopher: most `#` or ellipses per word."""
    max_bullet_line_frac: Fraction = 0.9
    """Gopher: largest share of lines that begin with a bullet."""
    max_ellipsis_line_frac: Fraction = 0.3
    """Gopher: largest share of lines that end with an ellipsis."""
    min_alpha_word_frac: Fraction = 0.8
    """Gopher: smallest share of the pieces between blanks with a letter."""
    min_stop_words: int = 2
    """Gopher: fewest different words of `stop_words`."""
    stop_words: tuple[str, ...] = ("the", "be", "to", "of", "and", "that", "have", "with")
    """Gopher: words that prose in the wanted language cannot do without; without regard to case."""
    max_duplicate_line_frac: Fraction = 0.3
    """Gopher: largest share of lines that repeat an earlier one."""
    max_duplicate_line_char_frac: Fraction = 0.1
    """FineWeb: largest share of characters in such lines (Gopher: 0.2)."""
    max_duplicate_paragraph_frac: Fraction = 0.3
    """Gopher: largest share of paragraphs that repeat an earlier one."""
    max_duplicate_paragraph_char_frac: Fraction = 0.2
    """Gopher: largest share of characters in such paragraphs."""
    max_top_ngram_char_frac: ByNgram = {2: 0.20, 3: 0.18, 4: 0.16}
    """Gopher: largest share of characters in the most frequent n-gram of words, by n; `{}` counts none."""
    max_duplicate_ngram_char_frac: ByNgram = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
    """Gopher: largest share of characters in n-grams of words that occurred before, by n; `{}` counts none."""
    min_terminal_punctuation_line_frac: Fraction = 0.12
    """FineWeb: smallest share of lines that end in `.`, `!`, `?` or a quotation mark."""
    max_short_line_frac: Fraction = 0.67
    """FineWeb: largest share of lines of at most 30 characters."""
    max_newline_word_ratio: float = 0.3
    """FineWeb: most line ends per word."""
    drop_placeholder: bool = True
    """C4: drop documents with "lorem ipsum"."""
    drop_braces: bool = False
    """C4: drop documents with a curly bracket (code); off, because technical documents have them."""


class LinesConfig(Section):
    """Line and boilerplate deduplication: of equal lines, the first copies stay and later ones are removed. Lines are
    equal if they are but for the case of ASCII letters and blanks at their ends; held-out documents are compared with
    each other, and training documents."""

    enabled: bool = False
    """Whether the step runs."""
    max_copies: Positive = 1
    """How many documents may hold the same line; in order of the corpus, later ones lose it."""
    min_chars: Positive = 20
    """Shorter lines are never removed."""
    min_document_chars: Positive = 64
    """A document that has fewer characters left is dropped."""


class ExactConfig(Section):
    """Documents equal but for case and blanks: the first stays."""

    enabled: bool = False
    """Whether the step runs."""


class NearConfig(Section):
    """Near-duplicates by MinHash and locality-sensitive hashing; of each connected component the first stays."""

    enabled: bool = False
    """Whether the step runs."""
    ngram_words: Positive = 5
    """Words in a shingle."""
    bands: Positive = 14
    """Bands of the signature; two documents with one equal band are duplicates."""
    rows: Positive = 8
    """Hashes in a band. The threshold is about (1 / bands) ** (1 / rows) of Jaccard similarity: 0.72."""
    seed: Annotated[int, Field(ge=0)] = 1
    """Key of the hashes."""


class DecontaminateConfig(Section):
    """Training documents that overlap evaluation texts (held-out documents, and files named here) are dropped. A
    held-out document that comes later and overlaps a training document of an earlier build is dropped itself."""

    enabled: bool = False
    """Whether the step runs."""
    ngram_words: Positive = 13
    """Words in an n-gram."""
    max_overlap_frac: Fraction = 0.2
    """Largest share of a training document's n-grams that may stand in evaluation texts too. Documents and evaluation
    texts of fewer words than an n-gram have none."""
    uris: tuple[str, ...] = ()
    """Further evaluation sets: files or folders of documents in any format that ingest reads."""


class PrivacyConfig(Section):
    """Personal data and secrets: what is found, and what is done about it. `keep` counts only, `mask` puts `*` over
    each letter and digit, `replace` puts a typed placeholder such as `<EMAIL>`, `drop` drops the document. Only texts
    are looked at: a document's key, group, source and `metadata_fields` stay as they are, beside it."""

    enabled: bool = False
    """Whether the step runs."""
    email: Action = "replace"
    """E-mail addresses."""
    phone: Action = "replace"
    """Telephone numbers."""
    iban: Action = "replace"
    """Bank account numbers (IBAN, check digits verified)."""
    card: Action = "replace"
    """Payment card numbers (Luhn verified)."""
    national_id: Action = "replace"
    """National identity, social security and tax numbers (check digits verified where they have them)."""
    ip: Action = "replace"
    """Public IP addresses; private, loopback and documentation ranges are no personal data."""
    name: Action = "keep"
    """Names of persons; needs `name_model`."""
    name_model: str = ""
    """Folder or installed package of a local spaCy model that finds names; empty looks for none."""
    secret: Action = "replace"
    """Keys, tokens, passwords in configuration, private keys."""
    regions: tuple[str, ...] = ("US", "GB", "DE", "FR", "ES", "IT")
    """ISO 3166 codes of the countries whose national telephone and identity numbers are looked for; the latter are
    known of US GB DE FR ES IT NL BE PL PT SE DK FI NO CH AT IE BR IN CA AU ZA MX CN KR. Numbers with `+` are found of
    every country."""


class LicenceConfig(Section):
    """Documents of other licences are dropped."""

    allow: tuple[str, ...] = ()
    """SPDX identifiers to keep, compared without case; empty keeps all."""


class CurateConfig(Section):
    """Cleaning between ingest and vocabulary: each step is off until it is switched on, and reports what it did.

    Order: licences, normalize, language, quality, privacy, then across documents exact, near, decontaminate, lines.
    """

    licences: LicenceConfig = LicenceConfig()
    """Licence allow-list."""
    normalize: NormalizeConfig = NormalizeConfig()
    """Unicode repair and normalisation."""
    language: LanguageConfig = LanguageConfig()
    """Language identification."""
    quality: QualityConfig = QualityConfig()
    """Quality heuristics."""
    privacy: PrivacyConfig = PrivacyConfig()
    """Personal data and secrets."""
    exact: ExactConfig = ExactConfig()
    """Exact deduplication."""
    near: NearConfig = NearConfig()
    """Near-deduplication."""
    lines: LinesConfig = LinesConfig()
    """Line deduplication."""
    decontaminate: DecontaminateConfig = DecontaminateConfig()
    """Keeping evaluation texts out of training."""
    spill_bytes: Annotated[Positive, OPERATIONAL] = 64 << 20
    """Memory of one task of a step across documents; what is larger is cut into more pieces, through the workspace."""


class TokenizerConfig(Section):
    """The vocabulary, trained on the training documents."""

    vocab_size: Annotated[int, Field(ge=300, le=1 << 20)] = 8192
    """Entries of the vocabulary, special tokens and the 256 bytes included."""
    sample_bytes: Positive = 64 << 20
    """Text to learn merges from; documents are taken in the order of their id's hash until this is reached."""
    pattern: Pattern = "gpt4"
    """How text is cut before merging; `forge tokenizer sweep` compares them."""
    special_tokens: tuple[str, ...] = (
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<tool_call>",
        "</tool_call>",
        "<tool_response>",
        "</tool_response>",
        "<think>",
        "</think>",
    )
    """Reserved tokens; the first ends a document and starts the next, the others are for chat and tools later."""
    keep: Annotated[bool, OPERATIONAL] = True
    """When documents come or go in the same sources, keep the vocabulary trained before, so that old shards stay as
    they are; false trains a new one."""

    @model_validator(mode="after")
    def _check(self) -> TokenizerConfig:
        if not self.special_tokens or len(set(self.special_tokens)) != len(self.special_tokens):
            raise ValueError("special_tokens wants at least one token, each once; the first is the end of a document")
        return self


class SweepConfig(Section):
    """What `forge tokenizer sweep` compares; it publishes a report and changes nothing else."""

    vocab_sizes: Annotated[tuple[Annotated[int, Field(ge=300, le=1 << 20)], ...], Field(min_length=1)] = (
        4096,
        8192,
        16384,
    )
    """Sizes of own vocabularies to train."""
    patterns: Annotated[tuple[Pattern, ...], Field(min_length=1)] = ("gpt4",)
    """Pre-tokenizers to try each size with."""
    tokenizers: tuple[Literal["o200k", "llama3", "tekken", "smollm2"], ...] = ("o200k", "llama3", "tekken", "smollm2")
    """General tokenizers to compare with; one that is not installed is named with the command that adds it."""
    general: tuple[FilesSource, ...] = ()
    """General text. Vocabularies of the same sizes are trained on it, beside the beginnings of Llama 3.1's, to see what
    one of the domain is worth."""
    heldout_bytes: Positive = 4 << 20
    """Held-out text on which tokens are counted; documents in the order of their id's hash until this is reached."""
    model: ModelConfig = ModelConfig()
    """The small model that is trained with each vocabulary."""
    seq_len: Annotated[int, Field(ge=16)] = 256
    """Tokens of its context."""
    micro_batch: Positive = 8
    """Sequences in one of its steps."""
    train_flops: Annotated[float, Field(gt=0.0)] = 1e13
    """Floating-point operations of each training, equal for all vocabularies; 1e13 take about 2 minutes of a core."""
    scored_bytes: Positive = 200_000
    """Held-out text that each small model scores."""
    seeds: Annotated[int, Field(ge=2)] = 2
    """Trainings of each vocabulary that could win, and of the general one of its size; their spread is the noise."""


class TokenizeConfig(Section):
    """Token shards out of documents and vocabulary."""

    shard_tokens: Positive = 4 << 20
    """Tokens after which a shard is closed. A shard is what the loader fetches, verifies and shuffles as one piece."""
