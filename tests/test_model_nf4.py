"""NF4: the definition, bitsandbytes' bits, gradients, memory, and life without bitsandbytes."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from cllm.messages import UserError
from cllm.model import nf4
from cllm.model.nf4 import CODE, NF4Linear, dequantize, dequantize_plain, quantize_nf4

SHAPES = [
    (1, 1),
    (3, 5),
    (7, 63),
    (8, 64),
    (5, 65),
    (13, 80),
    (33, 48),
    (64, 127),
    (17, 192),
    (130, 256),
    (256, 264),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _cases(count):
    generator = torch.Generator().manual_seed(20)
    for index in range(count):
        weight = torch.randn(SHAPES[index % len(SHAPES)], generator=generator) * 10.0 ** (
            index % 7 - 4
        )
        if index % 3 == 1:
            weight[torch.rand(weight.shape, generator=generator) < 0.5] = 0.0
        if index % 5 == 2:
            weight.view(-1)[: weight.numel() // 2] = 0.0  # whole blocks of zeros, and short ones
        yield weight.to(DTYPES[index % 3])


def _extremes():
    top = torch.finfo(torch.float32).max
    middles = (torch.tensor(CODE)[1:] + torch.tensor(CODE)[:-1]) / 2
    yield torch.full((4, 64), 0.25)  # all absmax equal: the second level has nothing to scale
    yield torch.zeros(3, 70)
    yield torch.linspace(-1, 1, 130)[None] * (top / 4)  # a mean over all blocks must stay finite
    yield torch.linspace(-1, 1, 128)[None] * 1e-37
    above = torch.nextafter(middles, torch.ones(15))
    yield torch.cat([torch.ones(1), middles, above, middles, above, middles[:3]])[None]
    yield torch.tensor([[-0.0, 3.0], [3.0, -3.0]])


@pytest.mark.parametrize(
    "weight", [*_cases(33), *_extremes()], ids=lambda w: f"{tuple(w.shape)}-{w.dtype}"[1:-1]
)
def test_bits_equal_bitsandbytes(weight):
    functional = pytest.importorskip("bitsandbytes.functional")
    ours = quantize_nf4(weight)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    assert torch.equal(ours.packed, packed.view(-1))
    assert torch.equal(ours.absmax, state.absmax.view(-1))
    assert torch.equal(
        ours.scales.view(torch.float32), torch.cat([state.state2.absmax, state.offset.view(1)])
    )
    # one row: its AVX-512 kernel is wrong for rows of 80 or 48
    state.shape = torch.Size((weight.numel(),))
    with torch.compiler.set_stance("force_eager"):  # it compiles its path for odd lengths: 10 s
        theirs = functional.dequantize_4bit(packed, state).view(weight.shape)
    assert torch.equal(dequantize(ours, weight.dtype), theirs)
    assert torch.equal(dequantize_plain(ours, weight.dtype), theirs)


def test_every_value_takes_the_nearest_code_of_its_block():
    weight = torch.randn(40, 96, generator=torch.Generator().manual_seed(1))
    blocks = weight.view(-1, 64)
    absmax = blocks.abs().amax(1, keepdim=True)
    nearest = (blocks[..., None] / absmax[..., None] - torch.tensor(CODE)).abs().argmin(-1).view(-1)
    packed = quantize_nf4(weight).packed
    assert torch.equal(torch.stack([packed >> 4, packed & 15], 1).view(-1), nearest.to(torch.uint8))
    values = dequantize(quantize_nf4(weight)).view(-1, 64)
    torch.testing.assert_close(
        values, torch.tensor(CODE)[nearest].view(-1, 64) * absmax, rtol=0.05, atol=0
    )


def test_chunks_join_without_a_seam(monkeypatch):
    weight = torch.randn(90, 70, generator=torch.Generator().manual_seed(2))
    whole = quantize_nf4(weight)
    values = dequantize_plain(whole)
    monkeypatch.setattr(nf4, "CHUNK", 256)
    assert all(torch.equal(a, b) for a, b in zip(quantize_nf4(weight)[:3], whole[:3], strict=True))
    assert torch.equal(dequantize_plain(whole), values)


def test_bytes_per_weight():
    q = quantize_nf4(torch.ones(512, 1024))
    n = 512 * 1024
    assert sum(t.nbytes for t in q[:3]) == n // 2 + n // 64 + n // 64 // 256 * 4 + 4


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_non_finite_weight_is_refused(bad):
    weight = torch.ones(3, 50)
    weight[1, 7] = bad
    with pytest.raises(UserError, match="inf or NaN"):
        quantize_nf4(weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_and_its_gradient_equal_the_dense_layer(dtype):
    torch.manual_seed(0)
    linear = nn.Linear(96, 40, dtype=dtype)
    layer = NF4Linear(linear.weight, linear.bias)
    x = torch.randn(2, 9, 96, dtype=dtype, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    dense_x = x.detach().clone().requires_grad_()
    dense = nn.functional.linear(dense_x, layer.dequantize(dtype), layer.bias)
    dense.sum().backward()
    assert y.dtype == dtype and torch.equal(y, dense)
    torch.testing.assert_close(x.grad, dense_x.grad)


def test_backward_saves_no_tensor():
    layer, saved = NF4Linear(torch.randn(64, 64)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(torch.randn(5, 64, requires_grad=True)).sum()
    assert [t.shape for t in saved if t.dim()] == []


def test_autocast_computes_in_its_dtype():
    layer, x = NF4Linear(torch.randn(64, 64)), torch.randn(5, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad.dtype == torch.float32


def test_load_state_dict_and_casts():
    weight, bias = torch.randn(50, 128), torch.randn(50)
    layer = NF4Linear(weight, bias)
    assert not list(layer.parameters())
    before = layer.dequantize()
    # the scales are no floating-point buffers
    assert torch.equal(layer.to(torch.bfloat16).dequantize(), before)
    copy = NF4Linear(torch.zeros(50, 128), torch.zeros(50))
    copy.load_state_dict(layer.state_dict())
    assert torch.equal(copy.dequantize(), before) and torch.equal(
        copy.bias, bias.bfloat16().float()
    )


def test_works_and_says_so_without_bitsandbytes(monkeypatch, capsys):
    weight = quantize_nf4(torch.randn(8, 64))
    expected = dequantize(weight)
    # what Python does for a module that must not be imported
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    nf4._bitsandbytes.cache_clear()
    try:
        assert torch.equal(dequantize(weight), expected) and torch.equal(
            dequantize(weight), expected
        )
    finally:
        nf4._bitsandbytes.cache_clear()
    assert capsys.readouterr().err.count("bitsandbytes cannot be used here") == 1


def test_a_kernel_that_differs_is_not_used(monkeypatch, capsys):
    monkeypatch.setattr(
        nf4, "_dequantize_bitsandbytes", lambda weight, dtype: dequantize_plain(weight, dtype) + 1
    )
    nf4._bitsandbytes.cache_clear()
    try:
        assert nf4._bitsandbytes("cpu") is False
    finally:
        nf4._bitsandbytes.cache_clear()
    assert "NF4" in capsys.readouterr().err


@pytest.fixture
def probes(monkeypatch):
    monkeypatch.setattr(nf4, "_refusals", {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_few_rows_are_multiplied_with_the_packed_weight_while_answering(monkeypatch, probes, dtype):
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    layer = NF4Linear(torch.randn(96, 128), torch.randn(96))
    copies = []
    dense = NF4Linear.dequantize
    x = torch.randn(2, nf4.FEW_ROWS // 2 + 1, 128, dtype=dtype, requires_grad=True)
    few = x[:, :-1]
    expected = layer(few)
    monkeypatch.setattr(NF4Linear, "dequantize", lambda *how: copies.append(1) or dense(*how))
    layer(few)
    assert copies == [1]  # in training
    layer.eval()
    answer = layer(few)
    assert copies == [1] and answer.dtype == dtype
    torch.testing.assert_close(answer, expected)
    (grad,) = torch.autograd.grad(answer.sum(), x, retain_graph=True)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.sum(), x)[0])
    copies.clear()
    layer(x)
    assert copies == [1]


def _forgetful(x, weight, bias):
    return nn.functional.linear(x, dequantize(weight, x.dtype))


def _wrong(x, weight, bias):
    """The first of two groups has a scale that is a fifth too large."""
    scales = weight.scales.clone()
    scales.view(torch.float32)[0] *= 1.2
    return nn.functional.linear(x, dequantize(weight._replace(scales=scales), x.dtype), bias)


def _raising(x, weight, bias):
    raise RuntimeError("no kernel image is available")


class _Older:
    """bitsandbytes before it had the product."""

    def __init__(self, operators):
        self.dequantize_4bit = operators.dequantize_4bit
        self.dequantize_blockwise = operators.dequantize_blockwise


FAULTY = {"wrong": _wrong, "forgetful": _forgetful, "raising": _raising}


@pytest.mark.parametrize("fault", [*FAULTY, "absent"])
def test_a_product_that_is_wrong_raises_or_is_absent_is_not_used(
    monkeypatch, probes, capsys, fault
):
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    layers = [NF4Linear(torch.randn(n, 128), torch.randn(n)).eval() for n in (256, 320)]
    x = torch.randn(1, 128)
    expected = [nn.functional.linear(x, layer.dequantize(), layer.bias) for layer in layers]
    if fault == "absent":
        monkeypatch.setattr(torch.ops, "bitsandbytes", _Older(torch.ops.bitsandbytes))
    else:
        monkeypatch.setattr(nf4, "_packed_product", FAULTY[fault])
    for _ in range(2):
        assert all(map(torch.equal, [layer(x) for layer in layers], expected))
    assert capsys.readouterr().err.count("cannot multiply with packed NF4 weights") == 1


def test_a_full_card_says_nothing_of_the_product(monkeypatch, probes):
    pytest.importorskip("bitsandbytes")
    layer, x = NF4Linear(torch.randn(96, 128)).eval(), torch.randn(1, 128)
    product = nf4._packed_product

    def full(*how):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(nf4, "_packed_product", full)
    with pytest.raises(torch.OutOfMemoryError):
        layer(x)
    monkeypatch.setattr(nf4, "_packed_product", product)
    layer(x)
    assert list(nf4._refusals.values()) == [""]


def test_one_decoded_row_moves_little_more_than_the_packed_weight(probes, monkeypatch):
    """Counted as bench/decode_bytes.py does."""
    pytest.importorskip("bitsandbytes")
    # taken back: bench/llama_cpp.py would pass for the package of that name
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "bench"))
    from decode_bytes import Traffic

    layer = NF4Linear(torch.randn(1024, 2048)).eval()
    x = torch.randn(1, 2048, dtype=torch.bfloat16)
    stored = sum(tensor.nbytes for tensor in layer.buffers())
    moved = {}
    with torch.no_grad():
        layer(x)  # the probe
        for mode in ("packed", "dequantized"):
            with Traffic() as traffic:
                layer.train(mode == "dequantized")(x)
            moved[mode] = traffic.bytes / stored
    assert 1 <= moved["packed"] < 1.05 and moved["dequantized"] > 7


def qlora_pair(dtype):
    """(reference of bitsandbytes + PEFT, ours) with the same NF4 weights and random adapters,
    computing in `dtype`; names -> adapters.
    """
    bnb, peft = pytest.importorskip("bitsandbytes"), pytest.importorskip("peft")
    from transformers import LlamaConfig, LlamaForCausalLM

    from cllm.model.adapter import adapter_tensors
    from cllm.model.lora import inject_lora

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    reference, ours = LlamaForCausalLM(config), LlamaForCausalLM(config)
    ours.load_state_dict(reference.state_dict())
    reference, ours = reference.to(dtype), ours.to(dtype)
    for name, linear in [*reference.model.named_modules()]:
        if isinstance(linear, nn.Linear):
            four_bit = bnb.nn.Linear4bit(
                linear.in_features,
                linear.out_features,
                bias=False,
                compute_dtype=dtype,
                quant_type="nf4",
            )
            four_bit.weight = bnb.nn.Params4bit(
                linear.weight.data, requires_grad=False, quant_type="nf4"
            ).to("cpu")
            reference.model.set_submodule(name, four_bit)
            linear = ours.model.get_submodule(name)
            ours.model.set_submodule(name, NF4Linear(linear.weight, linear.bias))
    reference.is_loaded_in_4bit = True
    reference = peft.get_peft_model(
        reference, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    )
    inject_lora(ours, rank=4, alpha=8)
    tensors = adapter_tensors(ours)
    theirs = {
        name.replace(".default", ""): p
        for name, p in reference.named_parameters()
        if "lora_" in name
    }
    assert theirs.keys() == tensors.keys() and len(theirs) == 28
    with torch.no_grad():
        for name, parameter in theirs.items():
            tensors[name].copy_(parameter.normal_(0, 0.05))
    return (reference, theirs), (ours, tensors)


def qlora_step(model, adapters):
    ids = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(4))
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item(), {name: parameter.grad.double() for name, parameter in adapters.items()}


def test_qlora_equals_bitsandbytes_and_peft():
    """Loss and adapter gradients of one batch in float32, relative to the largest gradient of each
    tensor.
    """
    (loss, wanted), (ours, found) = (qlora_step(*side) for side in qlora_pair(torch.float32))
    assert ours == pytest.approx(loss, rel=1e-5)
    for name, gradient in wanted.items():
        assert (found[name] - gradient).abs().max() / gradient.abs().max() < 1e-5, name


def test_qlora_in_bf16_is_as_near_to_float32_as_bitsandbytes_and_peft():
    """Norm-relative distance of all adapter gradients: ours to theirs below 1e-2, ours to the
    float32 truth at most 1.1 times theirs.

    The reference runs under bf16 autocast, as Trainer runs it. The truth computes in float32 with
    the very weights that bf16 holds (norms, embedding) and dequantizes.
    """
    pair = qlora_pair(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        _, theirs = qlora_step(*pair[0])
    _, ours = qlora_step(*pair[1])
    model, adapters = pair[1]
    for module in model.modules():
        if isinstance(module, NF4Linear):
            module.dequantize = lambda dtype, _module=module: NF4Linear.dequantize(
                _module, torch.bfloat16
            ).to(dtype)
    for parameter in adapters.values():
        parameter.grad = None
    _, truth = qlora_step(model.float(), adapters)

    def distance(left, right):
        names = list(right)
        a, b = (torch.cat([side[name].flatten() for name in names]) for side in (left, right))
        return ((a - b).norm() / b.norm()).item()

    assert distance(ours, truth) <= 1.1 * distance(theirs, truth), (
        distance(ours, truth),
        distance(theirs, truth),
    )
    assert distance(ours, theirs) < 1e-2, distance(ours, theirs)
