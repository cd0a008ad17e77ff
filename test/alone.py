"""Tests marked ``serial`` run while no other test does, in whatever processes of pytest-xdist the others are.

For what measures time or needs most of the memory of a GPU. Every such test makes all processes wait: make a test
independent of the others' load rather than mark it. They come last, when some processes have nothing to do anyway.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator

import pytest

# Below the folder that the processes share. Who holds `door` keeps others from coming into the `room`.
_DOOR, _ROOM = "door.lock", "room.lock"
_files: list[int] = []


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "serial: runs while no other test does, also under pytest-xdist")
    folder = os.environ.get("JITK_TEST_FOLDER")
    if folder and "PYTEST_XDIST_WORKER" in os.environ:
        _files[:] = [os.open(os.path.join(folder, name), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC) for name in (_DOOR, _ROOM)]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("serial") is not None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    if not _files:
        return (yield)
    door, room = _files
    alone = item.get_closest_marker("serial") is not None
    fcntl.flock(door, fcntl.LOCK_EX)  # behind a test that waits to be alone
    fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
    fcntl.flock(door, fcntl.LOCK_UN)
    try:
        return (yield)
    finally:
        fcntl.flock(room, fcntl.LOCK_UN)
