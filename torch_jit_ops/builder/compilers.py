"""Which compilers would build a unit: their identity decides whether what is in the store still counts.

Nothing here starts a process while a stored kernel is loaded: what a compiler says of itself is noted in the store, beside the
size and time stamp of the program that was asked.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from torch_jit_ops import environment, process
from torch_jit_ops.backends import Backend, programs
from torch_jit_ops.backends.programs import MissingCompiler
from torch_jit_ops.builder.unit import Unit
from torch_jit_ops.forks import subprocess
from torch_jit_ops.store import files, forms
from torch_jit_ops.store.store import Store

_known: dict[tuple[object, ...], tuple[str | None, MissingCompiler | None]] = process.keep({})


def compiler_of(unit: Unit, store: Store) -> str | None:
    """The identity of the compilers that would build the unit; None if they are missing."""
    return found_for(unit, store)[0]


def found_for(unit: Unit, store: Store) -> tuple[str | None, MissingCompiler | None]:
    """The identity of the compilers for the unit, or why there are none. Looked for once in a process and environment."""
    key = (unit.backend.name, store.root, *environment.compiler_choice(unit.backend.variables))
    if key not in _known:
        try:
            commands = unit.backend.commands()
            try:
                memory = store.own_folder("compilers")
            except (OSError, files.UntrustedCache):  # who reads or writes a kernel there says so
                memory = Path(os.devnull)
            _known[key] = " / ".join(identity(unit.backend, commands, memory)), None
        except MissingCompiler as missing:
            _known[key] = None, missing
    return _known[key]


def identity(backend: Backend, commands: Iterable[tuple[str, ...]], memory: Path) -> Iterator[str]:
    """The compilers' versions, and what else of the machine changes what they make."""
    for command in commands:
        yield compiler_identity(command, memory)
        scripts = scripts_behind(command)
        if scripts is not None:
            yield f"started by scripts {scripts}"
        if len(command) > 1:
            yield f"as {shlex.join(command)}"
    yield from (f"{name}={value}" for name, value in environment.compiler_settings(backend.variables).items())


_NOTE = forms.fields(program=forms.text("[0-9a-f]{64}"), identity=forms.text(".*"))
_LARGEST_SCRIPT = 1 << 16


def compiler_identity(command: Path | Sequence[str], memory: Path) -> str:
    """What ``command --version`` says. The folder ``memory`` keeps it for as long as the programs behind it are the same."""
    words = [str(command)] if isinstance(command, Path) else list(command)
    state = hashlib.sha256("\0".join((*words, *_states(words))).encode(errors="surrogatepass")).hexdigest()
    note = memory / f"{Path(programs.compiler_word(words)).name}.json"
    try:
        known = forms.parse(forms.read(note, _LARGEST_SCRIPT), _NOTE)
        if known["program"] == state:
            return str(known["identity"])
    except (OSError, forms.Malformed):
        pass  # not asked yet, or unreadable: ask
    try:
        said = subprocess.run([*words, "--version"], capture_output=True, check=True).stdout.decode(errors="replace")
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", b"") or b"").decode(errors="replace").strip()
        reason = forms.printable(said or error)
        raise MissingCompiler(f"the compiler {words[0]} does not run, so kernels cannot be built\n  {reason}") from error
    lines = [forms.printable(line.strip()) for line in said.splitlines() if re.search(r"\d+\.\d+", line)]
    identity = " ".join(lines[:2])[:1000]
    with contextlib.suppress(OSError):  # a read-only cache: the next process asks again
        files.make_private(memory)
        files.replace_file(note, json.dumps({"program": state, "identity": identity}).encode())
    return identity


def scripts_behind(command: Sequence[str]) -> str | None:
    """Digest of the scripts that are started before a compiler is, and of the variables that they name; None without scripts.

    They may add flags, or start another compiler, and answer ``--version`` as before.
    """
    texts = [text for _, text in _programs_behind(command) if text]
    named = sorted(environment.named_in("\n".join(texts)).items())
    content = json.dumps([texts, named])
    return hashlib.sha256(content.encode()).hexdigest()[:16] if texts else None


def _states(command: Sequence[str]) -> Iterator[str]:
    """Path, size and time stamp of every program that may have a part in what the command does."""
    for program, text in _programs_behind(command):
        with contextlib.suppress(OSError):
            state = os.stat(program)
            variables = environment.named_in(text) if text else None
            yield f"{program} {os.path.realpath(program)} {state.st_size} {state.st_mtime_ns} {variables}"


def _programs_behind(command: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Programs of a command, of the scripts among them, and of the variables that those name; and the text of each script.

    Of each name all that PATH has: a program that is a link to ccache starts the next one of that name.
    """
    left = [*command, *map(os.path.basename, command)]
    folders = environment.given_path()
    seen: set[str] = set()
    while left and len(seen) < 200:
        word = left.pop(0)
        for program in [word] if "/" in word else [os.path.join(folder, word) for folder in folders]:
            if program in seen or not (os.path.isfile(program) and os.access(program, os.X_OK)):
                continue
            seen.add(program)
            text = _script(program)
            yield program, text
            values = environment.named_in(text).values() if text else ()
            words = [word for part in (text, *values) for word in re.findall(r"[\w./+@-]+", part)]
            folders += [word for word in words if word.startswith("/") and os.path.isdir(word) and word not in folders]
            left += words


def _script(program: str) -> str:
    """The text of a script; nothing for a program of machine code."""
    try:
        with open(program, "rb") as file:
            start = file.read(_LARGEST_SCRIPT)
    except OSError:
        return ""  # it may be run and not read
    return start.decode(errors="surrogateescape") if start.startswith(b"#!") else ""
