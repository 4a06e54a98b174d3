"""Which vocabulary a sweep recommends, and why, in plain sentences.

The rule: fewest bits per byte of the small model; of those that are within the noise of it, the fewest tokens; of those
within `EQUAL_TOKENS_FRAC` of that, the smallest vocabulary, which has the smallest embeddings. Noise is the spread over
seeds, pooled over all vocabularies that were trained with more than one; two means differ when they are further apart
than `SIGMAS` standard errors of their difference.

A general tokenizer serves as well when it needs no more tokens and its larger embeddings make the job's model at most
`SERVES_PARAMETERS_FRAC` larger; a general vocabulary of the same size, when its bits per byte are within the noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

SIGMAS = 2.0
EQUAL_TOKENS_FRAC = 0.01
SERVES_PARAMETERS_FRAC = 0.1
LEAST_NOISE_FRAC = 0.002  # two or three seeds may agree by chance: smaller differences are never taken for real

Row = dict[str, Any]


def mean_bits(row: Row) -> float:
    """Mean bits per byte of a row's trials."""
    return sum(trial["bits_per_byte"] for trial in row["trials"]) / len(row["trials"])


def noise(rows: Sequence[Row]) -> dict[str, float]:
    """The pooled standard deviation over seeds, in bits per byte, and its degrees of freedom."""
    squares, freedom = 0.0, 0
    for row in (row for row in rows if len(row.get("trials", ())) > 1):
        squares += sum((trial["bits_per_byte"] - mean_bits(row)) ** 2 for trial in row["trials"])
        freedom += len(row["trials"]) - 1
    return {"bits_per_byte": math.sqrt(squares / freedom) if freedom else 0.0, "degrees_of_freedom": freedom}


def margin(rows: Sequence[Row], one: Row, other: Row) -> float:
    """The difference of two means below which they count as equal."""
    error = noise(rows)["bits_per_byte"] * math.sqrt(1 / len(one["trials"]) + 1 / len(other["trials"]))
    return max(SIGMAS * error, LEAST_NOISE_FRAC * mean_bits(one))


def recommend(rows: Sequence[Row]) -> tuple[Row, list[str]]:
    """The chosen row and the reasons.

    Args:
        rows: `name whose vocab_size pattern tokens bytes_per_token parameters embedding_frac`, and `trials` for those
            that were trained here; at least one is `own`.
    """
    own = sorted((row for row in rows if row["whose"] == "own"), key=mean_bits)
    best = own[0]
    tied = [row for row in own if mean_bits(row) - mean_bits(best) <= margin(rows, best, row)]
    fewest = min(row["tokens"] for row in tied)
    short = [row for row in tied if row["tokens"] <= fewest * (1 + EQUAL_TOKENS_FRAC)]
    chosen = min(short, key=lambda row: (row["vocab_size"], mean_bits(row)))
    why = [_first(chosen, best, own, tied, short), _embeddings(chosen, rows)]
    why += [sentence for sentence in (_same_size(rows, chosen), _elsewhere(rows, chosen)) if sentence]
    return chosen, why


def _first(chosen: Row, best: Row, own: Sequence[Row], tied: Sequence[Row], short: Sequence[Row]) -> str:
    bits = f"{mean_bits(chosen):.4f} bits per byte of held-out text at equal compute"
    if len(own) == 1:
        return f"{_title(chosen)} is the only one that was tried: {bits}."
    if len(tied) == 1:
        gain = mean_bits(own[1]) / mean_bits(chosen) - 1
        return (
            f"{_title(chosen)} gives the small model the fewest: {bits}, {gain:.1%} below the next, {own[1]['name']}."
        )
    others = ", ".join(row["name"] for row in tied if row is not chosen)
    reason = "is the smallest of those with the fewest tokens" if len(short) > 1 else "needs the fewest tokens of them"
    return f"{_title(chosen)} gives {bits}, which is within the noise of {others}, and {reason}."


def _title(row: Row) -> str:
    return f"The vocabulary of {row['vocab_size']:,} entries with pattern {row['pattern']}"


def _embeddings(chosen: Row, rows: Sequence[Row]) -> str:
    text = (
        f"Its embeddings are {chosen['embedding_frac']:.0%} of the job's model of {chosen['parameters']:,} parameters"
    )
    elsewhere = [row for row in rows if row["whose"] == "general tokenizer"]
    if not elsewhere:
        return f"{text}."
    most = max(elsewhere, key=lambda row: row["vocab_size"])
    return f"{text}; those of {most['name']} would be {most['embedding_frac']:.0%} of {most['parameters']:,}."


def _same_size(rows: Sequence[Row], chosen: Row) -> str:
    same = [row for row in rows if row["whose"] == "general" and row["vocab_size"] == chosen["vocab_size"]]
    if not same:
        return ""
    general = min(same, key=mean_bits)
    text = f"Of the same size, {general['name']} is the best general one that was tried"
    costs = f"it needs {_against(general['tokens'], chosen['tokens'])} tokens and "
    costs += f"{_against(mean_bits(general), mean_bits(chosen))} bits per byte, at equal compute and equal parameters"
    if mean_bits(general) - mean_bits(chosen) <= margin(rows, chosen, general):
        return f"{text}, and serves as well: {costs}, which is no more than noise."
    return f"{text}: {costs}. A vocabulary of your own is worth it."


def _elsewhere(rows: Sequence[Row], chosen: Row) -> str:
    elsewhere = sorted((row for row in rows if row["whose"] == "general tokenizer"), key=lambda row: row["tokens"])
    most = chosen["parameters"] * (1 + SERVES_PARAMETERS_FRAC)
    for row in elsewhere:
        if row["tokens"] <= chosen["tokens"] and row["parameters"] <= most:
            return (
                f"{row['name']} serves as well: {_against(row['tokens'], chosen['tokens'])} tokens, and the job's "
                f"model would be {row['parameters'] / chosen['parameters'] - 1:.1%} larger with it."
            )
    if not elsewhere:
        return ""
    best = elsewhere[0]
    entries, size = best["vocab_size"] / chosen["vocab_size"], best["parameters"] / chosen["parameters"]
    return (
        f"No general tokenizer here serves as well: the best, {best['name']}, needs "
        f"{_against(best['tokens'], chosen['tokens'])} tokens with {entries:.1f} times the entries, and the "
        f"job's model would be {size:.1f} times as large."
    )


def _against(value: float, reference: float) -> str:
    frac = value / reference - 1
    return f"{abs(frac):.1%} {'more' if frac >= 0 else 'fewer'}"
