"""Writes what the documents say of the built-in ops, from their declarations: `make docs`.

The README's table is made anew. In docs/ops.md each op's schemas are, and an op without a section gets one that holds its
docstring, in the order of the registry; what else is written there stays.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

import torch_jit_ops
from torch_jit_ops import Op
from torch_jit_ops.declaring.signature import OUT_FORMS_RETURN

ROOT = Path(__file__).resolve().parent.parent
SHORT = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
_TABLE = re.compile(r"^\| op \| result \| dtypes \|\n\| --- \| --- \| --- \|\n(?:\|.*\n)*", re.MULTILINE)


def readme_with(text: str, ops: Iterable[Op]) -> str:
    """The README with the table of these ops.

    Raises:
        ValueError: it has no table.
    """
    rows = ["| op | result | dtypes |", "| --- | --- | --- |", *map(_row, ops)]
    made, found = _TABLE.subn(lambda _: "\n".join([*rows, ""]), text)
    if found != 1:
        raise ValueError(f"the README has {found} tables of ops, expected 1, under '| op | result | dtypes |'")
    return made


def _row(op: Op) -> str:
    return f"| `{op.name}({_arguments(op)})` | {_result(op)} | {_dtypes(op)} |"


def _arguments(op: Op) -> str:
    parts = []
    for parameter in inspect.signature(op.reference).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in parts:
            parts.append("*")
        given = "" if parameter.default is parameter.empty else f"={parameter.default!r}"
        parts.append(f"{parameter.name}{given.replace('1e-06', '1e-6').replace('1e-05', '1e-5')}")
    return ", ".join(parts)


def _result(op: Op) -> str:
    """The first sentence of the docstring, without the papers that it names."""
    paragraph = " ".join(inspect.cleandoc(op.reference.__doc__ or "").partition("\n\n")[0].split())
    sentence = re.split(r"(?<=[^.])\.(?= |$)", paragraph)[0]
    named = re.sub(r" \((?:(\w+); )?[^()]*arXiv:[\d.]+\)", lambda paper: f" ({paper[1]})" if paper[1] else "", sentence)
    return named.replace("``", "`").replace("|", r"\|")


def _dtypes(op: Op) -> str:
    def listed(dtypes: Iterable[torch.dtype]) -> str:
        return ", ".join(SHORT.get(dtype, str(dtype).removeprefix("torch.")) for dtype in dtypes)

    declared = op.declaration.dtypes
    if declared.shared is not None:
        return listed(declared.shared)
    return "; ".join(f"`{name}`: {listed(dtypes)}" for name, dtypes in declared.items())


def reference_with(text: str, ops: Sequence[Op]) -> str:
    """docs/ops.md with the schemas of these ops, and a section for each.

    Raises:
        ValueError: it has a section for something else.
    """
    preface, *rest = re.split(r"^(?=## )", text, flags=re.MULTILINE)
    sections = {part.partition("\n")[0].removeprefix("## "): part for part in rest}
    unknown = sorted(sections.keys() - {op.name for op in ops})
    if unknown:
        raise ValueError(f"docs/ops.md has sections for what is no op: {', '.join(unknown)}")
    return preface + "\n".join(_section(op, sections.get(op.name)).rstrip("\n") + "\n" for op in ops)


def _section(op: Op, written: str | None) -> str:
    schemas = [f"    {getattr(op.packet, overload or 'default')._schema}\n" for overload in op.declaration.overloads]
    if written is None:
        body = inspect.cleandoc(op.reference.__doc__ or "").replace("``", "`")
        body = re.sub(r"^(Args|Returns|Raises):\n", r"**\1**\n\n", body, flags=re.MULTILINE)
        body = re.sub(r"^    (?=\w+: )", "* ", body, flags=re.MULTILINE)
        return f"## {op.name}\n\n{''.join(schemas)}\n{re.sub(r'^ +', '', body, flags=re.MULTILINE)}\n"
    return re.sub(r"\A(## \w+\n\n)(?:    .*\n)*", lambda head: head[1] + "".join(schemas), written)


def main() -> int:
    if not OUT_FORMS_RETURN:
        print("the documents say what PyTorch 2.13 and newer does; this is", torch.__version__, file=sys.stderr)
        return 1
    ops = list(torch_jit_ops.library.ops.values())
    for file, made in (("README.md", readme_with), ("docs/ops.md", reference_with)):
        path = ROOT / file
        before = path.read_text()
        after = made(before, ops)
        if after != before:
            path.write_text(after)
            print(f"wrote {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
