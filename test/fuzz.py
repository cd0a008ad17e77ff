"""How many cases a fuzzer tries: one number for all of them.

    @pytest.mark.parametrize("seed", fuzz.seeds(20))       or, of cheap cases, `for seed in fuzz.seeds(1000):` in one test
    def test_random_programs(seed: int) -> None:
        random = Random(seed)

``JITK_FUZZ``    tries so many times the cases (default: 1; ``make nightly``: 50)

The seeds begin at 0, so that a long run tries all that a short one does, and a failure names the seed that repeats it.
"""

from __future__ import annotations

import os


def seeds(count: int) -> range:
    """The seeds of a fuzzer that tries ``count`` cases in a usual run of the suite.

    Raises:
        ValueError: ``JITK_FUZZ`` is no whole number above 0.
    """
    factor = os.environ.get("JITK_FUZZ") or "1"
    if not factor.isdecimal() or int(factor) == 0:
        raise ValueError(f"JITK_FUZZ is {factor!r}; it must be a whole number above 0")
    return range(count * int(factor))
