"""Load any supported checkpoint as a native Transformers model: read -> convert -> quantize ->
place, one tensor at a time.

The model is built on the meta device; names and shapes of the whole checkpoint are compared with it
before any data is read. Then each tensor is read, converted by its family's rules
(`cllm.model.families`), cast, optionally quantized, and put in place, so that at most one tensor
exists twice. No remote code is executed, and no pickle runs code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cllm.memory import Settings, streamed_layers
from cllm.messages import UserError, read_json
from cllm.model import families, gguf
from cllm.model.attention import ATTENTION, register
from cllm.model.conversion import convert
from cllm.model.families import Family, shape_of
from cllm.model.int8 import Int8Linear
from cllm.model.nf4 import NF4Linear
from cllm.model.offload import decoder_layers
from cllm.model.shards import Layout, WeightFiles, finite, weight_files, write_json

_RANDOM = 2**24  # random weights made at a time


class Checkpoint(NamedTuple):
    """What is on disk: the family, the native config (a Transformers object) and the weight
    files.
    """

    path: Path
    family: Family
    config: Any
    weights: WeightFiles


def open_checkpoint(path: Path) -> Checkpoint:
    """Read config.json (or GGUF metadata), find the family and the weight files.

    Raises UserError for a missing or damaged config.json, weights that are already quantized (GPTQ,
    AWQ, …), and architectures that are neither in the table of families nor native to Transformers
    (it lists the supported ones).
    """
    from huggingface_hub.errors import StrictDataclassError

    original = _gguf_config(path) if path.suffix == ".gguf" else _read_config(path / "config.json")
    family = original.get("family") or families.family_of(original) or families.NATIVE
    try:
        config = _native_config(path, family, original)
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError("model.damaged", path=path, detail=f"configuration: {error}") from error
    return Checkpoint(path, family, config, weight_files(path))


def original_config(path: Path) -> dict[str, Any]:
    """The config.json of a checkpoint directory as it was published; of a GGUF file the native
    config behind its metadata.
    """
    return (
        dict(open_checkpoint(path).config.to_dict())
        if path.suffix == ".gguf"
        else _read_config(path / "config.json")
    )


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise UserError("model.no_config", path=file.parent)
    config = read_json(file)
    if quantization := config.pop("quantization_config", None):
        method = quantization.get("quant_method", "?") if isinstance(quantization, dict) else "?"
        raise UserError("model.quantized", path=file.parent, method=method)
    return config


def _gguf_config(path: Path) -> dict[str, Any]:
    """A GGUF file's metadata without the architecture's prefix, its tensors, and its family."""
    header = gguf.read_header(path)
    architecture = header.metadata.get("general.architecture")
    if architecture not in families.GGUF:
        known = f"GGUF {', '.join(families.GGUF)}"
        raise UserError("model.unsupported", path=path, architecture=architecture, supported=known)
    own = {key.removeprefix(f"{architecture}."): value for key, value in header.metadata.items()}
    return {**own, "tensors": header.tensors, "family": families.GGUF[architecture]}


def _native_config(path: Path, family: Family, original: dict[str, Any]) -> Any:
    """The config of the native causal LM; of a multimodal model, its text part's."""
    import transformers

    if family.config:
        native = getattr(transformers, family.architecture).config_class
        return native(architectures=[family.architecture], **family.config(original))
    kind = str(original.get("model_type")).removesuffix("-alibi")
    remote = str((original.get("auto_map") or {}).get("AutoModelForCausalLM", "")).rpartition(".")[
        2
    ]
    if kind in transformers.CONFIG_MAPPING:
        config = transformers.CONFIG_MAPPING[kind].from_dict({**original, "model_type": kind})
        for candidate in (config.get_text_config(), config):
            native = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(candidate), None)
            # else its own code computes something else under a native name
            if native and remote in ("", native.__name__):
                return candidate
    names = dict.fromkeys([*(original.get("architectures") or []), remote or kind])
    raise UserError(
        "model.unsupported", path=path, architecture=", ".join(names), supported=families.SUPPORTED
    )


