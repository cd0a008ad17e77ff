"""Changes that make a program nearly what an op does. Each takes a program and random numbers, and says what it changed.

``Skip`` is raised where a mutation has nothing to change; a mutated program that does not run is thrown away.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence

import torch
from fuse_program import END, TRANSFORMS, Input, Program, Rng, rename, targets, uses
from torch import Tensor


class Skip(Exception):
    pass


Mutation = Callable[[Program, Rng], str]


def _pick(rng: Rng, found: Sequence[object]) -> object:
    if not found:
        raise Skip
    return rng.choice(found)


def _floats(program: Program, before: int) -> dict[str, Tensor]:
    """The tensors of floats that are known ahead of line ``before``."""
    known = dict(zip(program.names(), program.views(program.buffers()), strict=True))
    if before > 0:
        known |= program.trace()[before - 1]
    return {name: tensor for name, tensor in known.items() if tensor.is_floating_point() and tensor.numel() > 0}


def _point(program: Program, rng: Rng, last: int | None = None) -> int:
    """Before which line to put another."""
    return rng.randint(0, len(program.lines) if last is None else last)


def _assignments(program: Program) -> list[int]:
    return [index for index, line in enumerate(program.lines) if targets(line)]


def _defined(program: Program, name: str) -> int:
    """The line behind the one that first makes ``name``."""
    for index, line in enumerate(program.lines):
        if name in targets(line):
            return index + 1
    return 0


# --- one line -------------------------------------------------------------------------------------------


def swap(program: Program, rng: Rng) -> str:
    """The operands of an operator, the first two arguments of a call, or what a call unpacks to."""
    index = _pick(rng, _assignments(program))
    tree = ast.parse(program.lines[index])
    choices = []
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp):
            choices.append((node, "left", "right"))
        elif isinstance(node, ast.Call) and len(node.args) > 1:
            choices.append((node.args, 0, 1))
        elif isinstance(node, ast.Call) and len(node.args) == 1 and isinstance(node.func, ast.Attribute):
            if isinstance(node.args[0], ast.Name) and isinstance(node.func.value, ast.Name) and node.func.value.id != "F":
                choices.append((node, "self", "argument"))
        elif isinstance(node, ast.Tuple) and isinstance(node.ctx, ast.Store):
            choices.append((node.elts, 0, 1))
    place, one, other = _pick(rng, choices)
    if isinstance(place, list):
        place[one], place[other] = place[other], place[one]
    elif one == "self":
        place.func.value, place.args[0] = place.args[0], place.func.value
    else:
        place.left, place.right = place.right, place.left
    before, program.lines[index] = program.lines[index], ast.unparse(tree)
    return f"swap: {before}"


def constant(program: Program, rng: Rng) -> str:
    """Another number, dimension, flag or word."""
    places = []
    for index, line in enumerate(program.lines):
        if not line.startswith(("#", "with ")):
            places += [(index, at) for at, node in enumerate(ast.walk(ast.parse(line))) if isinstance(node, ast.Constant)]
    index, at = _pick(rng, places)
    tree = ast.parse(program.lines[index])
    node = list(ast.walk(tree))[at]
    if isinstance(node.value, bool):
        node.value = not node.value
    elif isinstance(node.value, int):
        node.value = rng.choice([node.value + 1, node.value - 1, -node.value, 0, float(node.value), node.value + 0.5])
    elif isinstance(node.value, float):
        node.value = rng.choice([node.value * 1.01, node.value * 10, -node.value, node.value + 1, 0.0, 1.0])
    elif isinstance(node.value, str):
        node.value = "none" if node.value == "tanh" else "tanh"
    else:
        raise Skip
    before, program.lines[index] = program.lines[index], ast.unparse(tree)
    return f"constant: {before}"


_KEYWORDS = {
    "silu": ("input", "inplace"),
    "gelu": ("input", "approximate"),
    "relu": ("input", "inplace"),
    "sigmoid": ("input",),
    "tanh": ("input",),
    "rsqrt": ("input",),
    "sqrt": ("input",),
    "square": ("input",),
    "mul": ("input", "other"),
    "multiply": ("input", "other"),
    "add": ("input", "other"),
    "pow": ("input", "exponent"),
    "mean": ("input", "dim", "keepdim"),
    "chunk": ("input", "chunks", "dim"),
    "split": ("tensor", "split_size_or_sections", "dim"),
    "layer_norm": ("input", "normalized_shape", "weight", "bias", "eps"),
    "rms_norm": ("input", "normalized_shape", "weight", "eps"),
}


def keyword(program: Program, rng: Rng) -> str:
    """Positional arguments as keywords, methods as functions of ``torch`` or of ``Tensor``, operators as functions."""
    index = _pick(rng, _assignments(program))
    tree = ast.parse(program.lines[index])
    value = tree.body[0].value
    if isinstance(value, ast.BinOp):
        names = {ast.Mult: "mul", ast.Add: "add", ast.Sub: "sub", ast.Div: "truediv", ast.Pow: "pow"}
        name = names.get(type(value.op))
        if name is None:
            raise Skip
        left, right = ast.unparse(value.left), ast.unparse(value.right)
        aten = {"truediv": "div"}.get(name, name)
        forms = [f"operator.{name}({left}, {right})", f"torch.Tensor.__{name}__({left}, {right})"]
        forms += [f"torch.{aten}({left}, {right})", f"torch.{aten}(other={right}, input={left})"]
        forms += [f"torch.ops.aten.{aten}.Tensor({left}, {right})", f"torch.ops.aten.{aten}({left}, {right})"]
        forms += [f"torch.Tensor.{aten}({left}, {right})", f"({left}).{aten}(other={right})", f"({left}).__{name}__({right})"]
        made = rng.choice(forms)
    elif isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute):
        name, owner = value.func.attr, ast.unparse(value.func.value)
        is_method = owner not in ("F", "torch", "torch.nn.functional", "math", "operator")
        arguments = ([owner] if is_method else []) + [ast.unparse(argument) for argument in value.args]
        others = [f"{k.arg}={ast.unparse(k.value)}" for k in value.keywords]
        names = _KEYWORDS.get(name)
        forms = []
        if is_method:
            forms.append(f"torch.Tensor.{name}({', '.join([*arguments, *others])})")
            if names:
                forms.append(f"torch.{name}({', '.join([*arguments, *others])})")
        if names and len(arguments) <= len(names):
            home = "torch" if is_method else owner
            named = [f"{k}={v}" for k, v in zip(names, arguments, strict=False)]
            rng.shuffle(named)
            forms.append(f"{home}.{name}({', '.join([*named, *others])})")
        if name in ("silu", "gelu", "relu", "sigmoid", "tanh", "rsqrt", "sqrt") and not others:
            forms.append(f"torch.ops.aten.{name}({arguments[0]})")
            forms.append(f"torch.ops.aten.{name}.default({arguments[0]})")
        if name in ("silu", "relu") and not others:
            forms.append(f"F.{name}({arguments[0]}, inplace=False)")
            forms.append(f"F.{name}({arguments[0]}, True)")
            forms.append(f"torch.{'relu' if name == 'relu' else 'sigmoid'}({arguments[0]})")
        made = _pick(rng, forms)
    else:
        raise Skip
    before = program.lines[index]
    program.lines[index] = f"{ast.unparse(tree.body[0].targets[0])} = {made}"
    return f"keyword: {before}"


def in_place(program: Program, rng: Rng) -> str:
    """A step of the program by its in-place form."""
    found = []
    for index, line in enumerate(program.lines):
        tree = ast.parse(line)
        value = tree.body[0].value if tree.body and isinstance(tree.body[0], ast.Assign) else None
        if isinstance(value, ast.BinOp) and isinstance(value.left, ast.Name):
            found.append((index, tree, value))
    index, tree, value = _pick(rng, found)
    target, left, right = ast.unparse(tree.body[0].targets[0]), ast.unparse(value.left), ast.unparse(value.right)
    sign = {ast.Mult: "*", ast.Add: "+", ast.Sub: "-", ast.Div: "/", ast.Pow: "**"}.get(type(value.op))
    if sign is None:
        raise Skip
    method = {"*": "mul_", "+": "add_", "-": "sub_", "/": "div_", "**": "pow_"}[sign]
    forms = [[f"{left} {sign}= {right}", f"{target} = {left}"], [f"{target} = {left}.{method}({right})"]]
    forms.append([f"{target} = {left}.{method.rstrip('_')}({right})", f"{left}.copy_({target})"])
    forms.append([f"{target} = torch.empty_like({left})", f"torch.{method.rstrip('_')}({left}, {right}, out={target})"])
    before = program.lines[index]
    program.lines[index : index + 1] = rng.choice(forms)
    return f"in_place: {before}"


# --- halves and other results of one call -----------------------------------------------------------------

_PAIRS = (
    "x[..., :8], x[..., :8]",
    "x[..., 8:], x[..., :8]",
    "x[..., 8:], x[..., 8:]",
    "x[..., ::2], x[..., 1::2]",
    "x.unflatten(-1, (2, -1)).unbind(-2)",
    "x.unflatten(-1, (-1, 2)).unbind(-1)",
    "x.unflatten(-1, (2, -1)).unbind(-2)[::-1]",
    "torch.hsplit(x, 2)",
    "torch.hsplit(x, [8])",
    "x.chunk(4, -1)[:2]",
    "x.chunk(4, -1)[::2]",
    "x.chunk(2, -1)[::-1]",
    "x.chunk(2, -1)[0], x.chunk(2, -1)[0]",
    "torch.split(x, 4, -1)[:2]",
    "torch.tensor_split(x, (4, 12), -1)[0], torch.tensor_split(x, (4, 12), -1)[2]",
    "x[..., torch.arange(8)], x[..., torch.arange(8) + 8]",
    "x[..., torch.arange(7, -1, -1)], x[..., 8:]",
    "x[torch.tensor([3, 1, 15, 0, 2, 8, 9, 4])], x[torch.tensor([5, 1, 15, 0, 2, 8, 9, 4])]",
    "x[x > 0][:8].new_ones(8), x[8:]",
    "x[:8], x[torch.arange(15, 7, -1)]",
    "x[torch.arange(8)], x[8:]",
    "x.view(-1)[:8].expand(3, 8), x[..., 8:]",
    "x.index_select(-1, torch.arange(8) * 2), x.index_select(-1, torch.arange(8))",
    "torch.split_with_sizes(x, [8, 8], -1)",
    "torch.split_with_sizes(x, [8, 8], -1)[::-1]",
    "torch.unsafe_chunk(x, 2, -1)",
    "torch.unsafe_split(x, 8, -1)",
    "x.unfold(-1, 8, 8).unbind(-2)",
    "x.unfold(-1, 8, 1).unbind(-2)[:2]",
    "x.topk(8, -1)[0], x.topk(8, -1, largest=False)[0]",
    "x.sort(-1)[0].chunk(2, -1)",
    "x.roll(8, -1).chunk(2, -1)",
    "x.roll(1, -1).chunk(2, -1)",
    "torch.narrow(x, -1, 4, 8), x.narrow(-1, 8, 8)",
    "x.select(-1, 0).unsqueeze(-1).expand(x[..., :8].shape), x[..., 8:]",
    "x.as_strided((3, 8), (16, 1)), x.as_strided((3, 8), (16, 1), 8)",
    "x.as_strided((3, 8), (16, 1), 1), x.as_strided((3, 8), (16, 1), 9)",
    "x.as_strided((3, 8), (0, 1)), x[..., 8:]",
    "x.clone()[..., :8], x[..., 8:]",
    "x.clone().chunk(2, -1)[0], x.chunk(2, -1)[1]",
    "x[..., :8].contiguous(), x[..., 8:].contiguous()",
    "torch.tensor_split(x, 2, dim=-1)[1], torch.tensor_split(x, 2, dim=-1)[0]",
    "x.split([8, 8], -1)[0], x.split([8, 8], -1)[0]",
    "x.reshape(-1, 2, 8)[:, 0].reshape(x[..., :8].shape), x.reshape(-1, 2, 8)[:, 1].reshape(x[..., :8].shape)",
    "torch.atleast_1d(x)[..., :8], x[..., 8:16]",
    "x[..., None, :8].squeeze(-2), x[..., 8:]",
    "x[:, :8], x[:, 8:]",
    "x[..., -8:], x[..., :-8]",
)


def halves(program: Program, rng: Rng) -> str:
    """Another way to get two parts of one tensor."""
    if "x" not in program.names() or program.find("x").shape[-1] != 16:
        raise Skip
    places = [index for index, line in enumerate(program.lines) if set(targets(line)) & {"g", "u"}]
    for index in reversed(places):
        del program.lines[index]
    pair = rng.choice(_PAIRS)
    program.lines.insert(0, f"g, u = {pair}")
    return f"halves: {pair}"


_SOURCES = (
    "z.unbind(0)",
    "z.chunk(2, 0)",
    "z.split(1, 0)",
    "torch.split(z, [1, 1], 0)",
    "torch.vsplit(z, 2)",
    "torch.tensor_split(z, 2)",
    "torch.aminmax(z, dim=0)",
    "torch.var_mean(z, 0)",
    "torch.std_mean(z, dim=0)",
    "z.topk(2, 0)[0].unbind(0)",
    "torch.max(z, 0)[0], torch.min(z, 0)[0]",
    "torch.max(z, 0)[0], torch.max(z, 0)[1].to(z.dtype)",
    "z.sort(0)[0], z.sort(0)[1].to(z.dtype)",
    "torch.frexp(z[0])[0], torch.frexp(z[0])[1].to(z.dtype)",
    "z.kthvalue(1, 0)[0], z.kthvalue(2, 0)[0]",
    "z.median(0)[0], z.mode(0)[0]",
    "z.cummax(0)[0].unbind(0)",
    "z[0], z[1]",
    "z[1], z[0]",
    "z[0], z[0]",
    "z.select(0, 0), z.select(0, 1)",
    "torch.unbind(z, dim=0)",
    "torch.ops.aten.unbind.int(z, 0)",
    "torch.broadcast_tensors(z[0], z[1])",
    "torch.broadcast_tensors(z[1], z[0, :1])",
    "torch.meshgrid(z[0].view(-1), z[1].view(-1), indexing='ij')",
    "torch.ops.userlib.split_sign(z[0].float())[0], torch.ops.userlib.split_sign(z[1].float())[0]",
    "torch.ops.userlib.split_sign(z[0].float())[0], torch.ops.userlib.split_sign(z[0].float())[1].float()",
    "checkpoint(z[0])",
    "checkpoint(z[0])[::-1]",
    "torch.stack([z[1], z[0]]).unbind(0)",
    "torch.cat([z[0], z[1] * 2], -1).chunk(2, -1)",
    "torch.cat([z[0], z[1]], -1).split(8, -1)",
    "torch.dstack([z[0], z[1]]).unbind(-1)",
    "torch.complex(z[0].float(), z[1].float()).real, torch.complex(z[0].float(), z[1].float()).imag",
    "torch.view_as_real(torch.complex(z[0].float(), z[1].float())).unbind(-1)",
    "torch.randn_like(z[0]), torch.randn_like(z[0])",
    "F.dropout(z[0], 0.5, True), F.dropout(z[0], 0.5, True)",
    "torch.normal(z[0], 1.0), torch.normal(z[0], 1.0)",
    "torch.movedim(z, 0, -1).unbind(-1)",
    "F.max_pool1d(z[0].float(), 1, return_indices=True)",
    "torch.linalg.qr(z[:, 0, :, None].float() + torch.eye(8))",
    "torch.gradient(z, dim=(0, 1))",
    "torch.unflatten(z, 0, (2, 1)).squeeze(1).unbind()",
)


def source(program: Program, rng: Rng) -> str:
    """Two arguments as the results of one call."""
    rows = [given for given in program.inputs if given.kind == "rows" and given.view == "b" and not given.buffer]
    if len(rows) < 2 or rows[0].shape != rows[1].shape or "z0" in program.names():
        raise Skip
    one, two = rng.sample(rows[:2], 2)
    text = rename(rng.choice(_SOURCES), "z", "z0")
    first = program.inputs.index(rows[0])
    program.inputs = [given for given in program.inputs if given not in rows[:2]]
    program.inputs.insert(first, Input("z0", (2, *one.shape), one.dtype))
    program.lines.insert(0, f"{one.name}, {two.name} = {text}")
    return f"source: {text}"


# --- two calls that are nearly one ------------------------------------------------------------------------

_FORKS = (
    ("v.clamp(None, 0.3)", "v.clamp(0.3)"),
    ("torch.clamp(v, min=0.1)", "torch.clamp(v, max=0.1)"),
    ("torch.clamp(v, -0.2, 0.4)", "torch.clamp(v, -0.4, 0.2)"),
    ("torch.where(v > 0, v, 0.5)", "torch.where(v > 0, 0.5, v)"),
    ("torch.where(v > 0, v, -v)", "torch.where(v > 0, -v, v)"),
    ("torch.where(v > 0, v, torch.tensor(0.5))", "torch.where(v > 0, v, torch.tensor(2.5))"),
    ("v ** 3", "3 ** v"),
    ("torch.pow(v, 3.0)", "torch.pow(3.0, v)"),
    ("v.pow(2)", "torch.pow(2, v)"),
    ("v - 1", "1 - v"),
    ("v / 2", "2 / v"),
    ("v // 2", "2 // v"),
    ("v % 0.7", "0.7 % v"),
    ("torch.fmod(v, 0.7)", "torch.remainder(v, 0.7)"),
    ("torch.sub(v, 1, alpha=2)", "torch.sub(v, 1, alpha=3)"),
    ("torch.add(v, v, alpha=2)", "torch.add(v, v)"),
    ("torch.rsub(v, 1)", "torch.sub(v, 1)"),
    ("torch.randn_like(v)", "torch.randn_like(v)"),
    ("torch.rand_like(v)", "torch.rand_like(v)"),
    ("F.dropout(v, 0.5, True)", "F.dropout(v, 0.5, True)"),
    ("F.dropout(v, 0.5)", "F.dropout(v, 0.5)"),
    ("torch.dropout(v, 0.5, True)", "torch.dropout(v, 0.5, True)"),
    ("F.alpha_dropout(v, 0.5, True)", "F.alpha_dropout(v, 0.5, True)"),
    ("F.rrelu(v, 0.1, 0.9, True)", "F.rrelu(v, 0.1, 0.9, True)"),
    ("torch.normal(v, 1.0)", "torch.normal(v, 1.0)"),
    ("torch.bernoulli(v.sigmoid())", "torch.bernoulli(v.sigmoid())"),
    ("torch.poisson(v.abs())", "torch.poisson(v.abs())"),
    ("v * torch.rand(1)", "v * torch.rand(1)"),
    ("v * torch.randn(v.shape, dtype=v.dtype)", "v * torch.randn(v.shape, dtype=v.dtype)"),
    ("v.clone().normal_()", "v.clone().normal_()"),
    ("torch.empty_like(v).uniform_()", "torch.empty_like(v).uniform_()"),
    ("v.roll(1, -1)", "v.roll(1, 0)"),
    ("v.roll(1, -1)", "v.roll(2, -1)"),
    ("v.flip(-1)", "v.flip(0)"),
    ("v.cumsum(-1)", "v.cumsum(0)"),
    ("v.softmax(-1)", "v.softmax(0)"),
    ("F.normalize(v, dim=-1)", "F.normalize(v, dim=0)"),
    ("F.normalize(v, p=1.0, dim=-1)", "F.normalize(v, p=2.0, dim=-1)"),
    ("v * v.sum(-1, keepdim=True)", "v * v.sum(0, keepdim=True)"),
    ("v * v.mean(-1, keepdim=True)", "v * v.mean(0, keepdim=True)"),
    ("v * v.amax(-1, keepdim=True)", "v * v.amax(0, keepdim=True)"),
    ("v * torch.var_mean(v, -1, keepdim=True)[0]", "v * torch.var_mean(v, -1, keepdim=True)[1]"),
    ("v + torch.aminmax(v, dim=-1, keepdim=True)[0]", "v + torch.aminmax(v, dim=-1, keepdim=True)[1]"),
    ("v + torch.aminmax(v, dim=-1, keepdim=True).min", "v + torch.aminmax(v, dim=-1, keepdim=True).max"),
    ("v.max(-1, keepdim=True)[0] + v", "v.max(-1, keepdim=True)[1] + v"),
    ("v.max(-1, keepdim=True).values + v", "v.min(-1, keepdim=True).values + v"),
    ("v.topk(1, -1)[0] + v", "v.topk(1, -1, largest=False)[0] + v"),
    ("v.var(-1, keepdim=True, correction=0) * v", "v.var(-1, keepdim=True, correction=1) * v"),
    ("v.std(-1, True, True) * v", "v.std(-1, False, True) * v"),
    ("v.norm(2, -1, True) * v", "v.norm(1, -1, True) * v"),
    ("torch.sort(v, -1)[0]", "torch.sort(v, -1, descending=True)[0]"),
    ("torch.sort(v, -1)[0]", "torch.sort(v, -1)[1].to(v.dtype)"),
    ("torch.frexp(v)[0]", "torch.frexp(v)[1].to(v.dtype)"),
    ("torch.stack([v, v * 2]).unbind(0)[0]", "torch.stack([v, v * 2]).unbind(0)[1]"),
    ("torch.stack([v, v * 2])[0]", "torch.stack([v, v * 2])[1]"),
    ("torch.stack([v, v * 2]).select(0, 0)", "torch.stack([v, v * 2]).select(0, 1)"),
    ("torch.cat([v, v * 3]).chunk(2)[0]", "torch.cat([v, v * 3]).chunk(2)[1]"),
    ("torch.cat([v, v * 3], -1).split(v.shape[-1], -1)[0]", "torch.cat([v, v * 3], -1).split(v.shape[-1], -1)[1]"),
    ("torch.cat([v, v * 3], -1).chunk(2, -1)[0]", "torch.cat([v * 3, v], -1).chunk(2, -1)[0]"),
    ("checkpoint(v)[0]", "checkpoint(v)[1]"),
    ("torch.ops.userlib.split_sign(v)[0]", "torch.ops.userlib.split_sign(v)[1].to(v.dtype)"),
    ("F.leaky_relu(v, 0.1)", "F.leaky_relu(v, 0.2)"),
    ("F.elu(v, 0.5)", "F.elu(v, 1.5)"),
    ("F.hardtanh(v, -0.5, 1.0)", "F.hardtanh(v, -1.0, 0.5)"),
    ("F.softplus(v, 2.0)", "F.softplus(v, 1.0, 2.0)"),
    ("F.threshold(v, 0.1, 0.5)", "F.threshold(v, 0.5, 0.1)"),
    ("F.gelu(v)", "F.gelu(v, approximate='tanh')"),
    ("torch.lerp(v, v * 2, 0.3)", "torch.lerp(v * 2, v, 0.3)"),
    ("torch.addcmul(v, v, v, value=2)", "torch.addcmul(v, v, v, value=3)"),
    ("v.masked_fill(v > 0, 0.5)", "v.masked_fill(v > 0, 0.25)"),
    ("v.masked_fill(v > 0, 0.5)", "v.masked_fill(v < 0, 0.5)"),
    ("v.nan_to_num(0.5) * 2", "v.nan_to_num(0.5) * 3"),
    ("torch.round(v, decimals=1)", "torch.round(v, decimals=0)"),
    ("torch.tril(v, 0)", "torch.tril(v, 1)"),
    ("v.detach()", "v * 1"),
    ("v.detach() * 2", "v * 2"),
    ("v.clone()", "v.contiguous()"),
    ("v * 2", "v * 2"),
    ("v * 2", "v * True"),
    ("v * 1", "v * True"),
    ("v * 2", "v * 2.0"),
    ("v + 0.0", "v + -0.0"),
    ("v.to(torch.bfloat16).to(v.dtype)", "v.to(torch.float16).to(v.dtype)"),
    ("v.to(torch.bfloat16).to(v.dtype)", "v.to(v.dtype)"),
    ("v.half().float()", "v.float()"),
    ("v.to(torch.float8_e4m3fn).to(v.dtype)", "v.to(torch.float8_e5m2).to(v.dtype)"),
    ("v.int().to(v.dtype)", "v.to(v.dtype)"),
    ("v.bool().to(v.dtype)", "v.long().to(v.dtype)"),
    ("torch.complex(v.float(), v.float() * 2).real", "torch.complex(v.float(), v.float() * 2).imag"),
    ("torch.complex(v.float(), v.float() * 2).conj().imag", "torch.complex(v.float(), v.float() * 2).imag"),
    ("v[..., torch.arange(v.shape[-1])]", "v[..., torch.arange(v.shape[-1] - 1, -1, -1)]"),
    ("v[torch.tensor([0, 1, 1])]", "v[torch.tensor([1, 0, 1])]"),
    ("v.index_select(0, torch.tensor([0, 1, 1]))", "v.index_select(0, torch.tensor([1, 0, 1]))"),
    ("v.gather(-1, torch.zeros_like(v, dtype=torch.int64))", "v.gather(0, torch.zeros_like(v, dtype=torch.int64))"),
    ("torch.full_like(v, 0.5) * v", "torch.full_like(v, 2.5) * v"),
    ("torch.ones_like(v) * v", "torch.zeros_like(v) + v * 2"),
    ("v.new_full((1,), 0.5) * v", "v.new_full((1,), 1.5) * v"),
    ("torch.tensor(0.5) * v", "torch.tensor(1.5) * v"),
    ("torch.arange(1, 9) * v", "torch.arange(2, 10) * v"),
    ("F.pad(v, (1, 0))[..., :-1]", "F.pad(v, (0, 1))[..., 1:]"),
    ("F.pad(v, (1, 0))[..., 1:]", "F.pad(v, (1, 0))[..., :-1]"),
    ("F.pad(v, (0, 1), value=1.0)[..., 1:]", "F.pad(v, (0, 1), value=2.0)[..., 1:]"),
    ("torch.einsum('...d,...d->...d', v, v)", "torch.einsum('...d,...e->...d', v, v)"),
    ("v @ v.mT @ v", "v @ (v.mT @ v) * 2"),
    ("v.unsqueeze(0).squeeze(0)", "v.unsqueeze(-1).squeeze(-1)"),
    ("v.unsqueeze(0).expand(2, *v.shape)[0]", "v.unsqueeze(0).expand(2, *v.shape)[1]"),
    ("v.transpose(0, -1).reshape(v.shape)", "v.reshape(v.shape)"),
    ("v.flatten().view(v.shape)", "v.flatten().flip(0).view(v.shape)"),
    ("v.repeat_interleave(2, -1)[..., ::2]", "v.repeat(*[1] * (v.dim() - 1), 2)[..., ::2]"),
    ("F.layer_norm(v, v.shape[-1:])", "F.layer_norm(v, v.shape[-1:], eps=0.5)"),
    ("F.layer_norm(v, v.shape[-1:])", "F.layer_norm(v, v.shape[-2:])"),
    ("torch.take_along_dim(v, v.argsort(-1), -1)", "torch.take_along_dim(v, v.argsort(-1, True), -1)"),
    ("v.diff(dim=-1, prepend=v[..., :1])", "v.diff(dim=-1, append=v[..., :1])"),
    ("torch.heaviside(v, v * 0 + 0.5)", "torch.heaviside(v * 0 + 0.5, v)"),
    ("torch.copysign(v, v.neg())", "torch.copysign(v.neg(), v)"),
    ("torch.atan2(v, v + 1)", "torch.atan2(v + 1, v)"),
    ("torch.maximum(v, v * 0)", "torch.minimum(v, v * 0)"),
    ("torch.div(v, 0.3, rounding_mode='floor')", "torch.div(v, 0.3, rounding_mode='trunc')"),
    ("torch.div(v, 0.3)", "torch.div(v, 0.3, rounding_mode='trunc')"),
    ("torch.mul(v, 0.3)", "torch.mul(v, 0.3).round()"),
    ("v.as_strided(v.shape, v.stride())", "v.as_strided(v.shape, v.stride(), 0) * 2"),
    ("v[..., 1:].new_zeros(()) + v", "v[..., 1:].new_ones(()) + v"),
    ("torch.special.polygamma(1, v)", "torch.special.polygamma(2, v)"),
    ("torch.logit(v.sigmoid(), 0.1)", "torch.logit(v.sigmoid(), 0.2)"),
    ("v.clone(memory_format=torch.contiguous_format)", "v.clone() + 1"),
    (
        "torch.cond(v.sum() > 0, lambda a: a * 2, lambda a: a * 3, (v,))",
        "torch.cond(v.sum() > 0, lambda a: a * 3, lambda a: a * 2, (v,))",
    ),
    ("torch.func.vmap(lambda a: a * 2)(v)", "torch.func.vmap(lambda a: a * 3)(v)"),
    ("torch.func.vmap(lambda a: a.sum() * a)(v)", "torch.func.vmap(lambda a: a.sum() * a, 1, 1)(v)"),
    ("torch.func.grad(lambda a: (a * a).sum())(v)", "torch.func.grad(lambda a: (a * a * a).sum())(v)"),
    ("torch.func.jvp(torch.sin, (v,), (v,))[0]", "torch.func.jvp(torch.sin, (v,), (v,))[1]"),
)

# What may stand between the two, and undoes nothing.
_BETWEEN = ("", "", "", "", "v.mul_(1.5)", "v %= 0.7", "v[..., 0] = 2.0", "v.detach().add_(1)", "F.relu(v, True)", "v //= 0.3")


def fork(program: Program, rng: Rng) -> str:
    """A value that is used twice as two values, by calls that are nearly the same."""
    choices = []
    for name in {*program.names(), *(name for line in program.lines for name in targets(line))}:
        if sum(uses(line).count(name) for line in program.lines) + program.results.count(name) > 1:
            choices.append(name)
    name = _pick(rng, sorted(choices))
    place = _defined(program, name)
    first, second = program.fresh("a"), program.fresh("c")
    one, other = rng.choice(_FORKS)
    if rng.random() < 0.15:
        other = one
    if rng.random() < 0.5:
        one, other = other, one
    between = rng.choice(_BETWEEN)
    names = [first, second]
    flips = iter([0, 1] + [rng.randrange(2) for _ in range(50)])

    def turn(line: str) -> str:
        tree = ast.parse(line)
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id == name:
                node.id = names[next(flips)]
        return ast.unparse(tree)

    rest = [line if line == END or line.startswith("with ") else turn(line) for line in program.lines[place:]]
    made = [f"{first} = {_of(one, name)}", _of(between, name), f"{second} = {_of(other, name)}"]
    program.lines[place:] = [*(line for line in made if line), *rest]
    return f"fork of {name}: {one} | {between} | {other}"


def _of(template: str, name: str) -> str:
    """A template with ``name`` for ``v``, which it may also assign to."""
    tree = ast.parse(template)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id == "v":
            node.id = name
    return ast.unparse(tree)


# --- writes -----------------------------------------------------------------------------------------------

_WRITES = (
    "v.mul_(1.5)",
    "v.add_(0.25)",
    "v.add_(v)",
    "v *= 1.5",
    "v += 0.25",
    "v -= 0.5",
    "v /= 3",
    "v //= 0.3",
    "v %= 0.7",
    "v **= 2",
    "v.neg_()",
    "v.zero_()",
    "v.fill_(0.5)",
    "v.copy_(v * 2)",
    "v.clamp_(-0.2, 0.4)",
    "v.relu_()",
    "F.relu(v, True)",
    "F.relu(v, inplace=True)",
    "F.relu(input=v, inplace=True)",
    "F.relu_(v)",
    "torch.relu_(v)",
    "F.relu6(v, True)",
    "F.silu(v, True)",
    "F.silu(v, inplace=True)",
    "F.mish(v, True)",
    "F.elu(v, 1.0, True)",
    "F.elu_(v)",
    "F.selu(v, True)",
    "F.celu(v, 1.0, True)",
    "F.hardtanh(v, -0.3, 0.4, True)",
    "F.hardswish(v, True)",
    "F.hardsigmoid(v, True)",
    "F.leaky_relu(v, 0.1, True)",
    "F.leaky_relu_(v)",
    "F.threshold(v, 0.1, 2.0, True)",
    "F.threshold_(v, 0.1, 2.0)",
    "F.dropout(v, 0.5, True, True)",
    "F.dropout(v, 0.5, inplace=True)",
    "F.alpha_dropout(v, 0.5, True, True)",
    "F.rrelu(v, 0.1, 0.3, False, True)",
    "torch.nn.ReLU(True)(v)",
    "v[0] = 2.0",
    "v[..., 0] = 0.3",
    "v[..., 1:] *= 2",
    "v[v > 0] = 0.1",
    "v[torch.tensor([0])] = 0.5",
    "v[..., 1:].mul_(2)",
    "v.view(-1)[0] = 9.0",
    "v.chunk(2, -1)[1].mul_(2)",
    "v.unbind(0)[0].zero_()",
    "v.split(1, 0)[0].add_(1)",
    "v.select(0, 0).fill_(1.0)",
    "v.transpose(0, -1).mul_(2)",
    "v.unsqueeze(0).mul_(2)",
    "v.expand_as(v).mul_(2)",
    "v.detach().mul_(2)",
    "v.data.mul_(2)",
    "v.as_strided((2,), (1,)).mul_(3)",
    "torch.mul(v, 1.5, out=v)",
    "torch.add(v, 1, out=v)",
    "torch.sigmoid(v, out=v)",
    "torch.neg(v, out=v.detach())",
    "torch.cumsum(v, -1, out=v)",
    "torch.sort(v.clone(), -1, out=(v, torch.empty_like(v, dtype=torch.int64)))",
    "torch.max(v.clone().unsqueeze(0), 0, out=(v, torch.empty_like(v, dtype=torch.int64)))",
    "torch.ops.aten.mul.out(v, v, out=v)",
    "torch.ops.aten.mul_.Tensor(v, v)",
    "torch.ops.aten.add_(v, 1)",
    "torch.Tensor.mul_(v, 2)",
    "operator.imul(v, 2)",
    "operator.iadd(v, 0.5)",
    "operator.imod(v, 0.7)",
    "operator.setitem(v, 0, 1.0)",
    "v.__imul__(2)",
    "v.__setitem__(0, 1.0)",
    "v.__imod__(0.7)",
    "torch.clamp_(v, -0.1, 0.1)",
    "torch.exp_(v)",
    "torch.square_(v)",
    "torch._foreach_mul_([v], 2.0)",
    "torch._foreach_add_((v,), 1.0)",
    "torch._foreach_copy_([v], [v * 2])",
    "v.index_fill_(-1, torch.tensor([0]), 3.0)",
    "v.masked_fill_(v > 0, 0.1)",
    "v.index_add_(0, torch.tensor([0]), v[:1].clone())",
    "v.index_copy_(0, torch.tensor([0]), v[1:2].clone())",
    "v.index_put_((torch.tensor([0]),), v[1].clone())",
    "torch.index_put_(v, (torch.tensor([0]),), v[1].clone())",
    "v.scatter_(-1, torch.zeros_like(v, dtype=torch.int64), 2.0)",
    "v.scatter_add_(-1, torch.zeros_like(v, dtype=torch.int64), v.clone())",
    "v.normal_()",
    "v.uniform_()",
    "v.bernoulli_()",
    "v.exponential_()",
    "v.random_(0, 3)",
    "v.lerp_(v * 2, 0.5)",
    "v.addcmul_(v, v)",
    "v.addcdiv_(v, v + 3)",
    "v.square_()",
    "v.sigmoid_()",
    "v.tanh_()",
    "v.pow_(2)",
    "v.floor_()",
    "v.cumsum_(-1)",
    "v.renorm_(2, 0, 0.5)",
    "v.copysign_(-v)",
    "v.nan_to_num_(0.0).add_(1)",
    "v.sub_(1).abs_()",
    "v.set_(v * 2)",
    "v.t_()",
    "v.transpose_(0, 1)",
    "v.unsqueeze_(0)",
    "v.resize_(2, 2)",
    "v.detach_()",
    "v.requires_grad_(False)",
    "torch.nn.init.ones_(v)",
    "torch.nn.init.normal_(v)",
    "F.batch_norm(torch.arange(16.0).view(2, 8).to(v.dtype), v, v.detach().clone().abs(), training=True)",
    "F.batch_norm(torch.arange(16.0).view(2, 8).to(v.dtype), v.new_zeros(8), v, None, None, True, 0.5)",
    "torch.batch_norm(torch.arange(16.0).view(2, 8).to(v.dtype), None, None, v, v.new_ones(8), True, 0.5, 1e-5, False)",
    "F.batch_norm(torch.arange(16.0).view(2, 8), v[0], v[1], training=True)",
    "F.instance_norm(torch.arange(48.0).view(2, 8, 3).to(v.dtype), v, v.new_ones(8), use_input_stats=True)",
    "F.embedding(torch.tensor([0, 1]), v, max_norm=0.1)",
    "F.embedding(torch.tensor([0, 1]), v, None, 0.1)",
    "torch.embedding_renorm_(v, torch.tensor([0, 1]), 0.1, 2.0)",
    "F.embedding_bag(torch.tensor([[0, 1]]), v, max_norm=0.1)",
    "torch.ops.userlib.scale_rows(v, v.new_full((v.shape[-1],), 2.0))",
    "torch.ops.userlib.accumulate(v, v * 2)",
    "torch.ops.jitk.fused_add_rmsnorm(v, v.clone(), v.new_ones(v.shape[-1]), 1e-5)",
    "torch.ops.jitk.rmsnorm.out(v.clone(), v.new_ones(v.shape[-1]), 1e-5, out=v)",
    "[part.mul_(2) for part in v.chunk(2, -1)]",
    "v.swapaxes_(0, 1)",
    "v.fill_diagonal_(2.0)",
    "v.put_(torch.tensor([0]), torch.tensor([3.0]).to(v.dtype))",
    "v.masked_scatter_(v > 0, v.neg())",
    "v.view(torch.int16).bitwise_and_(32512)",
    "v.view(torch.int16).zero_()",
    "v.erfinv_()",
    "torch.dropout_(v, 0.5, True)",
    "torch.feature_dropout_(v, 0.5, True)",
    "torch.celu_(v)",
    "torch.selu_(v)",
    "torch.utils._pytree.tree_map_(lambda t: t.mul_(2), [v])",
    "torch.addmm(v, v @ v.mT, v, out=v)",
    "torch.where(v > 0, v, v * 2, out=v)",
    "torch.cat([v[:1], v[1:] * 2], out=v)",
    "torch.stack([v[0], v[1]], out=v)",
    "torch.linalg.vector_norm(v, dim=-1, out=v[..., 0])",
    "torch.mean(v, -1, out=v[..., 0])",
)


def write(program: Program, rng: Rng) -> str:
    """Write an input, a weight, an intermediate value, or a part or an alias of one."""
    place = _point(program, rng)
    name = _pick(rng, sorted(_floats(program, place)))
    template = rng.choice(_WRITES)
    program.lines.insert(place, _of(template, name))
    return f"write: {program.lines[place]}"


def write_later(program: Program, rng: Rng) -> str:
    """Make an alias, and write it further on."""
    place = _point(program, rng)
    name = _pick(rng, sorted(_floats(program, place)))
    alias = program.fresh("alias")
    form = rng.choice(
        ["v.view(v.shape)", "v.detach()", "v[..., :]", "v.view(-1)", "v.T", "v.unbind(0)[0]", "v.chunk(2, -1)[0]"]
    )
    later = rng.randint(place, len(program.lines))
    template = rng.choice(_WRITES)
    program.lines.insert(later, _of(template, alias))
    program.lines.insert(place, f"{alias} = {_of(form, name)}")
    return f"write_later: {alias} = {_of(form, name)}; {_of(template, alias)}"


# --- values, types and views on the way ---------------------------------------------------------------------

_STEPS = (
    "v.float()",
    "v.half()",
    "v.bfloat16()",
    "v.double()",
    "v.to(torch.float32)",
    "v.half().float()",
    "v.to(torch.float8_e4m3fn).float()",
    "v.type(torch.bfloat16)",
    "v.detach()",
    "v.clone()",
    "v.contiguous()",
    "v.clone().detach()",
    "v.view(v.shape)",
    "v.reshape(v.shape)",
    "v.unsqueeze(0)",
    "v.squeeze()",
    "v.T",
    "v.mT",
    "v.transpose(0, -1)",
    "v.mT.contiguous().mT",
    "v.permute(*range(v.dim() - 1, -1, -1))",
    "v.flip(-1)",
    "v.flip(0)",
    "v.expand(2, *v.shape)",
    "v[:1]",
    "v[..., :1]",
    "v[:1].expand(v.shape)",
    "v[..., :1].expand(v.shape)",
    "v[0]",
    "v[::2]",
    "v[..., None]",
    "v.flatten()",
    "v.flatten(0, -2)",
    "v.neg()",
    "v * -1",
    "v.abs()",
    "v + 1",
    "v * 1",
    "v * 1.0",
    "v / 1",
    "v + 0",
    "v ** 1",
    "v * torch.tensor(2.0)",
    "v * torch.tensor(2.0, dtype=torch.float64)",
    "v * torch.tensor([2.0])",
    "v.as_strided(v.shape, v.stride())",
    "v.as_strided(v.shape, v.stride(), 1)",
    "F.dropout(v, 0.5, True)",
    "F.dropout(v, 0.5, False)",
    "F.dropout(v, 0.0, True)",
    "F.dropout(v, p=0.5, training=False)",
    "torch.randn_like(v)",
    "v + torch.randn_like(v)",
    "torch.zeros_like(v)",
    "torch.complex(v.float(), v.float()).real",
    "torch.view_as_real(torch.complex(v.float(), v.float()))[..., 0]",
    "torch.nn.Identity()(v)",
    "v.to('cpu')",
    "v.to(v)",
    "v.to(v.dtype, copy=True)",
    "v.type_as(v)",
    "v.to(memory_format=torch.contiguous_format)",
    "v.view_as(v)",
    "v.expand_as(v)",
    "v.to_sparse().to_dense()",
    "v.requires_grad_()",
    "v.sum(-1, keepdim=True)",
    "v.mean()",
    "v.clone().requires_grad_(False)",
    "torch.utils.checkpoint.checkpoint(torch.sin, v, use_reentrant=False)",
    "checkpoint(v)[0]",
    "checkpoint(v)[1]",
    "v.real",
    "v.conj()",
    "torch.neg(v)",
    "v.resolve_neg()",
    "v.tensor_split(2, -1)[0]",
    "v.unfold(-1, 8, 8)[..., 0, :]",
    "torch.nn.Parameter(v.detach())",
)


def step(program: Program, rng: Rng) -> str:
    """A value goes through one more step, for all uses of it behind some line, or for one."""
    place = _point(program, rng, max(len(program.lines) - 1, 0))
    known = sorted(_floats(program, place))
    name = _pick(rng, [name for name in known if any(name in uses(line) for line in program.lines[place:])])
    template = rng.choice(_STEPS)
    new = program.fresh("s")
    once = rng.random() < 0.5
    seen: list[int] = []

    def turn() -> bool:
        seen.append(1)
        return not once or len(seen) == 1

    for index in range(place, len(program.lines)):
        if program.lines[index] != END and not program.lines[index].startswith("with "):
            program.lines[index] = rename(program.lines[index], name, new, turn)
    program.lines.insert(place, f"{new} = {_of(template, name)}")
    return f"step: {program.lines[place]} ({'once' if once else 'from there on'})"


def share(program: Program, rng: Rng) -> str:
    """One value in the place of another."""
    index = _pick(rng, _assignments(program))
    read = sorted({name for name in uses(program.lines[index]) if name not in ("torch", "F", "math", "operator", "checkpoint")})
    old = _pick(rng, read)
    new = _pick(rng, sorted(set(_floats(program, index)) - {old}))
    before = program.lines[index]
    program.lines[index] = rename(before, old, new)
    return f"share: {before} with {new} for {old}"


_BYSTANDERS = (
    "e = v.to(torch.float8_e4m3fn)",
    "e = v.to(torch.float8_e5m2).float()",
    "e = torch.complex(v.float(), v.float())",
    "e = torch.view_as_complex(torch.stack([v.float(), v.float()], -1))",
    "e = torch.fft.fft(v.float())",
    "e = (v > 0) & (v < 1)",
    "e = operator.and_(v > 0, v < 1)",
    "e = operator.or_(v > 0, v < 1)",
    "e = v.argmax(-1)",
    "e = v.to(torch.int8)",
    "e = torch.func.vmap(lambda a: a.sum())(v)",
    "e = torch.func.vmap(torch.func.grad(lambda a: a.sin().sum()))(v)",
    "e = torch.func.vmap(F.silu)(v)",
    "e = torch.nonzero(v)",
    "e = v[v > 0]",
    "e = v.unique()",
    "e = v.numel() + v.shape[0]",
    "e = torch.quantize_per_tensor(v.float(), 0.1, 0, torch.qint8).dequantize()",
    "e = v.to_sparse().sum()",
    "e = torch.nested.nested_tensor([v, v]).sum()",
    "e = torch.nested.nested_tensor([v, v], layout=torch.jagged) * 2",
    "e = torch.cond(v.sum() > 0, lambda a: a * 2, lambda a: a * 3, (v,))",
    "e = F.silu(input=v)",
    "e = F.gelu(input=v)",
    "e = torch.mul(input=v, other=v)",
    "e = F.layer_norm(input=v, normalized_shape=v.shape[-1:])",
    "e = F.rms_norm(input=v, normalized_shape=v.shape[-1:])",
    "e = torch.add(v, v, alpha=2)",
    "e = v.dequantize()",
    "e = v.new_empty((0, 8)).sum()",
    "e = F.silu(v[:0]) * v[:0]",
    "e = torch.ones(0) * 2",
    "e = torch.tensor(2.0) * torch.tensor(3.0)",
    "e = F.silu(v.sum()) * v.sum()",
    "e = torch.cat([v, v], -1)",
    "e = v.mT @ v",
    "e = v.to(torch.complex64) * 1j",
    "e = torch.split(v, 3, -1)",
    "e = v.mean()",
    "e = v.mean(dtype=torch.float64)",
    "e = torch.pow(2, v)",
    "e = pow(v, v)",
    "e = v.chunk(2, dim=-1)[0]",
    "e = torch.chunk(input=v, chunks=2, dim=-1)[0]",
    "e = v.reciprocal()",
    "e = torch.reciprocal(input=v)",
    "e = v.to(dtype=torch.float64, copy=True)",
    "e = torch.mean(input=v, dim=-1)",
    "e = torch.pow(input=v, exponent=2)",
    "e = torch.pow(exponent=v, self=2.0)",
    "e = F.dropout(input=v, p=0.5, training=False)",
)


def bystander(program: Program, rng: Rng) -> str:
    """Something else is computed, and returned."""
    place = _point(program, rng)
    name = _pick(rng, sorted(_floats(program, place)))
    result = program.fresh("e")
    line = _of(rng.choice(_BYSTANDERS).removeprefix("e = "), name)
    program.lines.insert(place, f"{result} = {line}")
    program.results.append(result)
    return f"bystander: {line}"


def also(program: Program, rng: Rng) -> str:
    """Return a value of the way, or something that is computed from it."""
    known = sorted(_floats(program, len(program.lines)))
    name = _pick(rng, known)
    form = rng.choice(["v", "v", "v.view(-1)", "v * 2", "v.detach()", "v[..., :1]", "v.sum()"])
    program.results.insert(rng.randint(0, len(program.results)), _of(form, name) if form != "v" else name)
    return f"also: {program.results}"


def also_written(program: Program, rng: Rng) -> str:
    """Return a value of the way, and write it, or a part of it, at the end."""
    name = _pick(rng, sorted(_floats(program, len(program.lines))))
    program.lines.append(_of(rng.choice(_WRITES), name))
    program.results.append(name)
    return f"also_written: {program.lines[-1]}"


_REGIONS = (
    "torch.no_grad()",
    "torch.enable_grad()",
    "torch.inference_mode()",
    "torch.autocast('cpu', torch.bfloat16)",
    "torch.autocast('cpu', torch.float16)",
    "torch.autocast('cpu', enabled=False)",
    "torch.set_grad_enabled(False)",
    "torch.autograd.set_grad_enabled(True)",
    "torch.amp.autocast('cpu', torch.bfloat16)",
    "torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)",
    "torch.profiler.record_function('part')",
)


def region(program: Program, rng: Rng) -> str:
    """Some lines in a ``with`` block."""
    places = [index for index, line in enumerate(program.lines) if line != END and not line.startswith("with ")]
    first = _pick(rng, places)
    last = first
    while last + 1 < len(program.lines) and last + 1 in places and rng.random() < 0.7:
        last += 1
    header = f"with {rng.choice(_REGIONS)}:"
    program.lines.insert(last + 1, END)
    program.lines.insert(first, header)
    return f"region: {header} lines {first} to {last}"


# --- inputs -------------------------------------------------------------------------------------------------


def broadcast(program: Program, rng: Rng) -> str:
    """An argument of another shape."""
    given = _pick(rng, [given for given in program.inputs if given.view == "b" and not given.buffer])
    shape = given.shape
    rows = next((other.shape for other in program.inputs if len(other.shape) > 1), shape)
    forms = [(1,), (), (1, shape[-1]), (rows[-2], 1) if len(rows) > 1 else (1,), (*rows[:-1], shape[-1]), (1, *shape)]
    forms += [(*shape[:-1], 1), (2, *shape), (1,) * len(shape)]
    given.shape = rng.choice(forms)
    return f"broadcast: {given.name} {list(given.shape)}"


def retype(program: Program, rng: Rng) -> str:
    """An argument of another dtype."""
    given = _pick(rng, program.inputs)
    given.dtype = rng.choice([torch.float32, torch.bfloat16, torch.float16, torch.float64])
    return f"retype: {given.name} {given.dtype}"


def layout(program: Program, rng: Rng) -> str:
    """An argument with other strides."""
    given = _pick(rng, [given for given in program.inputs if given.view == "b" and not given.buffer])
    shape = given.shape
    forms: list[tuple[tuple[int, ...], str]] = [((*shape[:-1], 2 * shape[-1]), f"b[..., :{shape[-1]}]")]
    forms.append(((*shape[:-1], 2 * shape[-1]), "b[..., ::2]"))
    forms.append(((*shape[:-1], shape[-1] + 3), "b[..., 3:]"))
    if len(shape) > 1:
        forms.append(((*shape[:-2], shape[-1], shape[-2]), "b.mT"))
        forms.append(((*shape[:-2], 2 * shape[-2], shape[-1]), "b[..., ::2, :]"))
        forms.append(((1, *shape[1:]), f"b.expand({shape})"))
        forms.append((shape[-1:], f"b.expand({shape})"))
        forms.append(((*shape[:-1], 1), f"b.expand({shape})"))
    if len(shape) > 2:
        forms.append(((shape[1], shape[0], *shape[2:]), "b.transpose(0, 1)"))
        forms.append(((shape[0], shape[2], shape[1], *shape[3:]), "b.transpose(1, 2)"))
    given.shape, given.view = rng.choice(forms)
    return f"layout: {given.name} = {given.view} of {list(given.shape)}"


def overlap(program: Program, rng: Rng) -> str:
    """Two arguments in one buffer: the same, shifted, or side by side."""
    free = [given for given in program.inputs if given.view == "b" and not given.buffer]
    if len(free) < 2:
        raise Skip
    one, two = rng.sample(free, 2)
    if one.dtype != two.dtype:
        two.dtype = one.dtype
    total = max(_size(one.shape), _size(two.shape)) * 3
    shapes = one.shape, two.shape
    shift = rng.choice([0, 0, 1, shapes[0][-1] if shapes[0] else 1, _size(shapes[0])])
    for given, start in ((one, 0), (two, shift)):
        size = _size(given.shape)
        given.view = f"b[{start}:{start + size}].view({given.shape})"
        given.shape, given.buffer, given.kind = (total,), "shared", one.kind
    return f"overlap: {one.name} and {two.name}, shifted by {shift}"


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for dim in shape:
        size *= dim
    return size


def sizes(program: Program, rng: Rng) -> str:
    """Numbers beyond fp16."""
    given = _pick(rng, [given for given in program.inputs if given.kind == "rows"])
    given.kind = "wide"
    return f"sizes: {given.name} is large"


# --- rotary embeddings --------------------------------------------------------------------------------------

_ANGLES = (
    "v.unsqueeze(2)",
    "v.unsqueeze(0)",
    "v.unsqueeze(-2)",
    "v[:, None].transpose(1, 2)",
    "v[:, :1].unsqueeze(1)",
    "v[:1].unsqueeze(1)",
    "v[..., :1].unsqueeze(1)",
    "v.flip(1).unsqueeze(1)",
    "v.flip(-1).unsqueeze(1)",
    "v.transpose(0, 1).unsqueeze(1)",
    "v.unsqueeze(1).expand(-1, 2, -1, -1)",
    "v.unsqueeze(1).expand(2, -1, -1, -1)",
    "v.unsqueeze(1).squeeze(0)",
    "v[0]",
    "v[0, 0]",
    "v.unsqueeze(1).repeat_interleave(2, -1)[..., ::2]",
    "v.unsqueeze(1)[..., : v.shape[-1] // 2].repeat_interleave(2, -1)",
    "v.unsqueeze(1)[..., : v.shape[-1] // 2].repeat(1, 1, 1, 2)",
    "torch.cat((v[..., :2], v[..., 2:]), -1).unsqueeze(1)",
    "v.unsqueeze(1).double()",
    "v.float().unsqueeze(1)",
    "v.unsqueeze(1).detach()",
)
_OF_ANGLES = ("-{v}", "{v} * 1.0", "{v}.flip(2)", "{v}.flip(-1)", "{v}.roll(1, -1)", "{v}[..., :1]", "{v}[:, :, :1]", "{v} + 1")
_OF_ANGLES += ("{v}.clone()", "{v}.detach()", "{v}.transpose(1, 2)", "{v}.float()", "{v}[:1]", "{v}.expand(2, -1, -1, -1)")
_PARTS = ("-{v}", "{v}.neg().neg()", "{v}.flip(-1)", "{v}.roll(1, -1)", "{v}.abs()", "{v} * 1", "{v}.clone()", "{v}.detach()")
_BETWEEN_TWO = (
    "{v} = {v} * 2",
    "{v} = {v} + {y}.mean()",
    "{v} = {v} + {y}[:, :1]",
    "early = {y} * 2",
    "{y}.mul_(2)",
    "{v}.add_(1)",
)
_BETWEEN_TWO += ("c = c * 2", "s = s.clone()", "c = c + {y}.mean()", "early = {y}.view(-1)", "early = {y}.detach()", "c.neg_()")


def turn(program: Program, rng: Rng) -> str:
    """A rotation by other angles, of other pairs, or with something between that of queries and that of keys."""
    if program.op != "jitk::rope_qk" or not {"y", "z"} <= {name for line in program.lines for name in targets(line)}:
        raise Skip
    kind = rng.choice(["angles", "angle", "part", "pair", "between", "between", "results", "third", "same"])
    if kind == "angles":
        index = _pick(rng, [i for i, line in enumerate(program.lines) if set(targets(line)) & {"c", "s"}])
        program.lines[index] = f"{targets(program.lines[index])[0]} = {_of(rng.choice(_ANGLES), rng.choice(['cos', 'sin']))}"
        return f"turn: {program.lines[index]}"
    if kind in ("angle", "part", "same"):
        names = ["c", "s"] if kind != "part" else ["qa", "qb", "ka", "kb", "qo", "ko", "qwa", "kwb", "qwo"]
        index = _pick(rng, [i for i, line in enumerate(program.lines) if set(uses(line)) & set(names)])
        old = rng.choice(sorted(set(uses(program.lines[index])) & set(names)))
        form = rng.choice(_PARTS if kind == "part" else _OF_ANGLES)
        new = program.fresh("turned")
        program.lines[index] = rename(program.lines[index], old, new)
        program.lines.insert(index, f"{new} = {form.format(v=old) if kind != 'same' else {'c': 's', 's': 'c'}[old]}")
        return f"turn: {program.lines[index]}"
    if kind == "pair":
        index = _pick(rng, [i for i, line in enumerate(program.lines) if "stack(" in line or "cat(" in line])
        tree = ast.parse(program.lines[index])
        parts = next(node for node in ast.walk(tree) if isinstance(node, (ast.Tuple, ast.List)) and len(node.elts) == 2)
        parts.elts = rng.choice([parts.elts[::-1], parts.elts[:1] * 2, parts.elts[1:] * 2])
        before, program.lines[index] = program.lines[index], ast.unparse(tree)
        return f"turn: {before}"
    if kind == "results":
        program.results = rng.choice(
            [["y"], ["z"], ["y", "y"], ["z", "y"], ["y + 1", "z"], ["y.mT @ y", "z"], ["y", "z", "q", "k"]]
        )
        return f"turn: {program.results}"
    made = [index for index, line in enumerate(program.lines) if set(targets(line)) & {"y", "z"}]
    if kind == "third":
        name = rng.choice(["q", "k"])
        y = {"q": "y", "k": "z"}[name]
        lines = [line for line in program.lines if any(t.startswith(name) or t == y for t in targets(line)) or "t" in line[:1]]
        copies = [_renamed(line, name, y, [target for each in lines for target in targets(each)]) for line in lines]
        program.lines += [f"third_{name} = {name} * 2", *copies]
        program.results.append(f"third_{y}")
        return f"turn: a third one, of {name}"
    y = next(name for name in targets(program.lines[made[0]]) if name in ("y", "z"))
    program.lines.insert(made[0] + 1, rng.choice(_BETWEEN_TWO).format(y=y, v={"y": "k", "z": "q"}[y]))
    if program.lines[made[0] + 1].startswith("early"):
        program.results.append("early")
    return f"turn: {program.lines[made[0] + 1]}"


def _renamed(line: str, name: str, result: str, made: Sequence[str]) -> str:
    tree = ast.parse(line)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and (node.id in (name, result) or node.id in made):
            node.id = f"third_{node.id}"
    return ast.unparse(tree)


# --- around the program ---------------------------------------------------------------------------------------


def inner(program: Program, rng: Rng) -> str:
    if program.transform:
        raise Skip
    program.transform = rng.choice(sorted(TRANSFORMS))
    return f"inner: {program.transform}"


def outer(program: Program, rng: Rng) -> str:
    program.outside = rng.choice(["no_grad", "no_grad", "inference", "autocast", "jvp", "dual", "grad", "vmap"])
    program.grad = program.grad and program.outside not in ("inference", "jvp", "dual", "grad", "vmap")
    return f"outer: {program.outside}"


def dynamic(program: Program, rng: Rng) -> str:
    program.dynamic = rng.choice([True, True, False])
    return f"dynamic: {program.dynamic}"


def gradient(program: Program, rng: Rng) -> str:
    if program.outside:
        raise Skip
    program.grad = not program.grad
    return f"gradient: {program.grad}"


# The name, and how often it is taken.
MUTATIONS: dict[str, tuple[Mutation, int]] = {
    "swap": (swap, 3),
    "constant": (constant, 4),
    "keyword": (keyword, 5),
    "in_place": (in_place, 3),
    "halves": (halves, 6),
    "source": (source, 6),
    "fork": (fork, 12),
    "write": (write, 10),
    "write_later": (write_later, 4),
    "step": (step, 8),
    "share": (share, 3),
    "bystander": (bystander, 4),
    "also": (also, 3),
    "also_written": (also_written, 2),
    "region": (region, 5),
    "broadcast": (broadcast, 3),
    "retype": (retype, 3),
    "layout": (layout, 4),
    "overlap": (overlap, 3),
    "sizes": (sizes, 1),
    "turn": (turn, 8),
    "inner": (inner, 5),
    "outer": (outer, 4),
    "dynamic": (dynamic, 3),
    "gradient": (gradient, 3),
}
