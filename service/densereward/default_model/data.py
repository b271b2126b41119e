"""Sequence-level human labels: reading, cleaning and splitting the folders the embedded model is trained on.

Labels live on one scale: VADER's mean valence rating, -4 (most negative) to 4; Davidson's votes are mapped onto its
negative half so that a clean tweet is 0. Preference pairs carry no number, only an order.
"""

import csv
import gzip
import hashlib
import html
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

Message = dict[str, str]

VADER_FILES = {
    "movie": "movieReviewSnippets_GroundTruth.txt",
    "amazon": "amazonReviewSnippets_GroundTruth.txt",
    "nyt": "nytEditorialSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
}
REVIEWED = ("amazon", "nyt")  # ids are review_snippet: a review must not be on both sides of the split
HATE_LABEL, OFFENSIVE_LABEL = -4.0, -3.0
HELD_OUT_PERCENT = 10


@dataclass(frozen=True)
class Rated:
    """One text with its human label, about -4 (worst) to 4 (best); texts of one group share a side of the split."""

    source: str
    group: str
    text: str
    label: float


@dataclass(frozen=True)
class Preference:
    """Two dialogues of which people preferred the first; messages as a chat template takes them."""

    source: str
    group: str
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]


def clean(text: str) -> str:
    """Plain text of a tweet or review, spaces collapsed.

    Entities are decoded; handles, links, retweet marks, emoji and the marks a quote leaves at the start are removed.
    """
    text = html.unescape(html.unescape(text))
    text = re.sub(r"https?:\S*|\bRT\b|@\w+:?", " ", text)
    text = re.sub(r"[^\x20-\uFFFF]|[\u2600-\u27BF\uFE0F]", " ", text)
    text = " ".join(text.split())
    return re.sub(r'^[!":. ]+', "", text)


def read_vader(folder: Path) -> Iterator[Rated]:
    """Snippets of the four VADER files with their mean rating, empty ones left out."""
    for source, name in VADER_FILES.items():
        for line in (folder / name).read_text(encoding="utf-8").splitlines():
            identity, rating, text = line.split("\t", 2)
            text = clean(text)
            group = identity.split("_")[0] if source in REVIEWED else text.lower()
            if text:
                yield Rated(source, f"{source}/{group}", text, float(rating))


def read_davidson(folder: Path) -> Iterator[Rated]:
    """Tweets with the mean of their votes: hate -4, offensive -3, neither 0; repeated tweets are kept once."""
    seen: set[str] = set()
    with (folder / "labeled_data.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            text = clean(row["tweet"])
            if not text or text.lower() in seen:
                continue
            seen.add(text.lower())
            votes = HATE_LABEL * int(row["hate_speech"]) + OFFENSIVE_LABEL * int(row["offensive_language"])
            yield Rated("davidson", f"davidson/{text.lower()}", text, votes / int(row["count"]))


def parse_dialogue(text: str) -> tuple[Message, ...]:
    """Turn "Human: .. Assistant: .." text into messages; the assistant's turns keep their place."""
    roles = {"Human": "user", "Assistant": "assistant"}
    parts = re.split(r"(?:^|\n\n)(Human|Assistant):", text)[1:]
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return tuple({"role": roles[name], "content": content.strip()} for name, content in pairs)


def read_harmless(folder: Path) -> Iterator[Preference]:
    """Preference pairs whose two dialogues end in different, non-empty answers; grouped by their first turn."""
    with gzip.open(folder / "pairs.jsonl.gz", "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            chosen, rejected = parse_dialogue(row["chosen"]), parse_dialogue(row["rejected"])
            answers = chosen[-1], rejected[-1]
            if chosen != rejected and all(a["role"] == "assistant" and a["content"] for a in answers):
                yield Preference("hh_harmless", f"hh_harmless/{chosen[0]['content']}", chosen, rejected)


def read_rated(folder: Path) -> list[Rated]:
    """All rated texts below `folder` (VADER's four files, Davidson), in file order."""
    return [*read_vader(folder / "vader"), *read_davidson(folder / "davidson")]


def read_preferences(folder: Path) -> list[Preference]:
    """All preference pairs below `folder`, in file order."""
    return list(read_harmless(folder / "hh_harmless"))


def is_held_out(item: Rated | Preference) -> bool:
    """Whether an item's group belongs to the held-out tenth: a hash of the group decides, so no seed can move it."""
    digest = hashlib.sha256(item.group.encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT
