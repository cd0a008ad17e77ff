"""Programs that are what an op does, in the words that models use for it: each must get its op."""

from __future__ import annotations

from collections.abc import Callable

import torch
from fuse_program import Input, Program, Rng, flatten

Make = Callable[[Rng], Program]

_DTYPES = (torch.float32, torch.float32, torch.float32, torch.bfloat16, torch.bfloat16, torch.float16)


def _shape(rng: Rng, width: int) -> tuple[int, ...]:
    return rng.choice([(3, width), (3, width), (2, 3, width), (2, 2, 3, width)])


def _mul(rng: Rng, a: str, b: str) -> str:
    return rng.choice(["{a} * {b}", "{b} * {a}", "torch.mul({a}, {b})", "{a}.mul({b})", "torch.multiply({b}, {a})"]).format(
        a=f"({a})", b=f"({b})"
    )


def _add(rng: Rng, a: str, b: str) -> str:
    return rng.choice(["{a} + {b}", "{b} + {a}", "torch.add({a}, {b})", "{b}.add({a})"]).format(a=f"({a})", b=f"({b})")


def _wide(rng: Rng, x: str) -> str:
    return f"({x})" + rng.choice([".float()", ".to(torch.float32)", ".to(dtype=torch.float32)"])


def _like(rng: Rng, x: str, other: str) -> str:
    return f"({x})" + rng.choice([f".to({other}.dtype)", f".type_as({other})", f".to(dtype={other}.dtype)"])


def _square(rng: Rng, x: str) -> str:
    return rng.choice(["{x}.pow(2)", "{x} ** 2", "{x} * {x}", "torch.square({x})", "{x}.square()", "torch.pow({x}, 2)"]).format(
        x=x
    )


def _mean(rng: Rng, x: str) -> str:
    return rng.choice(
        ["({x}).mean(-1, keepdim=True)", "torch.mean({x}, dim=-1, keepdim=True)", "({x}).mean((-1,), True)"]
    ).format(x=x)


def _normal(rng: Rng, x: str, eps: str) -> str:
    """``x`` over its root mean square."""
    added = rng.choice(["{m} + {e}", "{e} + {m}", "torch.add({m}, {e})", "{m}.add({e})"])
    inside = added.format(m=_mean(rng, _square(rng, x)), e=eps)
    if rng.random() < 0.25:
        return f"{x} / torch.sqrt({inside})"
    inverse = rng.choice(["torch.rsqrt({e})", "({e}).rsqrt()", "torch.pow({e}, -0.5)", "1 / torch.sqrt({e})", "({e}) ** -0.5"])
    return _mul(rng, x, inverse.format(e=inside))


def _activation(rng: Rng, kind: str, x: str) -> str:
    spelled = {
        "silu": ["F.silu({x})", "F.silu({x})", "{x} * torch.sigmoid({x})", "{x}.sigmoid() * {x}", "torch.sigmoid({x}) * {x}"],
        "gelu": ["F.gelu({x})", "F.gelu({x}, approximate='none')", "torch.nn.functional.gelu({x})"],
        "gelu_tanh": [
            "F.gelu({x}, approximate='tanh')",
            "0.5 * {x} * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * ({x} + 0.044715 * torch.pow({x}, 3.0))))",
        ],
    }
    return rng.choice(spelled[kind]).format(x=x)


def _gate(rng: Rng, kind: str, gate: str, up: str) -> str:
    """Lines that end with ``y``."""
    form = rng.randrange(4)
    if form == 1:
        return (
            f"wide = {_wide(rng, gate)}\nact = {_activation(rng, kind, 'wide')}\n"
            f"y = {_like(rng, _mul(rng, 'act', _wide(rng, up)), gate)}"
        )
    if form == 2:
        return (
            f"wide = {_wide(rng, gate)}\nact = {_like(rng, _activation(rng, kind, 'wide'), gate)}\ny = {_mul(rng, 'act', up)}"
        )
    return f"act = {_activation(rng, kind, gate)}\ny = {_mul(rng, 'act', up)}"


def _halves(rng: Rng, width: int) -> str:
    return rng.choice(
        [
            "g, u = x.chunk(2, -1)",
            "g, u = x.chunk(2, dim=-1)",
            "g, u = torch.chunk(x, 2, x.dim() - 1)",
            f"g = x[..., :{width}]\nu = x[..., {width}:]",
            f"g, u = x.split({width}, dim=-1)",
            f"g, u = torch.split(x, [{width}, {width}], -1)",
            "g, u = x.tensor_split(2, -1)",
            f"g = x.narrow(-1, 0, {width})\nu = x.narrow(-1, {width}, {width})",
        ]
    )


def _of_halves(kind: str) -> Make:
    def make(rng: Rng) -> Program:
        x = Input("x", _shape(rng, 16) if rng.random() < 0.9 else (16,), rng.choice(_DTYPES))
        text = f"{_halves(rng, 8)}\n{_gate(rng, kind, 'g', 'u')}"
        return Program(f"jitk::{kind}_and_mul", [x], flatten(text), ["y"])

    return make


def _of_two(kind: str) -> Make:
    def make(rng: Rng) -> Program:
        shape, dtype = _shape(rng, 8), rng.choice(_DTYPES)
        return Program(
            f"jitk::{kind}_mul",
            [Input("g", shape, dtype), Input("u", shape, dtype)],
            flatten(_gate(rng, kind, "g", "u")),
            ["y"],
        )

    return make


def _eps(rng: Rng) -> str:
    return rng.choice(["1e-6", "1e-5", "1e-3"])


def _norm(rng: Rng, op: str, x: str, eps: str, shape: tuple[int, ...], fp32_weight: bool) -> str:
    """Lines that end with ``y``."""
    width = shape[-1]
    if op == "gemma":
        scale = rng.choice(["(1.0 + w.float())", "(w.float() + 1)"])
        return f"wide = {_wide(rng, x)}\ny = {_like(rng, _mul(rng, _normal(rng, 'wide', eps), scale), x)}"
    if op == "layernorm":
        if rng.random() < 0.5 and not fp32_weight:
            return rng.choice(
                [
                    f"y = F.layer_norm({x}, ({width},), w, b, {eps})",
                    f"y = torch.layer_norm({x}, ({width},), w, b, eps={eps})",
                    f"y = F.layer_norm({x}, [{width}], weight=w, bias=b, eps={eps})",
                ]
            )
        centred = f"wide = {_wide(rng, x)}\nc = wide - {_mean(rng, 'wide')}\nn = {_normal(rng, 'c', eps)}\n"
        return centred + f"y = {_like(rng, 'n * w + b', x)}"
    if fp32_weight:
        return f"wide = {_wide(rng, x)}\ny = {_like(rng, _mul(rng, _normal(rng, 'wide', eps), 'w.float()'), x)}"
    form = rng.randrange(5)
    if form == 0:
        return f"y = F.rms_norm({x}, ({width},), w, {eps})"
    if form == 1:
        return f"y = {_mul(rng, _normal(rng, x, eps), 'w')}"
    if form == 2:
        return f"wide = {_wide(rng, x)}\ny = {_like(rng, _mul(rng, _normal(rng, 'wide', eps), 'w.float()'), x)}"
    return f"wide = {_wide(rng, x)}\nn = {_like(rng, _normal(rng, 'wide', eps), x)}\ny = {_mul(rng, 'n', 'w')}"


def _weights(rng: Rng, op: str, width: int, dtype: torch.dtype) -> tuple[list[Input], bool]:
    wide = dtype != torch.float32 and rng.random() < 0.2
    weight_dtype = torch.float32 if wide else dtype
    weights = [Input("w", (width,), weight_dtype, "weight")]
    return weights + ([Input("b", (width,), weight_dtype, "bias")] if op == "layernorm" else []), wide


def _norms(op: str, name: str) -> Make:
    def make(rng: Rng) -> Program:
        shape, dtype = _shape(rng, 8), rng.choice(_DTYPES)
        weights, wide = _weights(rng, op, 8, dtype)
        lines = flatten(_norm(rng, op, "x", _eps(rng), shape, wide))
        return Program(name, [Input("x", shape, dtype), *weights], lines, ["y"])

    return make


def _added(op: str, name: str) -> Make:
    def make(rng: Rng) -> Program:
        shape, dtype = _shape(rng, 8), rng.choice(_DTYPES)
        weights, wide = _weights(rng, op, 8, dtype)
        text = f"h = p * 2\nr = q * 0.5\ns = {_add(rng, 'r', 'h')}\n{_norm(rng, op, 's', _eps(rng), shape, wide)}"
        return Program(name, [Input("p", shape, dtype), Input("q", shape, dtype), *weights], flatten(text), ["y", "s"])

    return make


def _relu2(rng: Rng) -> Program:
    text = rng.choice(["y = F.relu(x).square()", "y = torch.square(F.relu(x))", "y = F.relu(x).pow(2)"])
    return Program("jitk::relu2", [Input("x", _shape(rng, 8), rng.choice(_DTYPES))], flatten(text), ["y"])


def _add_relu(rng: Rng) -> Program:
    shape, dtype = _shape(rng, 8), rng.choice(_DTYPES)
    inputs = [Input("x", shape, dtype), Input("z", shape, dtype)]
    return Program("jitk::fused_add_relu", inputs, flatten(f"y = F.relu({_add(rng, 'x', 'z')})"), ["y"])


def _affine(rng: Rng) -> Program:
    shape = _shape(rng, 8)
    inputs = [Input("x", shape, torch.float32), Input("w", (8,), torch.float32, "weight")]
    text = f"y = {rng.choice(['0.5', '3.0'])} * x * w"
    if rng.random() < 0.5:
        inputs.append(Input("b", (8,), torch.float32, "bias"))
        text += " + b"
    return Program("userlib::affine", inputs, flatten(text), ["y"])


def _part(rng: Rng, x: str, first: int, last: int, width: int) -> str:
    start, stop = first or rng.choice(["", "0"]), last if last < width else rng.choice(["", str(width)])
    return rng.choice([f"{x}[..., {start}:{stop}]", f"{x}.narrow(-1, {first}, {last - first})"])


def _turned(rng: Rng, x: str, made: str, width: int, turning: int, is_neox: bool, total: str) -> str:
    """Lines that turn ``x`` by ``c`` and ``s``. The first summand decides in which order dimensions lie in ``total``."""
    lines, part = [], x
    if turning < width:
        lines, part = [f"{x}t = {_part(rng, x, 0, turning, width)}"], f"{x}t"
    half = turning // 2
    pairs = [f"{x}a = {_part(rng, part, 0, half, turning)}\n{x}b = {_part(rng, part, half, turning, turning)}"]
    pairs += [f"{x}a, {x}b = {part}.chunk(2, dim=-1)", f"{x}a, {x}b = {part}.split({half}, -1)"]
    if not is_neox:
        pairs = [f"{x}a = {part}[..., 0::2]\n{x}b = {part}[..., 1::2]", f"{x}a = {part}[..., ::2]\n{x}b = {part}[..., 1::2]"]
    negative = rng.choice([f"-{x}b", f"{x}b.neg()", f"torch.neg({x}b)"])
    both = rng.choice([f"({negative}, {x}a)", f"[{negative}, {x}a]"])
    other = f"torch.cat({both}, dim=-1)" if is_neox else f"torch.stack({both}, dim=-1).flatten(-2)"
    lines += [rng.choice(pairs), f"{x}o = {other}"]
    turned = total.format(a=_mul(rng, part, "c"), b=_mul(rng, f"{x}o", "s"))
    if turning == width:
        return "\n".join([*lines, f"{made} = {turned}"])
    rest = rng.choice(["({t}, {r})", "[{t}, {r}]"]).format(t=turned, r=_part(rng, x, turning, width, width))
    return "\n".join([*lines, f"{made} = torch.cat({rest}, dim=-1)"])


def _rope(rng: Rng) -> Program:
    """Of queries and keys as they come from a projection, or with heads ahead of tokens in memory, too."""
    dtype, is_neox = rng.choice(_DTYPES), rng.random() < 0.7
    batch, heads, tokens, width = rng.choice([1, 2]), rng.choice([2, 3, 4]), rng.choice([1, 3, 3]), 8
    kv_heads, turning = rng.choice([1, heads]), rng.choice([8, 8, 4, 6])
    transposed = rng.random() < 0.6
    inputs = []
    for name, count in (("q", heads), ("k", kv_heads)):
        shape = (batch, tokens, count, width) if transposed else (batch, count, tokens, width)
        inputs.append(Input(name, shape, dtype))
    inputs += [Input(name, (rng.choice([1, batch]), tokens, turning), dtype) for name in ("cos", "sin")]
    one = rng.choice(["{x}.unsqueeze(1)", "{x}.unsqueeze(-3)", "{x}[:, None]", "torch.unsqueeze({x}, 1)", "{x}[:, None, :, :]"])
    angles = [f"c = {one.format(x='cos')}", f"s = {one.format(x='sin')}"]
    heads_ahead = ["q = q.transpose(1, 2)", "k = k.transpose(1, 2)"] if transposed else []
    total = rng.choice(["({a}) + ({b})", "({b}) + ({a})", "torch.add({a}, {b})", "({b}).add({a})"])
    turn = _in_fp32 if rng.random() < 0.2 else _turned
    lines = [turn(rng, x, made, width, turning, is_neox, total) for x, made in (("q", "y"), ("k", "z"))]
    ahead = [*angles, *heads_ahead]
    text = "\n".join([*rng.sample(ahead, len(ahead)), *rng.sample(lines, 2)])
    return Program("jitk::rope_qk", inputs, flatten(text), ["y", "z"])


def _in_fp32(rng: Rng, x: str, made: str, width: int, turning: int, is_neox: bool, total: str) -> str:
    text = _turned(rng, f"{x}w", f"{made}w", width, turning, is_neox, total)
    return f"{x}w = {_wide(rng, x)}\n{text}\n{made} = {_like(rng, made + 'w', x)}"


SPELLINGS: dict[str, Make] = {
    "jitk::rope_qk": _rope,
    "jitk::silu_and_mul": _of_halves("silu"),
    "jitk::gelu_and_mul": _of_halves("gelu"),
    "jitk::gelu_tanh_and_mul": _of_halves("gelu_tanh"),
    "jitk::silu_mul": _of_two("silu"),
    "jitk::gelu_mul": _of_two("gelu"),
    "jitk::gelu_tanh_mul": _of_two("gelu_tanh"),
    "jitk::rmsnorm": _norms("rms", "jitk::rmsnorm"),
    "jitk::gemma_rmsnorm": _norms("gemma", "jitk::gemma_rmsnorm"),
    "jitk::layernorm": _norms("layernorm", "jitk::layernorm"),
    "jitk::fused_add_rmsnorm": _added("rms", "jitk::fused_add_rmsnorm"),
    "jitk::gemma_fused_add_rmsnorm": _added("gemma", "jitk::gemma_fused_add_rmsnorm"),
    "jitk::relu2": _relu2,
    "jitk::fused_add_relu": _add_relu,
    "userlib::affine": _affine,
}
