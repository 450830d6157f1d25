"""What of a model does not have to live on the device all the time: activations, layer inputs,
embedding rows, frozen weights.

* `checkpoint_layers`: layers are recomputed in the backward; their inputs may wait in host memory.
* `stream_layers`: frozen linears of layers live in host memory and pass through two device slots.
* `embedding_on_cpu`: ids are looked up in host memory, the rows are copied to the device.
* `tile_mlp`: the MLP of a layer runs in tiles of so many tokens.
* `place`: all of these as the [memory] section says.

Each may be called at any time after `inject_lora`, again and in any order, and changes no value:
losses and gradients are bit-equal (tiles sum adapter gradients in another order). Copies run on a
side stream, the next one under way while a layer computes, and the host waits for none of them; on
the CPU the same calls run in order. References: checkpointing Chen et al., arXiv:1604.06174, equal
in gradients to `torch.utils.checkpoint`, dropout included; streaming: the base never changes, so
nothing flows back.
"""

from __future__ import annotations

import contextlib
import re
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from cllm.memory import Settings, streamed_layers
from cllm.messages import note
from cllm.model.device import autocast, autocast_dtype
from cllm.model.lora import linear_shape

_ALIGNMENT = 256  # bytes between tensors of a packed layer


class _Lane:
    """Copies between host and device beside the computation: on a CUDA stream of its own, on the
    CPU at once. Whoever starts a copy keeps both tensors until `wait` was called for it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(self, target: Tensor, source: Tensor) -> torch.cuda.Event | None:
        """target <- source once all work issued so far is done; the result is for `wait`."""
        if self.stream is None:
            target.copy_(source)
            return None
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
            done = torch.cuda.Event()
            done.record(self.stream)
        return done

    def wait(self, done: torch.cuda.Event | None) -> None:
        """Work issued from now on runs after that copy."""
        if done is not None:
            torch.cuda.current_stream(self.device).wait_event(done)


def _pin(host: Tensor, device: torch.device) -> None:
    """Page-lock `host` in place while it lives, for copies beside the computation; torch's pinned
    allocator would round up to a power of two.
    """
    if device.type != "cuda":
        return
    runtime: Any = torch.cuda.cudart()
    if int(runtime.cudaHostRegister(host.data_ptr(), host.nbytes, 0)) == 0:
        weakref.finalize(host.untyped_storage(), runtime.cudaHostUnregister, host.data_ptr())
        return
    note("memory.unpinned")
    # CUDA remembers the failure, and the next kernel launch would be blamed for it.
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device=device)


class _Input:
    """One layer's input in host memory, and (`below`) that of the offloaded layer below."""

    def __init__(self, inputs: _Inputs, hidden: Tensor, index: int, below: _Input | None) -> None:
        self.inputs = inputs
        self.lane = inputs.lane_of(hidden.device)
        self.index = index
        self.below = below
        self.buffer = inputs.buffer(hidden)
        self.host = self.buffer[: hidden.nbytes].view(hidden.dtype).view(hidden.shape)
        self.source: Tensor | None = hidden
        self.back: Tensor | None = None
        self.done = self.lane.copy(self.host, hidden)
        if below and below.below:
            below.below.release()  # at most two inputs wait on the device

    def release(self) -> None:
        """Let go of the input on the device: what runs from now on runs after its copy."""
        self.lane.wait(self.done)
        self.source = None

    def fetch(self) -> None:
        """Start the copy back to the device, if the input has left it."""
        if self.back is None:
            self.back = self.source
        if self.back is None:
            self.back = torch.empty_like(self.host, device=self.lane.device)
            self.done = self.lane.copy(self.back, self.host)

    def take(self) -> Tensor:
        """The input on the device, once; the copy of the one below starts."""
        self.fetch()
        self.release()
        if self.below:
            self.below.fetch()
        hidden = self.back
        assert hidden is not None
        self.back = None
        # Copies of one lane run in order, so the next forward may write there.
        self.inputs.free.append(self.buffer)
        return hidden


class _Inputs:
    """The layers' inputs of the forward that runs, and host buffers for those of the next one."""

    def __init__(self) -> None:
        self.free: list[Tensor] = []
        self.lane: _Lane | None = None
        self.last: Callable[[], _Input | None] = lambda: None

    def lane_of(self, device: torch.device) -> _Lane:
        """The one lane of all copies, so that a buffer is read before it is written again."""
        if self.lane is None or self.lane.device != device:
            self.lane = _Lane(device)
        return self.lane

    def buffer(self, hidden: Tensor) -> Tensor:
        """A page-locked host buffer that holds `hidden`."""
        for index, buffer in enumerate(self.free):
            if buffer.nbytes >= hidden.nbytes:
                return self.free.pop(index)
        if self.free:
            self.free.pop()  # a longer row: buffers grow, their number does not
        buffer = torch.empty(hidden.nbytes, dtype=torch.uint8)
        _pin(buffer, hidden.device)
        return buffer

    def put(self, hidden: Tensor, index: int) -> _Input:
        """Layer `index`'s input sets out for host memory."""
        below = self.last()
        if below is not None and below.index >= index:  # of the forward before
            below = None
        kept = _Input(self, hidden, index, below)
        self.last = weakref.ref(kept)
        return kept


