"""Programs that ``fuse`` once got wrong, each as small as it could be made."""

from __future__ import annotations

import torch
from fuse_program import Input, Program

_HALF = {"x": (3, 16)}
_TWO = {"g": (3, 8), "u": (3, 8)}
_STACK = {"z": (2, 3, 8)}
_NORM = {"x": (3, 8), "w": (8,)}

KEPT: dict[str, Program] = {}


def _keep(
    name: str,
    shapes: dict[str, tuple[int, ...]],
    text: str,
    results: str = "y",
    dtype: torch.dtype = torch.float32,
    **facts: object,
) -> None:
    inputs = [Input(key, shape, dtype, "weight" if key in "wb" else "rows") for key, shape in shapes.items()]
    lines = [line.strip() for line in text.strip().splitlines()]
    KEPT[name] = Program("", inputs, lines, results.split(), seed=len(KEPT), **facts)


for _name, _call in {
    "unbind": "z.unbind(0)",
    "unbind_overload": "torch.ops.aten.unbind.int(z, 0)",
    "movedim": "torch.movedim(z, 0, -1).unbind(-1)",
    "vsplit": "torch.vsplit(z, 2)",
    "var_mean": "torch.var_mean(z, 0)",
    "aminmax": "torch.aminmax(z, dim=0)",
    "broadcast_tensors": "torch.broadcast_tensors(z[0], z[1])",
    "broadcast_to_another_shape": "torch.broadcast_tensors(z[1], z[0, :1])",
    "cummax": "z.cummax(0)[0].unbind(0)",
    "checkpoint": "checkpoint(z[0])",
    "custom_op": "torch.ops.userlib.split_sign(z[0])[0], torch.ops.userlib.split_sign(z[0])[1].float()",
    "topk": "z.topk(2, 0)[0].unbind(0)",
    "draws": "torch.randn_like(z[0]), torch.randn_like(z[0])",
    "dropouts": "F.dropout(z[0], 0.5, True), F.dropout(z[0], 0.5, True)",
    "normals": "torch.normal(z[0], 1.0), torch.normal(z[0], 1.0)",
}.items():
    _keep(f"results_of_{_name}", _STACK, f"g, u = {_call}\ny = F.silu(g) * u")
    _keep(f"swapped_results_of_{_name}", _STACK, f"u, g = {_call}\ny = F.gelu(g) * u", grad=True)

for _name, _pair in {
    "unbind": "x.unflatten(-1, (2, -1)).unbind(-2)",
    "hsplit": "torch.hsplit(x, 2)",
    "two_topk": "x.topk(8, -1)[0], x.topk(8, -1, largest=False)[0]",
    "first_twice": "x[..., :8], x[..., :8]",
    "offset": "x.as_strided((2, 8), (16, 1), 1), x.as_strided((2, 8), (16, 1), 9)",
    "interleaved": "x[..., ::2], x[..., 1::2]",
}.items():
    _keep(f"halves_by_{_name}", _HALF, f"g, u = {_pair}\ny = F.silu(g) * u")
_keep(
    "halves_by_index",
    {"x": (16,)},
    """g = x[torch.tensor([3, 1, 15, 0, 2, 8, 9, 4])]
    u = x[torch.tensor([5, 1, 15, 0, 2, 8, 9, 4])]
    y = F.silu(g) * u""",
)

for _name, (_one, _other) in {
    "draws": ("torch.randn_like(x)", "torch.randn_like(x)"),
    "clamps": ("x.clamp(None, 0.3)", "x.clamp(0.3)"),
    "wheres": ("torch.where(x > 0, x, 0.5)", "torch.where(x > 0, 0.5, x)"),
    "powers": ("torch.pow(x, 3.0)", "torch.pow(3.0, x)"),
    "extremes": ("x + torch.aminmax(x, dim=-1, keepdim=True)[0]", "x + torch.aminmax(x, dim=-1, keepdim=True)[1]"),
    "values_and_indices": ("torch.sort(x, -1)[0]", "torch.sort(x, -1)[1].to(x.dtype)"),
    "checkpoints": ("checkpoint(x)[0]", "checkpoint(x)[1]"),
    "negations": ("x - 1", "1 - x"),
    "true_and_one": ("x * 2", "x * 2.5"),
}.items():
    _keep(
        f"two_{_name}_for_one",
        _NORM,
        f"""a = {_one}
        c = {_other}
        y = a * torch.rsqrt(c.pow(2).mean(-1, keepdim=True) + 1e-06) * w""",
    )

_keep(
    "power_the_other_way",
    _TWO,
    """act = 0.5 * g * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (g + 0.044715 * torch.pow(3.0, g))))
    y = act * u""",
)
_keep(
    "remainder_in_place_is_lost",
    _TWO,
    """a = g.masked_fill(g > 0, 0.5)
    g %= 0.7
    c = g.masked_fill(g > 0, 0.25)
    wide = a.float()
    act = (torch.sigmoid(wide) * wide).type_as(c)
    y = u * act""",
)
_keep("keyword_silu", _NORM, "y = F.silu(input=x) * w")
_keep("keyword_gelu", _TWO, "y = F.gelu(input=g) * u")
_keep("keyword_mul", _TWO, "y = torch.mul(input=F.silu(g), other=u)")
_keep("float8", _TWO, "e = u.to(torch.float8_e4m3fn)\ny = F.silu(g) * u", "y e.float()")
_keep("within_vmap", _HALF, "g, u = x.chunk(2, -1)\ny = F.silu(g) * u", transform="vmap")
_keep("within_vmap_of_grad", _HALF, "g, u = x.chunk(2, -1)\ny = F.silu(g) * u", transform="vmap_grad")
_keep("within_jvp", _HALF, "g, u = x.chunk(2, -1)\ny = F.silu(g) * u", transform="jvp")
_keep("under_jvp", _TWO, "y = F.silu(g) * u", outside="jvp")
_keep("under_dual_level", _NORM, "y = F.rms_norm(x, (8,), w, 1e-05)", outside="dual")
_keep(
    "added_within_vmap",
    {"p": (2, 3, 8), "q": (2, 3, 8), "w": (8,)},
    """s = p * 2 + q * 0.5
    y = F.rms_norm(s, (8,), w, 1e-05)""",
    "y s",
    transform="vmap",
)
_keep(
    "embedding_with_max_norm",
    _NORM,
    """wide = x.clone()
    v = wide.pow(2).mean(-1, keepdim=True) + 1e-06
    F.embedding(torch.tensor([0, 1]), wide, None, 0.1)
    y = wide * torch.rsqrt(v) * w""",
)
_keep(
    "running_statistics",
    _NORM,
    """v = x.pow(2).mean(-1, keepdim=True) + 1e-06
    F.batch_norm(torch.arange(16.0).view(2, 8), x[0], x[1], training=True)
    y = x * torch.rsqrt(v) * w""",
)
_keep(
    "argument_written_behind",
    _TWO,
    """wide = g.float()
    act = (torch.sigmoid(wide) * wide).type_as(g)
    y = act * u
    g.mul_(2)""",
    "y g",
    torch.bfloat16,
    grad=True,
)
