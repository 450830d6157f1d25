"""Tiny random models of several architectures, built once per session, and the path of the shared
oracles.
"""

from __future__ import annotations

import json
import os

os.environ.setdefault("CLLM_LANG", "en")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# a worker for each core: more threads would only wait for each other
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import atexit
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" not in os.environ:
    # one for all workers and the programs they start; tests that are about the cache set their own
    os.environ["CLLM_DATA_CACHE"] = tempfile.mkdtemp(prefix="cllm-tests-")
    atexit.register(shutil.rmtree, os.environ["CLLM_DATA_CACHE"], ignore_errors=True)

SHARED = Path(__file__).resolve().parents[2] / "shared"


NATIVE = (
    *(
        "llama",
        "llama-tied",
        "llama3-rope",
        "qwen2",
        "qwen3",
        "qwen3.5",
        "glm",
        "glm4",
        "gemma2",
        "gemma3",
        "gpt2",
    ),
    *("internlm3", "hunyuan", "minicpm3"),
)


def tiny_config(architecture: str) -> Any:
    """A config of a few thousand parameters: 2 layers, hidden 32, 4 heads, vocabulary 96. Skips
    what this Transformers lacks.
    """
    import transformers as t

    llama = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }
    linear = {
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    }
    low_rank = {
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 4,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
    }
    stretched = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    table: dict[str, Callable[[], object]] = {
        "internlm3": lambda: t.CONFIG_MAPPING["internlm3"](**llama, head_dim=8),
        "hunyuan": lambda: t.CONFIG_MAPPING["hunyuan_v1_dense"](**llama, head_dim=8),
        "minicpm3": lambda: t.CONFIG_MAPPING["minicpm3"](
            **llama | {"num_key_value_heads": 4}, **low_rank
        ),
        "bloom": lambda: t.BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4),
        "glm4": lambda: t.Glm4Config(**llama, head_dim=8),
        "qwen3.5": lambda: t.CONFIG_MAPPING["qwen3_5_text"](
            **llama, head_dim=8, layer_types=["linear_attention", "full_attention"], **linear
        ),
        "llama-tied": lambda: t.LlamaConfig(**llama, tie_word_embeddings=True),
        "llama3-rope": lambda: t.LlamaConfig(
            **llama, rope_parameters={**stretched, "original_max_position_embeddings": 64}
        ),
        "llama": lambda: t.LlamaConfig(**llama),
        "qwen2": lambda: t.Qwen2Config(**llama),
        "qwen3": lambda: t.Qwen3Config(**llama, head_dim=8),
        "glm": lambda: t.GlmConfig(**llama, head_dim=8, attention_bias=True),
        "gemma3": lambda: t.Gemma3TextConfig(
            **llama,
            head_dim=8,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"],
            query_pre_attn_scalar=8,
        ),
        "gemma2": lambda: t.Gemma2Config(
            **llama, head_dim=8, sliding_window=8, query_pre_attn_scalar=8
        ),
        "gpt2": lambda: t.GPT2Config(
            vocab_size=96,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=256,
            bos_token_id=2,
            eos_token_id=1,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        ),
    }
    try:
        return table[architecture]()
    except KeyError:
        pytest.skip(f"this Transformers has no {architecture}")


def tiny_model(architecture: str, seed: int = 0, attention: str = "cllm"):  # type: ignore[no-untyped-def]
    """A random model of `architecture` in float32 with the given attention implementation."""
    import torch
    from transformers import AutoModelForCausalLM

    from cllm.model.attention import register

    register()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        tiny_config(architecture), attn_implementation=attention
    )
    # larger weights than the default 0.02, so that differences between tokens are visible
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    return model.eval()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of oracles beside the checkout; tests that need it skip without it."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared")
    return SHARED


def byte_checkpoint(directory: Path) -> Path:
    """A random two-layer Llama with a byte-level tokenizer and ChatML tokens, as a native
    checkpoint directory.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    directory.mkdir(parents=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    names = {
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(names), encoding="utf-8")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of `byte_checkpoint`, shared by all tests: read only."""
    return byte_checkpoint(tmp_path_factory.mktemp("models") / "bytes")


def demo_rows(count: int = 40) -> list[dict[str, str]]:
    """Numbers spelled digit by digit, in two categories."""
    digits = "零一二三四五六七八九"
    return [
        {
            "instruction": f"写出数字{n}",
            "output": "".join(digits[int(d)] for d in str(n)),
            "task": "AB"[n % 2],
        }
        for n in range(count)
    ]


@pytest.fixture
def config(tmp_path: Path, checkpoint: Path, request: pytest.FixtureRequest) -> Path:
    """A config over 40 rows that trains six steps in about a second; under `BOTH_KINDS` also one
    over 40 pairs with a preference loss.
    """
    if getattr(request, "param", "sft") == "sft":
        return write_config(tmp_path, checkpoint, demo_rows())
    return pairs_config(tmp_path, checkpoint)


BOTH_KINDS = pytest.mark.parametrize("config", ["sft", "preference"], indirect=True)


def pairs_config(folder: Path, checkpoint: Path) -> Path:
    """`write_config` with pairs: the same questions, and another row's answer rejected."""
    asked = demo_rows()
    pairs = []
    for number, row in enumerate(asked):
        wrong = f"{asked[number - 1]['output']}{number}"
        pairs.append({**row, "chosen": row["output"], "rejected": wrong})
        del pairs[-1]["output"]
    path = write_config(folder, checkpoint, pairs)
    text = path.read_text(encoding="utf-8").replace("dropout = 0.1", "dropout = 0.0")
    text = text.replace("[train]", "[train]\nepochs = 3.0\nwarmup = 0.03")  # as SFT's
    path.write_text(text + '[preference]\nloss = "dpo"\n', encoding="utf-8")
    return path


def write_config(folder: Path, checkpoint: Path, rows: list[dict[str, str]]) -> Path:
    """run.toml in `folder`, beside its data."""
    (folder / "data.jsonl").write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    path = folder / "run.toml"
    path.write_text(
        f"""
[model]
path = {json.dumps(str(checkpoint))}
template = "chatml"
device = "cpu"
[lora]
rank = 4
dropout = 0.1
[data]
train = {json.dumps(str(folder / "data.jsonl"))}
held_out = 0.2
[train]
steps = 6
row_tokens = 128
tokens_per_step = 256
learning_rate = 2e-2
[eval]
every = 3
samples = 4
max_new_tokens = 8
[run]
dir = {json.dumps(str(folder / "runs" / "a"))}
""",
        encoding="utf-8",
    )
    return path
