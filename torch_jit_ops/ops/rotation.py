"""What the ops of rotary position embedding have in common: the formula, what arguments must be, and angles of positions."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_jit_ops.ops.indices import in_range


def wide(x: Tensor) -> Tensor:
    """fp32 of a half type; fp32 and fp64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def partners(x: Tensor, is_neox: bool) -> Tensor:
    """In the place of each element the other one of its pair, negative where that is the second."""
    if is_neox:
        first, second = x.chunk(2, -1)
        return torch.cat((-second, first), -1)
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def turned(x: Tensor, cos: Tensor, sin: Tensor, is_neox: bool) -> Tensor:
    """``cos`` and ``sin`` have an entry for each element; what is behind the last of them passes through."""
    rope_dim = cos.shape[-1]
    turning = wide(x.narrow(-1, 0, rope_dim))  # not by an index: of all elements that is an alias, which vmap refuses
    turning = turning * cos + partners(turning, is_neox) * sin
    return torch.cat((turning.to(x.dtype), x.narrow(-1, rope_dim, x.shape[-1] - rope_dim)), -1)


def normed(x: Tensor, weight: Tensor, eps: float, gemma: bool) -> Tensor:
    """Not rounded."""
    values = wide(x)
    scale = torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)
    return values * scale * (wide(weight) + 1 if gemma else weight)


# --- what arguments must be -----------------------------------------------------------------------


def require(condition: bool | torch.SymBool, text: str, error: type[Exception] = ValueError) -> None:
    if isinstance(condition, torch.SymBool):  # of sizes that only running tells: the graph checks it then
        torch._check(condition, lambda: text)
    elif not condition:
        raise error(text)


def check_rope_dim(rope_dim: int, head_dim: int) -> None:
    if rope_dim % 2 != 0 or rope_dim > head_dim:
        raise ValueError(f"rope_dim must be even and at most head_dim, {head_dim}, got {rope_dim}")


def in_heads(name: str, x: Tensor, head_dim: int) -> Tensor:
    """A view with the shape ``[tokens, heads, head_dim]``."""
    if x.dim() == 3:
        return x
    if x.dim() != 2:
        raise ValueError(f"{name} must have 3 dimensions, or 2 if heads lie side by side, got {list(x.shape)}")
    if head_dim <= 0 or x.shape[1] % head_dim != 0:
        raise ValueError(f"{name} has rows of {x.shape[1]} elements, which are no heads of {head_dim}")
    return x.view(x.shape[0], x.shape[1] // head_dim, head_dim)


def _check_positions(positions: Tensor, tokens: int, cos_sin_cache: Tensor, mrope_section: list[int] | None) -> None:
    if positions.dim() not in (1, 2) or (positions.dim() == 2) != (mrope_section is not None):
        wanted = "[tokens]" if mrope_section is None else "[3, tokens], as mrope_section is given"
        raise ValueError(f"positions must be {wanted}, got {list(positions.shape)}")
    if mrope_section is not None:
        half = cos_sin_cache.shape[1] // 2
        require(
            positions.shape[0] == 3, f"positions must be [3, tokens], as mrope_section is given, got {list(positions.shape)}"
        )
        if len(mrope_section) != 3 or min(mrope_section) < 0 or sum(mrope_section) != half:
            raise ValueError(f"mrope_section must be 3 numbers whose sum is rope_dim / 2, {half}, got {list(mrope_section)}")
    require(positions.shape[-1] == tokens, f"positions are of {positions.shape[-1]} tokens, the first argument has {tokens}")


def checked_heads(
    given: dict[str, Tensor], cos_sin_cache: Tensor, positions: Tensor, head_dim: int, mrope_section: list[int] | None
) -> list[Tensor]:
    """The tensors that turn, with a dimension of heads."""
    if cos_sin_cache.dim() != 2 or cos_sin_cache.shape[1] % 2 != 0:
        raise ValueError(
            f"cos_sin_cache must be [max_position, rope_dim] with an even rope_dim, got {list(cos_sin_cache.shape)}"
        )
    rope_dim = cos_sin_cache.shape[1]
    heads = [in_heads(name, x, head_dim or rope_dim) for name, x in given.items()]
    tokens = heads[0].shape[0]
    for name, x in zip(given, heads, strict=True):
        require(x.shape[0] == tokens, f"{name} has {x.shape[0]} tokens, the first argument has {tokens}")
        if head_dim > 0:
            require(x.shape[2] == head_dim, f"{name} has heads of {x.shape[2]} elements, head_dim is {head_dim}")
        check_rope_dim(rope_dim, x.shape[2])
    _check_positions(positions, tokens, cos_sin_cache, mrope_section)
    return heads


# --- angles of positions --------------------------------------------------------------------------


def _of_sections(rows: Tensor, section: list[int], interleaved: bool) -> Tensor:
    """Of ``[3, tokens, pairs]`` the entry of the position that each pair goes by."""
    time, height, width = rows.unbind(0)
    if not interleaved:
        return torch.cat([part[axis] for axis, part in enumerate(rows.split(section, -1))], -1)
    pair = torch.arange(rows.shape[-1], device=rows.device)
    by_height = (pair % 3 == 1) & (pair < 3 * section[1])
    by_width = (pair % 3 == 2) & (pair < 3 * section[2])
    return torch.where(by_height, height, torch.where(by_width, width, time))


def angles(
    cos_sin_cache: Tensor, positions: Tensor, is_neox: bool, mrope_section: list[int] | None, mrope_interleaved: bool
) -> tuple[Tensor, Tensor]:
    """Cosines and sines for each element of ``[tokens, heads, rope_dim]``."""
    in_range(positions, cos_sin_cache.shape[0], "positions")
    halves = cos_sin_cache[positions].chunk(2, -1)
    if mrope_section is not None:
        halves = tuple(_of_sections(half, mrope_section, mrope_interleaved) for half in halves)
    both = [torch.cat((half, half), -1) if is_neox else half.repeat_interleave(2, -1) for half in halves]
    return both[0].unsqueeze(1), both[1].unsqueeze(1)
