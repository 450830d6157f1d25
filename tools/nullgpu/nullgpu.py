"""The Python side of the null CUDA device: counters, and what stands in for the kernels' results.

    counters(), kernels(), reset()    launches, copies and waits since the last reset; kernel names
    waits()                           where the host waits for the device, {"file:line": count}
    harmless()                        values read from the device are ones, masks select everything
    on_the_host()                     the CPU's kernels compute every operation into device memory

The last three are context managers. `NULLGPU_VALUES=harmless|host` switches one on for the whole
process and its children; `NULLGPU_REPORT=1` prints the counters at exit.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import ctypes
import math
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_stub = ctypes.CDLL(os.environ["NULLGPU_STUB"])
_stub.nullgpu_launches.restype = ctypes.c_uint64
_stub.nullgpu_host.restype = ctypes.c_void_p
_stub.nullgpu_host.argtypes = [ctypes.c_void_p]
launches = _stub.nullgpu_launches
reset = _stub.nullgpu_reset


def counters() -> dict[str, int]:
    """All counters of the stub by name; `waits` is the sum over streams, devices and events."""
    values: dict[str, int] = {}
    name, value = ctypes.c_char_p(), ctypes.c_uint64()
    while _stub.nullgpu_counter(len(values), ctypes.byref(name), ctypes.byref(value)):
        values[(name.value or b"").decode()] = value.value
    values["waits"] = sum(values[f"sync_{kind}"] for kind in ("stream", "device", "event"))
    return values


def kernels() -> dict[str, int]:
    """Launches by (mangled) kernel name, most frequent first."""
    totals: collections.Counter[str] = collections.Counter()
    index, name, count = ctypes.c_size_t(0), ctypes.c_char_p(), ctypes.c_uint64()
    while _stub.nullgpu_kernel(ctypes.byref(index), ctypes.byref(name), ctypes.byref(count)):
        totals[(name.value or b"?").decode()] += count.value
    return dict(totals.most_common())


@contextlib.contextmanager
def waits() -> Iterator[collections.Counter[str]]:
    """Where the host waits: the innermost Python line outside of torch, or "autograd" for a thread
    without Python frames.
    """
    places: collections.Counter[str] = collections.Counter()
    left_out = (str(Path(torch.__file__).parent), __file__)

    def record() -> None:
        frames = [f for f in traceback.extract_stack() if not f.filename.startswith(left_out)]
        places[f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "autograd"] += 1

    callback = ctypes.CFUNCTYPE(None)(record)
    _stub.nullgpu_on_sync(callback)
    try:
        yield places
    finally:
        _stub.nullgpu_on_sync(None)


# ---- harmless values ----


def _one(tensor: Tensor) -> Any:
    if tensor.dtype is torch.bool:
        return True
    return 1.0 if tensor.is_floating_point() else 1


def _all_coordinates(tensor: Tensor) -> Tensor:
    axes = torch.meshgrid(*map(torch.arange, tensor.shape), indexing="ij")
    return torch.stack([axis.flatten() for axis in axes], 1).to(tensor.device)


def _nonzero(tensor: Tensor, *, as_tuple: bool = False) -> Any:
    coordinates = _all_coordinates(tensor)
    return coordinates.unbind(1) if as_tuple else coordinates


def _same_shape(tensor: Tensor, other: Tensor, **_: Any) -> bool:
    return tensor.shape == other.shape


def _is_mask(key: Any) -> bool:
    return isinstance(key, Tensor) and key.dtype is torch.bool


def _without_masks(key: Any) -> Any:
    """An index in which every mask is the coordinates of all that it covers."""
    parts: list[Any] = []
    for part in key if isinstance(key, tuple) else (key,):
        parts += _all_coordinates(part).unbind(1) if _is_mask(part) else [part]
    return tuple(parts)


@contextlib.contextmanager
def harmless() -> Iterator[None]:
    """Python-level reads of device values give ones, and masks count as all True; what C++ reads
    for itself stays what the memory holds.
    """
    originals: list[tuple[Any, str, Any]] = []

    def patch(owner: Any, name: str, instead: Callable[..., Any]) -> None:
        real = getattr(owner, name)
        originals.append((owner, name, real))

        def call(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            if not isinstance(tensor, Tensor) or not tensor.is_cuda:
                return real(tensor, *args, **kwargs)
            # reading waits, and should be counted
            torch.cuda.current_stream(tensor.device).synchronize()
            return instead(tensor, *args, **kwargs)

        setattr(owner, name, call)

    def item(tensor: Tensor, key: Any) -> Any:
        masked = any(map(_is_mask, key)) if isinstance(key, tuple) else _is_mask(key)
        return real_item(tensor, _without_masks(key) if tensor.is_cuda and masked else key)

    patch(Tensor, "item", _one)
    patch(Tensor, "__bool__", lambda tensor: True)
    patch(Tensor, "__int__", lambda tensor: 1)
    patch(Tensor, "__index__", lambda tensor: 1)
    patch(Tensor, "__float__", lambda tensor: 1.0)
    patch(Tensor, "tolist", lambda tensor: torch.full(tensor.shape, _one(tensor)).tolist())
    patch(Tensor, "masked_scatter", lambda tensor, _mask, source: source.reshape(tensor.shape) + 0)
    for owner in (Tensor, torch):
        patch(owner, "equal", _same_shape)
        patch(owner, "allclose", _same_shape)
        patch(owner, "nonzero", _nonzero)
    real_item = Tensor.__getitem__
    originals.append((Tensor, "__getitem__", real_item))
    setattr(Tensor, "__getitem__", item)  # noqa: B010
    try:
        yield
    finally:
        for owner, name, real in reversed(originals):
            setattr(owner, name, real)


# ---- values computed on the host ----


def host_view(value: Any) -> Any:
    """A CPU tensor over the very bytes of a tensor on the null device; anything else as it is."""
    if isinstance(value, torch.device):
        return torch.device("cpu")
    if isinstance(value, torch.Generator):
        return None
    if not isinstance(value, Tensor) or not value.is_cuda:
        return value
    storage = value.untyped_storage()
    if not storage.nbytes():
        return torch.empty(value.shape, dtype=value.dtype)
    address = _stub.nullgpu_host(storage.data_ptr())
    flat = torch.frombuffer(
        (ctypes.c_char * storage.nbytes()).from_address(address), dtype=torch.uint8
    )
    view = torch.empty(0, dtype=value.dtype)
    return view.set_(flat.untyped_storage(), value.storage_offset(), value.size(), value.stride())


def _visible(queries: int, keys: int, left: int, right: int) -> Tensor:
    """(Q, K) bool: keys at most `left` before and `right` after the query; -1: any number."""
    distance = torch.arange(keys) - torch.arange(queries)[:, None]
    visible = torch.ones(queries, keys, dtype=torch.bool)
    visible &= distance >= -left if left >= 0 else True
    return visible & (distance <= right) if right >= 0 else visible


class _Attention:
    """softmax(scale Q K^T + bias) V in float32, heads (B, H, T, d), and the gradients of it."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None = None,
        window: tuple[int, int] = (-1, -1),
        scale: float | None = None,
    ) -> None:
        self.scale = query.shape[-1] ** -0.5 if scale is None else scale
        self.query = query.float()
        self.groups = query.shape[1] // key.shape[1]
        self.key, self.value = (x.repeat_interleave(self.groups, 1).float() for x in (key, value))
        self.scores = self.query @ self.key.transpose(-1, -2) * self.scale
        if bias is not None:
            self.scores = self.scores + bias.float()
        queries, keys = self.scores.shape[-2:]
        visible = _visible(queries, keys, *window)
        self.scores = self.scores.masked_fill(~visible, -math.inf)
        self.weights = self.scores.softmax(-1).nan_to_num(0.0)

    def forward(self) -> list[Tensor]:
        """Output and the logarithm of every query's normalizer."""
        return [self.weights @ self.value, self.scores.logsumexp(-1)]

    def backward(self, grad: Tensor, out: Tensor) -> list[Tensor]:
        """Gradients of query, key, value and bias."""
        grad = grad.float()
        inner = grad @ self.value.transpose(-1, -2)
        scores = self.weights * (inner - (grad * out.float()).sum(-1, keepdim=True))
        key = scores.transpose(-1, -2) @ self.query * self.scale
        value = self.weights.transpose(-1, -2) @ grad
        key, value = (x.unflatten(1, (-1, self.groups)).sum(2) for x in (key, value))
        return [scores @ self.key * self.scale, key, value, scores]


