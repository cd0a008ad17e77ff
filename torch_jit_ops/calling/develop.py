"""Develop mode: an edited source is built again at the next call, and an op that is declared again replaces the first.

    JITK_DEVELOP=1 python train.py       for every op of the process
    library.develop()                    for the ops of one library, such as in a notebook

In this mode the dispatcher asks for the kernel of every call, and ``load`` answers with what the sources hold now: it compares
the files that the compiler read, the kernel's own and all headers, with what they held then: by their states, or by content
where those are so young that an edit could have left them as they are (``store/digests.py``). A kernel that did not compile is
built again once any file in its folders has changed.

Outside of this mode nothing here is called.
"""

from __future__ import annotations

import ast
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from torch_jit_ops import environment, forks, process
from torch_jit_ops.builder import on_demand as builder
from torch_jit_ops.builder.unit import Unit
from torch_jit_ops.calling import dispatcher
from torch_jit_ops.store.digests import digest_of_file

if TYPE_CHECKING:
    from torch_jit_ops.builder.shared_object import Loaded

_namespaces: set[str] = set()


def start(namespace: str) -> None:
    """Switch the mode on for the ops of a namespace, for as long as the process runs."""
    if namespace not in _namespaces:
        _namespaces.add(namespace)
        dispatcher.forget_all(namespace)  # what was loaded before may be older than its sources


def is_on(namespace: str) -> bool:
    """Whether ops of the namespace are being developed."""
    return namespace in _namespaces or environment.developing()


# --- files ----------------------------------------------------------------------------------------


class Watched:
    """Files, and what they held.

    Args:
        digests: of their contents; None of a file that was not there.
        folders: no file may be added below them.
    """

    def __init__(self, digests: Mapping[str, str | None], folders: Iterable[Path] = ()) -> None:
        self._digests = dict(digests)
        self._folders = tuple(folders)

    @classmethod
    def below(cls, folders: Iterable[Path]) -> Watched:
        """All files below the folders, as they are."""
        folders = tuple(folders)
        return cls({path: digest_of_file(path) for path in _files_below(folders)}, folders)

    @classmethod
    def read_for(cls, loaded: Loaded, unit: Unit) -> Watched | None:
        """The files that a compiler read for a library; None if nobody recorded them."""
        from torch_jit_ops.store import forms, record

        try:
            found = record.parse_record(forms.read(loaded.path.parent / record.RECORD, record.LARGEST_RECORD))
        except (OSError, forms.Malformed):
            return None
        roots = unit.roots()
        if found is None or any(item["root"] not in roots for item in found["dependencies"]):
            return None
        return cls({f"{roots[item['root']]}/{item['path']}": item["digest"] for item in found["dependencies"]})

    def changed(self) -> bool:
        """Whether one of them holds something else now."""
        if any(digest_of_file(path) != digest for path, digest in self._digests.items()):
            return True
        return bool(self._folders) and set(_files_below(self._folders)) != self._digests.keys()


def _files_below(folders: Iterable[Path]) -> list[str]:
    return [os.path.join(top, name) for folder in folders for top, _, names in os.walk(folder) for name in names]


_Key = tuple[Unit, tuple[Path, ...]]
_watched: dict[_Key, Watched] = process.keep({})
_under_way: set[_Key] = process.keep(set())
_lock = forks.Lock()


def _forget_in_child() -> None:
    """A build of the parent's threads does not end here."""
    _watched.clear()
    _under_way.clear()


forks.in_child(_forget_in_child)


def load(unit: Unit) -> Loaded:
    """``builder.load.load`` of what the files hold now.

    Raises:
        BuildError: they do not compile. The same error is raised again until one of them changes.
    """
    from torch_jit_ops.store.search_path import search_path

    key = (unit, tuple(store.root for store in search_path()))
    with _lock:
        watched = _watched.get(key)
        again = key not in _under_way and (watched is None or watched.changed())
        if again:
            # Before the build: what is edited while it runs counts as a change. Other threads wait for this build.
            _watched[key] = Watched.below(unit.folders())
            _under_way.add(key)
            builder.forget(unit)
    if not again:
        return builder.load(unit)
    try:
        loaded = builder.load(unit)
        _watched[key] = Watched.read_for(loaded, unit) or _watched[key]
        return loaded
    finally:
        _under_way.discard(key)


# --- declarations ---------------------------------------------------------------------------------

_withdrawn: list[torch.library.Library] = []  # one that is collected takes the new op's entry out of torch.ops


def withdraw(library: torch.library.Library) -> None:
    """Take from PyTorch what was defined and registered with the library."""
    library._destroy()
    _withdrawn.append(library)


def reset_compiled_models() -> None:
    """Have models that ``torch.compile`` compiled be compiled again, as an op that they may call was declared again.

    Dynamo's guards know nothing of an op's fake, and the caches of AOTAutograd and Inductor find a graph by the names of its
    ops alone (pytorch#160472): this process uses them no longer.
    """
    loaded: Mapping[str, Any] = sys.modules
    if "torch._dynamo" in loaded:
        loaded["torch._dynamo"].reset()
    if "torch._functorch.config" in loaded:
        loaded["torch._functorch.config"].enable_autograd_cache = False
    if "torch._inductor.config" in loaded:
        loaded["torch._inductor.config"].fx_graph_cache = False


class Source:
    """The text of a declared function, to be told when it is edited: it is declared again by a reload alone.

    Args:
        who: the op.
        function: as it was declared.
    """

    def __init__(self, who: str, function: Callable[..., Any]) -> None:
        self._who = who
        self._module = function.__module__
        self._name = function.__name__
        self._file = function.__code__.co_filename if inspect.isfunction(function) else ""
        self._digest = digest_of_file(self._file)
        self._text = self._read()

    def warn_if_edited(self) -> None:
        """Say, once for each edit, that the op is still the former one."""
        digest = digest_of_file(self._file)
        if digest == self._digest:
            return
        self._digest, text = digest, self._read()
        if text is None or text == self._text:
            return
        self._text = text
        warnings.warn(
            f"{self._who} is still what it was declared as before {self._file} was edited\n"
            f"  remedy: importlib.reload({self._module}), which declares it again",
            stacklevel=2,
        )

    def _read(self) -> str | None:
        """The function with its decorators; None where there is no such file, as in a notebook, or no such function in it."""
        try:
            tree = ast.parse(Path(self._file).read_bytes())
        except (OSError, ValueError, SyntaxError):
            return None
        found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == self._name]
        return ast.dump(found[-1]) if found else None