def skeleton(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """The native model on the meta device: no memory, no initialisation."""
    from transformers import AutoModelForCausalLM

    register()
    with torch.device("meta"):
        try:
            return AutoModelForCausalLM.from_config(
                checkpoint.config, dtype=dtype, attn_implementation=ATTENTION
            )
        # a class with attention of its own only; `cllm.model.attention.packs` finds that out
        except (KeyError, ValueError):
            return AutoModelForCausalLM.from_config(
                checkpoint.config, dtype=dtype, attn_implementation="eager"
            )


def check(checkpoint: Checkpoint, model: Any) -> Layout:
    """Compare names and shapes with the model before reading data; the checkpoint's native layout
    (name -> shape, dtype).

    Raises one UserError that lists all missing, unexpected and misshaped tensors.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    shape, layout, problems = shape_of(checkpoint.config), Layout(), []
    names = set()
    for name, dims, dtype, _ in checkpoint.weights.stored():
        if name in names:
            problems.append(f"twice {name}")
        names.add(name)
        try:
            pairs = convert(
                name, torch.empty(dims, dtype=dtype, device="meta"), checkpoint.family, shape
            )
        except (ValueError, RuntimeError):
            problems.append(f"misshaped {name} {list(dims)}")
            layout |= dict.fromkeys(families.rename(name, checkpoint.family)[1], (dims, dtype))
            continue
        for target, tensor in pairs:
            if target in expected:
                layout[target] = (tuple(tensor.shape), tensor.dtype)
                if expected[target] != tuple(tensor.shape):
                    problems.append(
                        f"misshaped {name} {list(tensor.shape)}, expected {list(expected[target])}"
                    )
            elif not any(pattern.search(target) for pattern in ignored):
                problems.append(f"unexpected {name}")
    complete = set(layout)
    for tied in map(set, model.all_tied_weights_keys.items()):
        if tied & complete:
            complete |= tied
    problems += [f"missing {name}" for name in expected if name not in complete]
    if problems:
        raise UserError(
            "model.tensors", path=checkpoint.path, count=len(problems), problems="; ".join(problems)
        )
    return layout


def open_native(path: Path, dtype: torch.dtype = torch.float32) -> tuple[Checkpoint, Any, Layout]:
    """The checkpoint at `path`, its model on the meta device, and its layout. Raises UserError as
    `open_checkpoint` and `check`.
    """
    checkpoint = open_checkpoint(path)
    model = skeleton(checkpoint, dtype)
    return checkpoint, model, check(checkpoint, model)


def converted(checkpoint: Checkpoint, layout: Layout) -> Iterator[tuple[str, Tensor]]:
    """Native (name, tensor) pairs of `layout`, one original tensor in memory at a time."""
    shape = shape_of(checkpoint.config)
    for name, _, _, read in checkpoint.weights.stored():
        if any(target in layout for target in families.rename(name, checkpoint.family)[1]):
            tensor = finite(read(), checkpoint.path, name)
            pairs = convert(name, tensor, checkpoint.family, shape)
            del tensor  # nothing but the pairs holds it while they are used
            yield from (pair for pair in pairs if pair[0] in layout)


@dataclass(frozen=True, slots=True)
class Placement:
    """In which form the weights of a model are held, and where each part lives."""

    dtype: torch.dtype = torch.float32
    """Of the floating-point weights; rotary frequencies stay float32."""
    device: torch.device | str = "cpu"
    quantize: str = "none"
    """"nf4": every Linear but the head becomes `cllm.model.nf4.NF4Linear`."""
    head: str = "16bit"
    """"int8": the head becomes `cllm.model.int8.Int8Linear`; a tied embedding stays."""
    stream_layers: int = 0
    """So many layers stay in host memory, for `cllm.model.offload.stream_layers`."""
    embedding: str = "device"
    """"cpu": in host memory; "auto": there beside an NF4 base on a GPU, unless a 16-bit head
    shares it.
    """

    def __post_init__(self) -> None:
        if self.quantize not in ("none", "nf4") or self.head not in ("16bit", "int8"):
            raise ValueError(f"quantize = {self.quantize!r}, head = {self.head!r}")


def embedding_waits(placement: Placement | Settings, *, shared: bool) -> bool:
    """Whether the embedding lives in host memory while the model computes elsewhere; shared: its
    matrix is the head's, too.
    """
    on_gpu = str(placement.device).startswith("cuda")
    automatic = on_gpu and placement.quantize == "nf4" and not shared
    return placement.embedding == "cpu" or (placement.embedding == "auto" and automatic)


def load_model(path: str | Path, placement: Placement = Placement()) -> nn.Module:
    """The native Transformers causal LM of a checkpoint directory or `.gguf` file, in evaluation
    mode, attention "cllm".

    Weights are converted and quantized while they stream: a 16-bit copy of a quantized model never
    exists, and what is to live in host memory never visits the device. Call the result like the
    native class: `model(input_ids=...).logits`. Raises UserError as `open_checkpoint`, `check` and
    `cllm.model.shards` say.
    """
    checkpoint, model, layout = open_native(Path(path), placement.dtype)
    _fill(model, checkpoint, layout, converted(checkpoint, layout), placement)
    model.name_or_path = str(path)
    return model  # type: ignore[no-any-return]


def random_model(config: dict[str, Any], placement: Placement = Placement()) -> nn.Module:
    """As `load_model`, from the sizes in a config.json (original or native) and random weights:
    what a card does, without a download.
    """
    dtype, device = placement.dtype, torch.device(placement.device)
    family = families.family_of(config) or families.NATIVE
    file = Path("config.json")
    checkpoint = Checkpoint(file, family, _native_config(file, family, config), WeightFiles([], {}))
    model = skeleton(checkpoint, dtype)
    stored = model.state_dict()
    named = [*model.named_parameters(), *model.named_buffers()]
    empty = {name: tensor for name, tensor in named if name in stored}
    layout: Layout = {name: (tuple(tensor.shape), dtype) for name, tensor in empty.items()}
    # The largest matrices may have to stay in host memory, so they never visit the device whole.
    on_gpu = device.type == "cuda"
    ends = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}

    def random() -> Iterator[tuple[str, Tensor]]:
        for name, like in empty.items():
            home = "cpu" if id(like) in ends and on_gpu else device
            tensor = torch.empty(like.shape, dtype=dtype, device=home)
            if tensor.dim() <= 1:
                tensor.fill_(name.endswith("weight"))
            else:
                for rows in tensor.split(max(1, _RANDOM // tensor.shape[1])):
                    rows.copy_(torch.empty(rows.shape, dtype=dtype, device=device).normal_(0, 0.02))
            yield name, tensor

    _fill(model, checkpoint, layout, random(), placement)
    return model  # type: ignore[no-any-return]


def _fill(
    model: Any,
    checkpoint: Checkpoint,
    layout: Layout,
    tensors: Iterator[tuple[str, Tensor]],
    placement: Placement,
) -> None:
    """Put native tensors into a model on the meta device, quantizing as they come; then what no
    checkpoint stores.
    """
    device = torch.device(placement.device)
    output = model.get_output_embeddings()
    embedding = model.get_input_embeddings()
    layers = decoder_layers(model)
    streamed = (layers[i] for i in streamed_layers(len(layers), placement.stream_layers))
    waiting = {id(module) for layer in streamed for module in layer.modules()}
    shared = embedding.weight is output.weight and placement.head == "16bit"
    if embedding_waits(placement, shared=shared):
        waiting.add(id(embedding))
    if placement.head == "int8":
        waiting.add(id(output))  # what is quantized at the end needs no room on the device before
    for name, tensor in tensors:
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        # Without values there is nothing to wait with.
        home = torch.device("cpu") if id(module) in waiting and not tensor.is_meta else device
        linear = leaf == "weight" and type(module) is nn.Linear and module is not output
        if placement.quantize == "nf4" and linear:
            model.set_submodule(owner, _quantized(module, tensor, device, home))
        else:
            _place(module, leaf, tensor.to(home))
    _tie(model, layout)
    _fill_buffers(model, device)
    if checkpoint.family.alibi:
        _use_alibi(model)
    if placement.head == "int8":  # a tied embedding stays as it is
        model.set_output_embeddings(Int8Linear(output).to(device))
    elif output.weight.device != device:
        # A 16-bit head computes on the device, wherever the embedding that it was tied to lives.
        output.weight = nn.Parameter(output.weight.detach().to(device), requires_grad=False)
    model.eval()


def _place(module: nn.Module, leaf: str, tensor: Tensor) -> None:
    """Put a tensor in the place of the meta tensor `leaf`. A view is copied, or it would keep all
    that it was split from.
    """
    old = getattr(module, leaf)
    tensor = tensor.to(old.dtype) if old.is_floating_point() else tensor
    if tensor.untyped_storage().nbytes() != tensor.nbytes or not tensor.is_contiguous():
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    if isinstance(old, nn.Parameter):
        module.register_parameter(
            leaf, nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
        )
    else:
        setattr(module, leaf, tensor)


def _quantized(
    linear: nn.Linear, weight: Tensor, device: torch.device, home: torch.device
) -> NF4Linear:
    """NF4 in place of `linear`, quantized on `device`, kept at `home`; its bias, in place already
    or still to come, goes along.
    """
    module = NF4Linear(weight, device=device).to(home)
    if linear.bias is not None:
        bias = linear.bias.detach()
        module.bias = bias if bias.is_meta else bias.to(home)
    return module


def _tie(model: Any, layout: Layout) -> None:
    """Share tied weights again. Two stored tensors that differ are no tie, whatever the config says
    (as in Transformers).
    """
    for target, source in list(model.all_tied_weights_keys.items()):
        if {target, source} <= layout.keys() and not torch.equal(
            model.get_parameter(target).cpu(),  # they may live on different devices
            model.get_parameter(source).cpu(),
        ):
            del model.all_tied_weights_keys[target]
            model.config.tie_word_embeddings = False
            continue
        kept, other = (source, target) if source in layout else (target, source)
        owner, _, leaf = other.rpartition(".")
        setattr(model.get_submodule(owner), leaf, model.get_parameter(kept))


def _fill_buffers(model: Any, device: torch.device) -> None:
    """Compute what no checkpoint stores (rotary frequencies, embedding scales) by the model's own
    initialisation.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor._is_hf_initialized = True
    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            if module._buffers.get(name) is not None:
                module._buffers[name] = torch.empty_like(module._buffers[name], device=device)
    model.initialize_weights()


def _use_alibi(model: Any) -> None:
    """No native class has ALiBi: frequencies of zero make the rotation the identity, and our
    attention adds the slopes.
    """
    rotary = model.model.rotary_emb
    rotary.inv_freq.zero_()
    rotary.original_inv_freq.zero_()
    for layer in model.model.layers:
        layer.self_attn.alibi_slopes = alibi_slopes(model.config.num_attention_heads).to(
            rotary.inv_freq.device
        )


def alibi_slopes(heads: int) -> Tensor:
    """(H,) slopes 2^(-8 i / n), i = 1 … n, if n = H is a power of two; else those of the next lower
    power n, then every second one of 2 n. Source: Press et al. 2022, "Train Short, Test Long",
    section 3 and its published code.
    """
    lower = 2 ** (heads.bit_length() - 1)
    slopes = 2.0 ** (-8.0 / lower * torch.arange(1, lower + 1))
    between = 2.0 ** (-4.0 / lower * (2 * torch.arange(heads - lower) + 1))
    return torch.cat([slopes, between])


def split_rows(checkpoint: Checkpoint) -> Callable[[str, Tensor], list[tuple[str, Tensor]]]:
    """How an adapter trained on the original layout becomes one for the native model
    (`cllm.model.adapter.read_adapter`).
    """
    shape = shape_of(checkpoint.config)

    def split(name: str, rows: Tensor) -> list[tuple[str, Tensor]]:
        pairs = convert(f"{name}.weight", rows, checkpoint.family, shape)
        return [(native.removesuffix(".weight"), part) for native, part in pairs]

    return split


def write_config(
    checkpoint: Checkpoint, model: Any, folder: Path, dtype: torch.dtype | None = None
) -> None:
    """The native config.json. ALiBi gets the model_type "llama-alibi", which only cllm loads: a
    plain Llama computes something else.
    """
    config = json.loads(checkpoint.config.to_json_string(use_diff=False))
    config["architectures"] = [type(model).__name__]
    if checkpoint.family.alibi:
        config |= {"model_type": "llama-alibi", "architectures": ["LlamaAlibiForCausalLM"]}
    if dtype:
        config["dtype"] = str(dtype).removeprefix("torch.")
    write_json(folder / "config.json", config)