def _causal(is_causal: bool) -> tuple[int, int]:
    return (-1, 0) if is_causal else (-1, -1)


def _flash(
    query: Any,
    key: Any,
    value: Any,
    dropout: float = 0.0,
    causal: bool = False,
    *rest: Any,
    scale: Any = None,
) -> list[Any]:
    return _Attention(query, key, value, None, _causal(causal), scale).forward()


def _flash_backward(
    grad: Any, query: Any, key: Any, value: Any, out: Any, *rest: Any, scale: Any = None
) -> list[Any]:
    attention = _Attention(query, key, value, None, _causal(rest[6]), scale)
    return attention.backward(grad, out)[:3]


def _efficient(
    query: Any,
    key: Any,
    value: Any,
    bias: Any,
    with_lse: bool,
    dropout: float = 0.0,
    causal: bool = False,
    *,
    scale: Any = None,
) -> list[Any]:
    return _Attention(query, key, value, bias, _causal(causal), scale).forward()[: 1 + with_lse]


def _efficient_backward(
    grad: Any, query: Any, key: Any, value: Any, bias: Any, out: Any, *rest: Any, scale: Any = None
) -> list[Any]:
    causal = rest[5] if len(rest) > 5 else False
    gradients = _Attention(query, key, value, bias, _causal(causal), scale).backward(grad, out)
    return [g if wanted else None for g, wanted in zip(gradients, rest[4], strict=True)]


