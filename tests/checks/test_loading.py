"""How a model is loaded: by the engine that the settings name, with the options that this engine takes."""

from __future__ import annotations

from typing import Any

import pytest

from densereward.checks import loading
from densereward.settings import ModelSettings
from fakes import FakeEngine


class Recording(FakeEngine):
    """An engine that keeps what it was loaded with."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    @classmethod
    def load(cls, source: str, *, device: str = "auto", longest: int | None = None) -> Recording:
        return cls(source=source, device=device, longest=longest)


class Misspelt(Recording):
    @classmethod
    def load(cls, source: str, *, max_lenght: int | None = None) -> Misspelt:  # type: ignore[override]
        return cls(source=source, max_lenght=max_lenght)


def test_an_engine_gets_the_options_that_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "ENGINES", {"torch": Recording})
    engine: Any = loading._engine(ModelSettings(model=["x"], device="cpu", max_length=77), "x")
    assert engine.options == {"source": "x", "device": "cpu", "longest": 77}


def test_an_engine_that_takes_what_is_no_option_is_not_loaded_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "ENGINES", {"torch": Misspelt})
    with pytest.raises(TypeError, match=r"Misspelt\.load takes max_lenght; the options are revision, device"):
        loading._engine(ModelSettings(model=["x"]), "x")
