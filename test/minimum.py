"""Fail a run of the whole suite in which fewer tests passed than ``JITK_TEST_MINIMUM``.

A broken collection, a fixture that skips everything, a parametrisation that became empty: all of them are green otherwise. A
run of chosen tests (paths, ``-k``, ``-m``, ``--last-failed`` and the like) is not counted.
"""

from __future__ import annotations

import os

import pytest
from _pytest.terminal import TerminalReporter

_shortfall = pytest.StashKey[str]()


def _of_everything(config: pytest.Config) -> bool:
    chosen = ("keyword", "markexpr", "deselect", "ignore", "ignore_glob", "lf", "stepwise", "collectonly")
    return config.args_source != pytest.Config.ArgsSource.ARGS and not any(config.getoption(name, None) for name in chosen)


def pytest_configure() -> None:
    minimum = os.environ.get("JITK_TEST_MINIMUM") or "0"
    if not minimum.isdigit():
        raise pytest.UsageError(f"JITK_TEST_MINIMUM is {minimum!r}; it must be a number of tests")


def pytest_sessionfinish(session: pytest.Session) -> None:
    minimum = os.environ.get("JITK_TEST_MINIMUM")
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if not minimum or not isinstance(reporter, TerminalReporter) or not _of_everything(session.config):
        return
    passed = len(reporter.stats.get("passed", ()))
    if passed < int(minimum):
        session.config.stash[_shortfall] = (
            f"{passed} tests passed, expected at least {minimum} (JITK_TEST_MINIMUM): where are the others?"
        )
        session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: TerminalReporter, config: pytest.Config) -> None:
    shortfall = config.stash.get(_shortfall, None)
    if shortfall is not None:
        terminalreporter.section("too few tests", red=True)
        terminalreporter.line(shortfall)