class _Piece(NamedTuple):
    """Where a tensor of a linear lies in its layer's packed bytes."""

    module: nn.Module
    name: str
    start: int
    stop: int
    like: Tensor

    def of(self, buffer: Tensor) -> Tensor:
        """The tensor inside its layer's bytes."""
        return buffer[self.start : self.stop].view(self.like.dtype).view(self.like.shape)


class _Weights:
    """The frozen linears of some layers, each layer packed into one host buffer, and two device
    slots for them.

    Layer i of these uses slot i % 2, so that its neighbours above and below are always in the other
    one.
    """

    def __init__(self, layers: list[nn.Module], device: torch.device) -> None:
        self.lane = _Lane(device)
        self.pieces = [layer_pieces(layer) for layer in layers]
        self.hosts: list[Tensor] = []
        for index, pieces in enumerate(self.pieces):
            self.hosts.append(_packed(pieces))
            self._point(index, self.hosts[-1])
            _pin(self.hosts[-1], device)
        largest = max(host.numel() for host in self.hosts)
        slots = min(2, len(layers))
        self.slots = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(slots)]
        self.held: list[int | None] = [None] * len(self.slots)
        self.done: list[Any] = [None] * len(self.slots)

    def acquire(self, index: int, step: int) -> None:
        """Layer `index`'s weights are on the device; those of layer `index + step` set out."""
        self._fetch(index)
        self.lane.wait(self.done[index % 2])
        if 0 <= index + step < len(self.hosts):
            self._fetch(index + step)

    def _fetch(self, index: int) -> None:
        slot = index % 2
        before = self.held[slot]
        if before == index:
            return
        if before is not None:
            self._point(before, self.hosts[before])
        host = self.hosts[index]
        self.done[slot] = self.lane.copy(self.slots[slot][: host.numel()], host)
        self._point(index, self.slots[slot])
        self.held[slot] = index

    def _point(self, index: int, buffer: Tensor) -> None:
        """Let the linears of layer `index` read their tensors from `buffer`."""
        for piece in self.pieces[index]:
            getattr(piece.module, piece.name).data = piece.of(buffer)


def layer_pieces(layer: nn.Module) -> list[_Piece]:
    """The tensors of a layer's frozen linears, and where each lies in their buffer."""
    pieces, start = [], 0
    for module in layer.modules():
        if linear_shape(module) is None:
            continue
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and not tensor.requires_grad:
                pieces.append(_Piece(module, name, start, start + tensor.nbytes, tensor.to("meta")))
                start += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    return pieces


def _packed(pieces: list[_Piece]) -> Tensor:
    """The tensors of `pieces` side by side in one host buffer of bytes."""
    buffer = torch.empty(pieces[-1].stop, dtype=torch.uint8)
    for piece in pieces:
        piece.of(buffer).copy_(getattr(piece.module, piece.name).detach())
    return buffer


