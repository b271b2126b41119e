"""The noise of half precision is what it is said to be: measured, told, and warned of beyond its bound."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tiny
from densereward.capture import Captured, Prefixes
from densereward.checks.loading import load_unchecked
from densereward.checks.precision import NOISE_BOUND, finding_of, measure_precision
from densereward.engines.base import Engine
from densereward.settings import ModelSettings
from densereward.tokenization.align import Aligner
from densereward_client.wire import Precision


def loaded(folder: Path, **settings: Any) -> tuple[Engine, Aligner]:
    return load_unchecked(ModelSettings(model=[str(tiny.save(folder))], device="cpu", **settings))


def test_half_precision_has_noise_and_a_float32_stream_has_less(tmp_path: Path) -> None:
    wide = measure_precision(*loaded(tmp_path, dtype="bfloat16"))
    narrow = measure_precision(*loaded(tmp_path, dtype="bfloat16", residual_dtype="weights"))
    assert wide is not None
    assert narrow is not None
    assert wide.red is not None
    assert narrow.red is not None
    assert wide.contribution is not None
    assert 0 < wide.red < narrow.red < 1
    assert 0 < wide.score < 0.1 * wide.score_deviation + 0.1
    assert wide.contribution < NOISE_BOUND


def test_what_is_told_depends_on_the_bound() -> None:
    one = Precision(dtype="bfloat16", score=0.01, score_deviation=1.0, red=0.09, contribution=0.01, flipped_signs=0.02)
    assert finding_of(one).status == "ok"
    assert "9.0% of red, 1.0% of contribution; 2.0% of token rewards change their sign" in finding_of(one).text
    assert finding_of(one.model_copy(update={"contribution": 0.11})).status == "warning"


def test_float32_has_none_to_tell(tmp_path: Path) -> None:
    assert measure_precision(*loaded(tmp_path)) is None
    assert finding_of(None).status == "ok"


def test_planted_noise_is_measured_and_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, aligner = loaded(tmp_path, dtype="bfloat16")
    before = measure_precision(engine, aligner)
    forward, exactly = engine.forward, engine.exactly

    def doubled(captured: Captured) -> Captured:
        prefixes = {
            mode: Prefixes(None if each.before is None else 2 * each.before, 2 * each.after)
            for mode, each in captured.prefixes.items()
        }
        return replace(captured, prefixes=prefixes, reward=captured.reward + 1)

    def exact(batch: Any) -> list[Captured]:
        monkeypatch.setattr(engine, "forward", forward)
        results = exactly(batch)
        monkeypatch.setattr(engine, "forward", lambda batch: [doubled(each) for each in forward(batch)])
        return results

    monkeypatch.setattr(engine, "exactly", exact)
    after = measure_precision(engine, aligner)
    assert before is not None
    assert after is not None
    assert after.red is not None
    assert after.red == pytest.approx(1.0, abs=0.2)  # twice the rewards are off by once their size
    assert after.score == pytest.approx(1.0, abs=0.1)
    assert after.contribution == before.contribution
    finding = finding_of(after)
    assert finding.status == "warning"
    assert "--dtype float32 has none" in finding.text
