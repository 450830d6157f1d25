"""One assembly for every program: device, placement, memory, and what happens when it runs out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_checkpoint
from serving import tiny_run

from cllm import assembly, export, fidelity
from cllm.assembly import assemble, open_model
from cllm.config import LoraConfig, MemoryConfig, ModelConfig
from cllm.fit import estimate_answering
from cllm.memory import GIB, Settings
from cllm.messages import UserError
from cllm.model.checkpoint import Placement, load_model, original_config
from cllm.model.device import cap_allocator, choose_device, free_bytes
from cllm.model.offload import decoder_layers
from cllm.model.source import resolve
from cllm.trace import weighed

CPU = torch.device("cpu")


@pytest.fixture
def two_cards(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """torch.cuda as it is with two cards, and the calls that name one."""
    calls: list[Any] = []

    def indexed(device: Any) -> torch.device:
        device = torch.device(device)
        assert device.index is not None, "an index is needed here, as in PyTorch"
        calls.append(device)
        return device

    def set_device(device: Any) -> None:
        if torch.device(device).index > 1:
            raise RuntimeError("CUDA error: invalid device ordinal")
        calls.append(("current", torch.device(device)))

    cuda = torch.cuda
    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "init", lambda: None)
    monkeypatch.setattr(cuda, "device_count", lambda: 2)
    monkeypatch.setattr(cuda, "current_device", lambda: 0)
    monkeypatch.setattr(cuda, "set_device", set_device)
    monkeypatch.setattr(cuda, "mem_get_info", lambda device: (7 * GIB, 8 * GIB))
    monkeypatch.setattr(cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(cuda, "memory_allocated", lambda device: 0)
    monkeypatch.setattr(cuda, "get_per_process_memory_fraction", lambda device: 0.5)
    monkeypatch.setattr(
        cuda, "set_per_process_memory_fraction", lambda share, device: indexed(device)
    )
    return calls


@pytest.mark.parametrize(
    ("name", "index"), [("auto", 0), ("cuda", 0), ("cuda:0", 0), ("cuda:1", 1)]
)
def test_a_gpu_has_its_index_from_the_start(name: str, index: int, two_cards: list[Any]) -> None:
    device = choose_device(name)
    assert device == torch.device("cuda", index)
    assert two_cards == [("current", device)]  # generators and contexts are of this card
    assert cap_allocator(4.0, device) == 4 * GIB and two_cards[-1] == device
    assert free_bytes(device) == 4 * GIB  # half of the card is what the cap leaves


@pytest.mark.parametrize(("name", "code"), [("cuda:7", "memory.no_card"), ("gpu", "memory.no_gpu")])
def test_a_device_that_is_none_is_one_line(name: str, code: str, two_cards: list[Any]) -> None:
    with pytest.raises(UserError) as error:
        choose_device(name)
    assert error.value.code == code and "\n" not in str(error.value)


def test_a_build_for_cpus_beside_a_card_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    monkeypatch.setattr("shutil.which", lambda name: name if name == "nvidia-smi" else None)
    assert choose_device("auto") == CPU
    said = capsys.readouterr().err
    assert torch.__version__ in said and "pip install" in said
    monkeypatch.setattr("cllm.model.device._nvidia_driver", lambda: False)
    assert choose_device("auto") == CPU and capsys.readouterr().err == ""


def test_a_run_is_opened_as_its_memory_section_says(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    with (run / "config.toml").open("a", encoding="utf-8") as file:
        file.write("[memory]\nstream_layers = 2\nmlp_tile_tokens = 16\nbudget_gib = 3.0\n")
    opened = open_model(run).assembly
    assert opened.settings.stream_layers == 2 and opened.budget == 3 * GIB
    for layer in decoder_layers(opened.model):
        assert layer.forward.weights is not None and layer.mlp.forward.tokens == 16
    plain = open_model(run, memory=MemoryConfig()).assembly
    ids = torch.arange(3, 9)[None]
    streamed, resident = (m(input_ids=ids).logits for m in (opened.model, plain.model))
    assert torch.equal(streamed, resident)


def test_a_bare_model_is_held_in_the_finest_format_that_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside the keys and values of the context; a run stays as it was trained."""
    base = byte_checkpoint(tmp_path / "base")
    original = original_config(base)
    settings = Settings.of(
        ModelConfig(), MemoryConfig(), None, row_tokens=2048, precision="fp32", device="cpu"
    )
    need, least = (
        estimate_answering(original, replace(settings, quantize=name)).total
        for name in ("none", "nf4")
    )
    assert least < need
    token = weighed(original, replace(settings, rank=1)).token

    def opened(budget: int, source: Path = base, **options: Any) -> tuple[str, str]:
        memory = MemoryConfig(budget_gib=budget / GIB)
        options = {"formats": ("none", "nf4"), "device": "cpu", **options}
        loaded = open_model(source, memory=memory, **options)
        return loaded.assembly.settings.quantize, capsys.readouterr().err

    assert opened(need + 2048 * token)[0] == "none"
    chosen, said = opened(need + 2047 * token)
    assert chosen == "nf4" and "--quantize none" in said
    assert opened(need + 2047 * token, context=2047)[0] == "none"
    assert opened(need + 2048 * token, context=4096)[0] == "nf4"
    assert opened(need, formats=(), quantize="none")[0] == "none"
    assert opened(need, tiny_run(tmp_path))[0] == "none"


def test_a_bare_model_waits_in_host_memory_as_one_with_an_adapter_does() -> None:
    """What is not frozen cannot be streamed; without an adapter nothing was."""
    ids = torch.tensor([[5, 6, 7]])
    whole, streamed = (
        assemble(resolve("tiny-zh"), ModelConfig(), MemoryConfig(stream_layers=n), device="cpu")
        for n in (0, 3)
    )
    assert streamed.settings.stream_layers == 3
    with torch.no_grad():
        assert torch.equal(streamed.model(ids).logits, whole.model(ids).logits)


def test_a_run_from_another_machine_is_opened_where_one_can(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    run = tiny_run(tmp_path)
    config = (run / "config.toml").read_text(encoding="utf-8")
    (run / "config.toml").write_text(config + "device = 'cuda:1'\n", encoding="utf-8")
    assert open_model(run).assembly.device == CPU
    assert "is not here" in capsys.readouterr().err


def test_what_waits_in_host_memory_never_visits_the_device(tmp_path: Path) -> None:
    """On the meta device as the card: the largest tensor that is ever there is a linear layer's."""
    base = byte_checkpoint(tmp_path / "base")
    embedding = torch.Size([259, 32])
    visited: list[torch.Size] = []
    to = torch.Tensor.to

    def watched(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        moved = to(tensor, *args, **kwargs)
        if moved.device.type == "meta" and tensor.device.type != "meta":
            visited.append(moved.shape)
        return moved

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "to", watched)
        model: Any = load_model(base, Placement(device="meta", embedding="cpu", stream_layers=1))
    assert model.get_input_embeddings().weight.device == CPU
    assert model.get_output_embeddings().weight.device.type == "meta"
    assert visited.count(embedding) == 1  # the head, which has the same shape and computes there
    streamed = [layer for layer in decoder_layers(model) if layer.mlp.up_proj.weight.device == CPU]
    assert len(streamed) == 1


def boom(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_out_of_memory_while_loading_moves_layers_to_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base, load = byte_checkpoint(tmp_path / "base"), assembly.load_model

    def full_card(path: Path, placement: Placement) -> Any:
        return load(path, placement) if placement.stream_layers else boom()

    monkeypatch.setattr(assembly, "load_model", full_card)
    model, memory = ModelConfig(device="cpu"), MemoryConfig()
    made = assemble(base, model, memory, adapter=LoraConfig(rank=2), row_tokens=64)
    assert made.settings.stream_layers >= 2 and made.settings.embedding == "cpu"
    assert "Tried to allocate 2.00 GiB" in capsys.readouterr().err
    monkeypatch.setattr(assembly, "load_model", boom)
    with pytest.raises(UserError) as error:
        assemble(base, model, memory, row_tokens=64)
    assert error.value.code == "memory.load" and "\n" not in str(error.value)


def test_an_export_is_compared_on_the_cpu_where_the_card_has_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, measured = tiny_run(tmp_path), fidelity._compared
    devices: list[str] = []

    def small_card(*args: Any, device: str) -> Any:
        devices.append(device)
        return measured(*args, device=device) if device else boom()

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(fidelity, "_compared", small_card)
    assert export.main([str(run), str(tmp_path / "out"), "--to", "merged"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out.strip().split("\n")[-1])["check"]
    assert devices == ["", "cpu"] and report["passed"] and "on the CPU" in err


def test_what_was_written_is_kept_where_the_check_could_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = tiny_run(tmp_path), tmp_path / "out"
    monkeypatch.setattr(fidelity, "_compared", boom)
    with pytest.raises(UserError) as error:
        export.main([str(run), str(out), "--to", "merged"])
    assert error.value.code == "export.unchecked"
    assert (out / "model.safetensors").is_file() and list(tmp_path.glob("out.*")) == []


def test_one_prompt_that_differs_fails_the_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out, measured = tiny_run(tmp_path), tmp_path / "out", fidelity._compared

    def one_less(*args: Any, device: str) -> Any:
        report = measured(*args, device=device)
        return {**report, "prompts_equal": report["prompts"] - 1}

    monkeypatch.setattr(fidelity, "_compared", one_less)
    with pytest.raises(UserError) as error:
        export.main([str(run), str(out), "--to", "merged"])
    assert error.value.code == "export.differs" and not out.exists()


def test_the_allocator_is_told_before_torch_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    from cllm import __main__

    monkeypatch.setattr("sys.platform", "linux")
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    __main__._configure_allocator()
    import os

    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    __main__._configure_allocator()
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "max_split_size_mb:64"
