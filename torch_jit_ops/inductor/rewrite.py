"""What ``fuse`` and ``decompose`` have in common: a pass over the graphs that Inductor compiles."""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
from abc import abstractmethod
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch._inductor.config
from torch._guards import CompileContext
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, Node

from torch_jit_ops.inductor.report import Entry, Report, module_of

_SETTING = "pre_grad_custom_pass"
_KINDS = ("done", "missed", "untouched")


class Rewrite(CustomGraphPass):
    """Changes graphs ahead of autograd, so that what it puts there is differentiated, functionalised and laid out as if the
    model had called it.

        torch.compile(model, options=rewrite.options())
        with rewrite: ...                                  # what is compiled meanwhile
        first + second                                     # both, one after the other
    """

    def __init__(self) -> None:
        # Done, missed and untouched, by the frame that Dynamo compiled.
        self._entries: defaultdict[int | None, list[Counter[Entry]]] = defaultdict(lambda: [Counter(), Counter(), Counter()])
        self._contexts: list[contextlib.AbstractContextManager[Any]] = []

    @abstractmethod
    def __call__(self, graph: Graph) -> None: ...

    @abstractmethod
    def describe(self) -> str:
        """All that the outcome depends on, but for the sources of this package."""

    def uuid(self) -> bytes:
        """The key of Inductor's caches: another version of this package, pattern or option is another one."""
        digest = hashlib.sha256(self.describe().encode())
        for source in sorted(Path(__file__).parent.glob("*.py")):
            digest.update(source.read_bytes())
        return digest.digest()

    def options(self, **others: Any) -> dict[str, Any]:
        """For ``torch.compile(options=...)``; ``others`` are further options of Inductor."""
        return {_SETTING: self, **others}

    def report(self) -> Report:
        """What was done so far. A graph that comes out of Inductor's cache was not looked at again."""
        return Report(*(tuple(entry for frame in self._entries.values() for entry in frame[i].elements()) for i in range(3)))

    def __add__(self, other: Rewrite) -> Rewrite:
        return Sequence((self, other))

    def __enter__(self) -> Rewrite:
        outer = getattr(torch._inductor.config, _SETTING)
        both = outer + self if isinstance(outer, Rewrite) else self if outer is None else Sequence((_Plain(outer), self))
        context = torch._inductor.config.patch(_SETTING, both)
        context.__enter__()
        self._contexts.append(context)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._contexts.pop().__exit__(kind, error, trace)

    def __deepcopy__(self, memo: Any) -> Rewrite:
        return self  # torch.compile copies its options; the report is read from the original

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        """PyTorch 2.11 makes the key of its cache from the pickled options, and goes without a cache where it cannot."""
        key = self.uuid()
        if key is None:
            raise TypeError(f"{self!r} holds a pass without a uuid")
        return _cannot_be_loaded, (key,)

    def _enter(self, done: Iterable[Entry], missed: Iterable[Entry] = (), untouched: Iterable[Entry] = ()) -> None:
        """Add the entries of one graph. Dynamo traces a frame again for other sizes: places that were there already are the
        same ones. What is behind a graph break is a frame of its own, and so are its places."""
        compiled = CompileContext.current_compile_id()
        frame = self._entries[compiled.frame_id if compiled is not None else None]
        for known, entries in zip(frame, (done, missed, untouched), strict=True):
            known |= Counter(entries)


def _cannot_be_loaded(key: Any) -> Rewrite:
    raise TypeError("a rewrite is pickled for its key alone")


class Sequence(Rewrite):
    """Rewrites, one after the other."""

    def __init__(self, parts: tuple[Rewrite, ...]) -> None:
        super().__init__()
        self._parts = parts

    def __call__(self, graph: Graph) -> None:
        for part in self._parts:
            part(graph)

    def describe(self) -> str:
        return "\n".join(part.describe() for part in self._parts)

    def uuid(self) -> Any:
        uuids = [part.uuid() for part in self._parts]
        return None if None in uuids else b"".join(uuids)

    def report(self) -> Report:
        reports = [part.report() for part in self._parts]
        return Report(*(tuple(entry for report in reports for entry in getattr(report, kind)) for kind in _KINDS))


class _Plain(Rewrite):
    """A pass of somebody else's, in a sequence."""

    def __init__(self, plain: Any) -> None:
        super().__init__()
        self._plain = plain if isinstance(plain, (list, tuple)) else [plain]

    def __call__(self, graph: Graph) -> None:
        for plain in self._plain:
            plain(graph)

    def describe(self) -> str:
        return repr(self.uuid())

    def uuid(self) -> Any:
        if all(isinstance(plain, CustomGraphPass) and plain.uuid() for plain in self._plain):
            return repr([plain.uuid() for plain in self._plain]).encode()
        return None


def in_module(node: Node, where: str | tuple[str, ...]) -> bool:
    """Whether the path of the node's module matches one of the patterns, such as ``layers.*.mlp``."""
    patterns = (where,) if isinstance(where, str) else where
    return any(fnmatch.fnmatchcase(module_of(node), pattern) for pattern in patterns)