def _sequences(bounds: Tensor, *rows: Tensor) -> Iterator[list[Tensor]]:
    """The (1, H, T_n, d) parts of packed rows (T, H, d), sequence by sequence."""
    lengths = bounds.diff().tolist()
    for parts in zip(*(row.split(lengths) for row in rows), strict=True):
        yield [part.transpose(0, 1)[None] for part in parts]


def _varlen(
    query: Any,
    key: Any,
    value: Any,
    bounds: Any,
    _k: Any,
    _max_q: int,
    _max_k: int,
    causal: bool = False,
    scale: Any = None,
    window: Any = None,
    *_: Any,
) -> list[Any]:
    window = _causal(True) if causal else tuple(window or (-1, -1))
    parts = [
        _Attention(q, k, v, None, window, scale).forward()
        for q, k, v in _sequences(bounds, query, key, value)
    ]
    output = torch.cat([out[0].transpose(0, 1) for out, _ in parts])
    return [output, torch.cat([lse[0] for _, lse in parts], 1)]


def _varlen_backward(
    grad: Any,
    query: Any,
    key: Any,
    value: Any,
    out: Any,
    _lse: Any,
    bounds: Any,
    _k: Any,
    _max_q: int,
    _max_k: int,
    causal: bool,
    _rng: Any,
    scale: Any = None,
    window: Any = None,
) -> list[Any]:
    window = _causal(True) if causal else tuple(window or (-1, -1))
    parts = [
        _Attention(q, k, v, None, window, scale).backward(g, o)[:3]
        for g, q, k, v, o in _sequences(bounds, grad, query, key, value, out)
    ]
    return [
        torch.cat([g[0].transpose(0, 1) for g in gradients])
        for gradients in zip(*parts, strict=True)
    ]


def _layer_norm_backward(
    grad: Tensor, x: Tensor, shape: Any, mean: Tensor, rstd: Tensor, *weights_and_mask: Any
) -> list[Any]:
    """In float32: a card keeps the statistics of 16-bit rows so, which the CPU's kernel refuses."""
    *weights, mask = weights_and_mask
    tensors = [None if w is None else w.float() for w in weights]
    backward = torch.ops.aten.native_layer_norm_backward
    return list(backward(grad.float(), x.float(), shape, mean, rstd, *tensors, mask))


def _softmax(x: Tensor, dim: int, half_to_float: bool) -> list[Any]:
    """A card's kernel also turns 16-bit scores into float32 probabilities."""
    return [torch.ops.aten._softmax(x.float() if half_to_float else x, dim, False)]


def _softmax_backward(grad: Tensor, output: Tensor, dim: int, _dtype: Any) -> list[Any]:
    backward = torch.ops.aten._softmax_backward_data
    return [backward(grad.float(), output.float(), dim, torch.float32)]


