"""Counting memory without using any: tensors on the meta device have shapes and no content, and every one is seen.

The code that is counted is the code that trains. Its storages are counted from when an operation makes them until
nothing holds them any more, as an allocator does that neither rounds nor keeps room.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

META = torch.device("meta")
_aten = torch.ops.aten


class Meter(TorchDispatchMode):
    """Inside, the bytes of all storages on the meta device are counted.

    now: those that are held. peak: the most that were held at once, since `restart`. Where a number is asked of a
    tensor, it is 1, and a mask lets everything pass: shapes, and with them memory, are those of the fullest batch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._held: dict[int, tuple[int, weakref.ref[Any]]] = {}

    def restart(self) -> int:
        """Forgets the peak. Returns what is held."""
        self.peak = self.now
        return self.now

    def hold(self, tensors: Iterable[Tensor]) -> int:
        """Counts tensors that were made before. Returns their bytes, each storage once."""
        before = self.now
        for tensor in tensors:
            self._see(tensor)
        return self.now - before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _aten._local_scalar_dense.default and args[0].is_meta:
            return _one(args[0].dtype)
        if func is _aten._to_copy.default and args[0].is_meta and _is_cpu(kwargs.get("device")):
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if func is _aten.index.Tensor and args[0].is_meta:
            args = (args[0], [_unmasked(index) for index in args[1]])
        out = _made(func, args, kwargs)
        for leaf in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return out

    def _see(self, tensor: Tensor) -> None:
        if not tensor.is_meta:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._held:
            size = storage.nbytes()
            self._held[key] = size, weakref.ref(storage, partial(self._released, key))
            self.now += size
            self.peak = max(self.peak, self.now)

    def _released(self, key: int, _: Any) -> None:
        self.now -= self._held.pop(key)[0]


_IN_PLACE = {
    getattr(packet, name)
    for packet in (
        _aten.add_, _aten.sub_, _aten.mul_, _aten.div_, _aten.addcmul_, _aten.addcdiv_, _aten.lerp_, _aten.copy_,
        _aten.zero_, _aten.fill_, _aten.sqrt_, _aten.clamp_, _aten.neg_,
    )
    for name in packet.overloads()
}  # fmt: skip
_known: dict[
    Any, list[tuple[Any, ...] | None] | None
] = {}  # operation -> its outputs' shapes; None: it has to be asked


def _made(func: Any, args: Any, kwargs: Any) -> Any:
    """The outputs of an operation. What was asked before with tensors of the same shapes is not worked out again, which
    takes torch a millisecond, unless outputs lie in the storage of an input."""
    if func._schema.is_mutable:
        in_place = func in _IN_PLACE and args[0].is_meta and "out" not in kwargs
        return args[0] if in_place else func(*args, **kwargs)
    key = func, _shape_of(args), _shape_of(kwargs)
    found = _known.get(key)
    if found is not None:
        made = [
            None if one is None else torch.empty_strided(one[0], one[1], dtype=one[2], device=META) for one in found
        ]
        return made[0] if len(made) == 1 else tuple(made)
    out = func(*args, **kwargs)
    if key not in _known:
        outputs = [out] if isinstance(out, Tensor) else list(out) if isinstance(out, tuple) and len(out) > 1 else []
        given = {one.untyped_storage()._cdata for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        plain = bool(outputs) and all(
            one is None or (isinstance(one, Tensor) and one.is_meta and one.untyped_storage()._cdata not in given)
            for one in outputs
        )
        shapes = [None if one is None else (one.shape, one.stride(), one.dtype) for one in outputs] if plain else None
        _known[key] = shapes
    return out


def _shape_of(value: Any) -> Any:
    """All that an operation's outputs without content depend on, to be compared."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, (tuple, list)):
        return tuple(map(_shape_of, value))
    if isinstance(value, dict):
        return tuple((key, _shape_of(one)) for key, one in value.items())
    return type(value), value


def _one(dtype: torch.dtype) -> Any:
    return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1


def _is_cpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cpu"


def _unmasked(index: Tensor | None) -> Tensor | None:
    """Of a mask, the places that it names if all of it is true; (n,) of a mask of one dimension."""
    if index is None or index.dtype != torch.bool or index.ndim != 1:
        return index
    return torch.empty(len(index), dtype=torch.long, device=index.device)


class _Attention(torch.autograd.Function):
    """Attention by a fused kernel, as GPUs and CPUs have it: it keeps its inputs, its output and a number per row, and
    of a mask the numbers that are added."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        out = query.new_empty((*query.shape[:-1], value.shape[-1]))
        ctx.save_for_backward(
            query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32), _added(mask, query)
        )
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return *(torch.empty_like(one) for one in ctx.saved_tensors[:3]), None


def _added(mask: Tensor | None, query: Tensor) -> Tensor | None:
    return mask.to(query.dtype) if mask is not None and mask.dtype == torch.bool else mask


@contextmanager
def fused_attention() -> Iterator[None]:
    """Inside, attention of tensors without content is counted as of a fused kernel; torch would take the other way."""
    original = F.scaled_dot_product_attention

    def attention(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *rest: Any, **keywords: Any
    ) -> Tensor:
        if not query.is_meta:
            return original(query, key, value, attn_mask, *rest, **keywords)
        result: Tensor = _Attention.apply(query, key, value, attn_mask)
        return result

    patched: Any = F
    patched.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        patched.scaled_dot_product_attention = original


@contextmanager
def counting() -> Iterator[Meter]:
    """Inside, memory is counted, attention as that of a fused kernel."""
    with fused_attention(), Meter() as meter:
        yield meter


def storages(networks: Iterable[nn.Module], wanted: Callable[[Tensor], bool] = lambda _: True) -> int:
    """The bytes of the parameters and buffers of networks, each storage once."""
    found = {}
    for network in networks:
        for tensor in (*network.parameters(), *network.buffers()):
            if wanted(tensor):
                storage = tensor.untyped_storage()
                found[storage._cdata] = storage.nbytes()
    return sum(found.values())
