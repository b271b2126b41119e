"""The picture at the top of the README: what it holds, and that it is what the embedded model says."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from densereward.evaluation.picture import METHODS, RESPONSE, draw, score

PICTURE = Path(__file__).parents[2] / "service" / "docs" / "token-rewards.svg"
ROOT = ElementTree.fromstring(PICTURE.read_text(encoding="utf-8"))
Drawn = tuple[float, list[str], dict[str, list[float]]]


def words(kind: str, element: str = "text") -> list[str]:
    """All texts of a class, in order."""
    found = ROOT.iter(f"{{http://www.w3.org/2000/svg}}{element}")
    return [each.text or "" for each in found if each.get("class") == kind]


@pytest.fixture(scope="module")
def drawn() -> Drawn:
    """What the picture shows, read from it: reward, tokens and their rewards by method."""
    (title,) = words("title")
    reward = re.search(r"[+-]\d+\.\d\d", title)
    assert reward is not None
    names, numbers = words("method", "tspan"), [float(each) for each in words("number")]
    length = len(numbers) // len(names)
    rewards = {name: numbers[row * length : (row + 1) * length] for row, name in enumerate(names)}
    return float(reward[0]), words("token")[:length], rewards


def test_it_holds_the_texts_tokens_once_for_each_method(drawn: Drawn) -> None:
    _, tokens, rewards = drawn
    assert "".join(tokens) == RESPONSE.replace(" ", "")
    assert words("token") == tokens * len(METHODS)
    assert list(rewards) == list(METHODS)


def test_the_same_rewards_are_drawn_as_the_same_bytes(drawn: Drawn) -> None:
    assert draw(*drawn) == PICTURE.read_text(encoding="utf-8")


def test_its_numbers_are_the_embedded_models(drawn: Drawn) -> None:
    reward, tokens, rewards = score()
    shown_reward, shown_tokens, shown = drawn
    assert shown_reward == pytest.approx(reward, abs=0.006)
    assert shown_tokens == [token.strip() for token in tokens]
    assert shown.keys() == rewards.keys()
    for name, values in rewards.items():
        assert shown[name] == pytest.approx(values, abs=0.006)


def test_colours_follow_sign_and_size() -> None:
    document = draw(1.0, ["a", " b", " <c>"], {"red": [0.5, -1.0, 0.0]})
    root = ElementTree.fromstring(document)
    grounds = [each for each in root.iter("{http://www.w3.org/2000/svg}rect") if each.get("class") == "ground"]
    assert [each.get("fill-opacity") for each in grounds] == ["0.300", "0.600", "0.000"]
    assert grounds[0].get("fill") == grounds[2].get("fill") != grounds[1].get("fill")


def test_a_response_that_earned_nothing_can_be_drawn() -> None:
    assert "+0.00" in draw(0.0, ["a"], {"red": [-0.001]})