_INSTEAD: dict[str, Callable[..., list[Any]]] = {
    "aten._scaled_dot_product_flash_attention": _flash,
    "aten._scaled_dot_product_flash_attention_backward": _flash_backward,
    "aten._scaled_dot_product_efficient_attention": _efficient,
    "aten._scaled_dot_product_efficient_attention_backward": _efficient_backward,
    "aten._softmax": _softmax,
    "aten._softmax_backward_data": _softmax_backward,
    "aten.native_layer_norm_backward": _layer_norm_backward,
    "torch_attn._varlen_attn": _varlen,
    "torch_attn._varlen_attn_backward": _varlen_backward,
}
_NO_VALUES = {
    f"aten.{name}"
    for name in """empty empty_like empty_strided new_empty new_empty_strided record_stream set_
    resize_ _unsafe_view _local_scalar_dense is_pinned _pin_memory _fused_sdp_choice""".split()
}


def _on_device(inputs: list[Tensor], device: Any) -> bool:
    if any(x.is_cuda for x in inputs):
        return True
    return device is not None and torch.device(device).type == "cuda"


def _size_depends_on_values(func: Any, args: Any) -> bool:
    if func.overloadpacket is torch.ops.aten.index:  # of masks only, though always tagged
        return any(isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    return bool({torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output} & set(func.tags))


def _seed(func: Any) -> int | None:
    """What the device's generator would draw from now, as a seed for the host's."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return None
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    return hash((generator.initial_seed(), generator.get_offset())) & (2**63 - 1)


class _OnTheHost(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(func.overloadpacket)
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        is_view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        if is_view or name in _NO_VALUES or not _on_device(inputs, kwargs.get("device")):
            return func(*args, **kwargs)
        host_args, host_kwargs = tree_map(host_view, (args, kwargs))
        host_kwargs.pop("pin_memory", None)
        if "device" in host_kwargs:
            host_kwargs["device"] = torch.device("cpu")
        if _size_depends_on_values(func, args):
            torch.cuda.current_stream().synchronize()
            values = func(*host_args, **host_kwargs)
            return tree_map(lambda x: x.cuda() if isinstance(x, Tensor) else x, values)
        seed = _seed(func)
        result = func(*args, **kwargs)
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.default_generator.manual_seed(seed)
            try:
                values = _INSTEAD.get(name, func)(*host_args, **host_kwargs)
            except NotImplementedError as error:
                raise NotImplementedError(f"nullgpu: no host kernel for {func}") from error
        old = {x.untyped_storage().data_ptr() for x in inputs}
        is_leaf = (lambda x: x is None) if name in _INSTEAD else None
        # what stands in gives the first outputs only, and None for those that nobody asked for
        for target, source in zip(
            tree_leaves(result, is_leaf), tree_leaves(values, is_leaf), strict=name not in _INSTEAD
        ):
            both = isinstance(target, Tensor) and isinstance(source, Tensor)
            if both and target.untyped_storage().data_ptr() not in old:
                view = host_view(target)
                if view.numel() == source.numel():
                    view.copy_(source.reshape(view.shape))
                else:  # the card's logsumexp is padded
                    view[tuple(map(slice, source.shape))].copy_(source)
        return result


@contextlib.contextmanager
def on_the_host() -> Iterator[None]:
    """Real values at the CPU's pace and from the CPU's kernels, in every thread; attention in
    float32. Memory and launches stay the device's.
    """
    original = threading.Thread._bootstrap_inner  # type: ignore[attr-defined]

    def bootstrap(thread: threading.Thread) -> None:
        with _OnTheHost():  # type: ignore[no-untyped-call]
            original(thread)

    threading.Thread._bootstrap_inner = bootstrap  # type: ignore[attr-defined]
    try:
        with _OnTheHost():  # type: ignore[no-untyped-call]
            yield
    finally:
        threading.Thread._bootstrap_inner = original  # type: ignore[attr-defined]


def report() -> None:
    """The counters that are not zero, and the twelve kernels launched most, on stderr."""
    nonzero = [f"{name} {value:,}" for name, value in counters().items() if value]
    print("nullgpu:", ", ".join(nonzero), file=sys.stderr)
    for name, count in list(kernels().items())[:12]:
        print(f"nullgpu: {count:>9,}  {name[:110]}", file=sys.stderr)


def activate() -> None:
    """What the environment asks for, until the process ends."""
    modes = {"harmless": harmless, "host": on_the_host}
    if mode := modes.get(os.environ.get("NULLGPU_VALUES", "")):
        whole_process = contextlib.ExitStack()
        whole_process.enter_context(mode())
        atexit.register(whole_process.close)
    if os.environ.get("NULLGPU_REPORT"):
        atexit.register(report)
