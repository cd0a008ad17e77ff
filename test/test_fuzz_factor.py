"""How many cases the fuzzers of this suite try."""

from __future__ import annotations

import fuzz
import pytest


@pytest.mark.parametrize(("factor", "count"), [(None, 20), ("", 20), ("1", 20), ("50", 1000)])
def test_the_factor(monkeypatch: pytest.MonkeyPatch, factor: str | None, count: int) -> None:
    monkeypatch.delenv("JITK_FUZZ", raising=False)
    if factor is not None:
        monkeypatch.setenv("JITK_FUZZ", factor)
    assert fuzz.seeds(20) == range(count)


@pytest.mark.parametrize("factor", ["0", "-1", "1.5", "many"])
def test_what_is_no_factor(monkeypatch: pytest.MonkeyPatch, factor: str) -> None:
    monkeypatch.setenv("JITK_FUZZ", factor)
    with pytest.raises(ValueError) as caught:
        fuzz.seeds(20)
    assert str(caught.value) == f"JITK_FUZZ is {factor!r}; it must be a whole number above 0"
