"""Reading, cleaning and splitting of the labelled folders, on small files made here."""

import gzip
import json
from pathlib import Path

import pytest

from densereward.default_model import data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data folder with a few mild lines of every source."""
    vader = tmp_path / "vader"
    vader.mkdir()
    for source, name in data.VADER_FILES.items():
        ids = ("7_1", "7_2", "8_1") if source in data.REVIEWED else ("1", "2", "3")
        texts = ("A fine day.", "&amp; a dull &amp;#38; day", "@someone http://x.y")
        lines = [f"{i}\t{rating}\t{text}" for i, rating, text in zip(ids, (2.5, -1.25, 0.0), texts, strict=True)]
        (vader / name).write_text("\r\n".join(lines) + "\r\n", encoding="utf-8")
    davidson = tmp_path / "davidson"
    davidson.mkdir()
    (davidson / "labeled_data.csv").write_text(
        ",count,hate_speech,offensive_language,neither,class,tweet\n"
        "0,3,0,0,3,2,!!! RT @a_b: good tea\n"
        '1,4,1,3,0,1,"no, ""bad"" tea"\n'
        "2,3,0,0,3,2,Good tea\n",
        encoding="utf-8",
    )
    harmless = tmp_path / "hh_harmless"
    harmless.mkdir()
    opening = "\n\nHuman: Hi\nthere\n\nAssistant: Hello.\n\nHuman: Tea?\n\nAssistant:"
    rows = [
        {"chosen": f"{opening} With pleasure.", "rejected": f"{opening} No."},
        {"chosen": f"{opening} Same.", "rejected": f"{opening} Same."},
        {"chosen": f"{opening} Yes.", "rejected": f"{opening}"},
    ]
    with gzip.open(harmless / "pairs.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return tmp_path


def test_vader_labels_texts_and_groups(folder: Path) -> None:
    amazon = [item for item in data.read_rated(folder) if item.source == "amazon"]
    assert [(item.text, item.label) for item in amazon] == [("A fine day.", 2.5), ("& a dull & day", -1.25)]
    assert {item.group for item in amazon} == {"amazon/7"}


def test_single_texts_are_grouped_by_their_text(folder: Path) -> None:
    movie = [item.group for item in data.read_rated(folder) if item.source == "movie"]
    assert movie == ["movie/a fine day.", "movie/& a dull & day"]


def test_davidson_votes_become_labels_and_repeats_are_dropped(folder: Path) -> None:
    tweets = [item for item in data.read_rated(folder) if item.source == "davidson"]
    assert [(item.text, item.label) for item in tweets] == [("good tea", 0.0), ('no, "bad" tea', -3.25)]


def test_preferences_keep_turns_and_drop_equal_or_empty_answers(folder: Path) -> None:
    (pair,) = data.read_preferences(folder)
    assert [message["role"] for message in pair.chosen] == ["user", "assistant", "user", "assistant"]
    assert pair.chosen[0]["content"] == "Hi\nthere"
    assert (pair.chosen[-1]["content"], pair.rejected[-1]["content"]) == ("With pleasure.", "No.")


@pytest.mark.parametrize(
    ("raw", "plain"),
    [
        ("RT @a: ok", "ok"),
        ("see https://t.co/abc now", "see now"),
        ("&amp;amp; so", "& so"),
        ("tea \U0001f600 time", "tea time"),
        ("", ""),
        ("PARTY", "PARTY"),
    ],
)
def test_clean(raw: str, plain: str) -> None:
    assert data.clean(raw) == plain


def test_the_split_follows_the_group_and_holds_out_about_a_tenth() -> None:
    items = [data.Rated("amazon", f"amazon/{i // 2}", str(i), 0.0) for i in range(8000)]
    sides = [data.is_held_out(item) for item in items]
    assert sides[::2] == sides[1::2]
    assert 0.08 < sum(sides) / len(sides) < 0.12