class _Checkpoint(torch.autograd.Function):
    """forward: run(hidden) without a graph. backward: the generators as they were, run again,
    differentiate.
    """

    @staticmethod
    def forward(
        ctx: Any,
        run: Callable[[Tensor, int], Tensor],
        kept: _Input | None,
        hidden: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        device = hidden.device
        ctx.run, ctx.kept, ctx.parameters = run, kept, parameters
        ctx.cpu_rng = torch.get_rng_state()
        ctx.cuda_rng = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        ctx.autocast = autocast_dtype(device)
        ctx.save_for_backward(*([hidden] if kept is None else []))
        return run(hidden, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden: Tensor = ctx.saved_tensors[0] if ctx.kept is None else ctx.kept.take()
        cards = [] if ctx.cuda_rng is None else [hidden.device]
        with torch.random.fork_rng(cards), torch.enable_grad():
            torch.set_rng_state(ctx.cpu_rng)
            for card in cards:
                torch.cuda.set_rng_state(ctx.cuda_rng, card)
            inputs = hidden.detach().requires_grad_(ctx.needs_input_grad[2])
            with autocast(hidden.device.type, ctx.autocast):
                # Of the output only its place in the graph is needed, so its bytes go.
                output = ctx.run(inputs, -1)
                # Some layers (BLOOM's) give a tuple.
                output = get_gradient_edge(output if isinstance(output, Tensor) else output[0])
        wanted = [t for t in (inputs, *ctx.parameters) if t.requires_grad]
        results = torch.autograd.grad(output, wanted, gradients[0], allow_unused=True)
        return (None, None, *[None] * (not inputs.requires_grad), *results)


class _Route:
    """How one module is run in place of its `forward`; a decoder layer's, or (with `tokens`) an
    MLP's.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.forward: Callable[..., Any] = module.forward
        self.recompute, self.index, self.tokens = False, 0, 0
        self.inputs: _Inputs | None = None
        self.weights: tuple[_Weights, int] | None = None

    @classmethod
    def of(cls, module: nn.Module) -> _Route:
        """The module's route; made on the first call."""
        if not isinstance(module.forward, _Route):
            module.forward = cls(module)
        return module.forward

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        def run(hidden: Tensor, step: int) -> Any:
            if self.weights:
                self.weights[0].acquire(self.weights[1], step)
            return self.forward(hidden, *args, **kwargs)

        # An MLP that takes more than one tensor (BLOOM's) or gives more (GPT-OSS's) runs whole.
        if self.tokens and hidden_states.shape[1] > self.tokens and not args:
            tiles = hidden_states.split(self.tokens, dim=1)
            outputs = [self._run(run, tile, recompute=True) for tile in tiles]
            if isinstance(outputs[0], Tensor):
                return torch.cat(outputs, dim=1)
            self.tokens = 0
        return self._run(run, hidden_states, recompute=self.recompute or self.weights is not None)

    def _run(
        self, run: Callable[[Tensor, int], Tensor], hidden: Tensor, *, recompute: bool
    ) -> Tensor:
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        if not recompute or not torch.is_grad_enabled() or not (parameters or hidden.requires_grad):
            return run(hidden, 1)
        kept = self.inputs.put(hidden, self.index) if self.inputs else None
        checkpoint: Any = _Checkpoint
        output: Tensor = checkpoint.apply(run, kept, hidden, *parameters)
        return output


def place(model: Any, memory: Settings, device: torch.device) -> None:
    """Apply a plan's settings to a model with adapters whose base was loaded for `device`, its
    embedding already where it is to stay.
    """
    checkpoint_layers(model, memory.checkpoint_layers, offload=memory.offload_inputs)
    stream_layers(model, memory.stream_layers, device)
    tile_mlp(model, memory.mlp_tile_tokens)
    if device.type != "cpu" and model.get_input_embeddings().weight.device.type == "cpu":
        embedding_on_cpu(model, device)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The stack of decoder layers of a Transformers causal LM: the longest ModuleList of its base
    model that is not part of another one, as experts are.
    """
    base = getattr(model, "base_model", model)
    lists = ((n, m) for n, m in base.named_modules() if isinstance(m, nn.ModuleList))
    return max((m for n, m in lists if not re.search(r"\.\d+\.", f".{n}.")), key=len)


def checkpoint_layers(model: nn.Module, count: int = -1, *, offload: bool = False) -> int:
    """Recompute the first `count` decoder layers in the backward (-1: all, 0: none); returns how
    many.

    The first layers are taken because their activations live longest. Inactive without gradients,
    so evaluation pays nothing. offload: the inputs of recomputed layers (streamed ones among them)
    wait in host memory; at most two of them are on the device beside the one in use.
    """
    layers = decoder_layers(model)
    chosen = len(layers) if count < 0 else min(count, len(layers))
    inputs = _Inputs() if offload else None
    for index, layer in enumerate(layers):
        route = _Route.of(layer)
        route.recompute = index < chosen
        route.index = index
        route.inputs = inputs  # streamed layers are recomputed too
    return chosen


def stream_layers(model: nn.Module, count: int, device: torch.device) -> int:
    """Keep the frozen linears of `count` decoder layers in host memory, in two slots of `device`
    while used; returns the slots' bytes.

    These layers are recomputed in the backward, whatever `checkpoint_layers` says. Weights cross
    twice per row. What else a layer holds (norms, adapters) moves to `device`. Up to two layers
    gain nothing.
    """
    layers = decoder_layers(model)
    chosen = [layers[index] for index in streamed_layers(len(layers), count)]
    if not chosen:
        return 0
    weights = _Weights(chosen, device)
    for index, layer in enumerate(chosen):
        _Route.of(layer).weights = (weights, index)
        streamed = {id(piece.module) for piece in weights.pieces[index]}
        for module in layer.modules():
            if id(module) not in streamed:
                move(module, device)
    return sum(slot.nbytes for slot in weights.slots)


def move(module: nn.Module, device: torch.device) -> None:
    """What a module holds itself, and not in modules below it, goes to `device`."""
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        tensor.data = tensor.data.to(device)


def embedding_on_cpu(model: Any, device: torch.device) -> None:
    """Look ids up in host memory and copy the rows to `device`; with a tied 16-bit head the device
    keeps the matrix for that.
    """
    embedding: Any = model.get_input_embeddings()
    embedding.weight = nn.Parameter(embedding.weight.detach().cpu(), requires_grad=False)
    embedding.to("cpu")

    def ids_to_host(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0].cpu(), *inputs[1:])

    def rows_to_device(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        return output.to(device, non_blocking=True)

    embedding.register_forward_pre_hook(ids_to_host)
    embedding.register_forward_hook(rows_to_device)


def tile_mlp(model: nn.Module, tokens: int) -> None:
    """Run every decoder layer's `mlp` in tiles of `tokens` positions (0: whole), each recomputed in
    the backward: its activations then take `tokens` rows instead of the row's, for one more forward
    of the MLP.
    """
    for layer in decoder_layers(model):
        if isinstance(mlp := getattr(layer, "mlp", None), nn.Module):
            _Route.of(mlp).tokens = tokens
