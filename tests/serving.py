"""A run directory with a tiny random model, for the tests of the engine's front ends: every byte is
a token, so any text goes in.
"""

from __future__ import annotations

from pathlib import Path

from cllm.assembly import Loaded, open_beside, open_model


def tiny_base(directory: Path) -> Path:
    """A Llama checkpoint of 2 layers over bytes, ChatML's two tokens and an end of text."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        eos_token_id=258,
        bos_token_id=None,
        pad_token_id=256,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                # logits far apart, so that greedy answers do not hang on rounding
                parameter.normal_(0, 0.3)
    model.save_pretrained(directory)
    return directory


def tiny_run(root: Path, name: str = "demo", seed: int = 1) -> Path:
    """A finished run over `tiny_base`: config.toml and an adapter that changes every answer."""
    import torch

    from cllm.model import inject_lora, load_model, load_tokenizer, save_adapter

    base = tiny_base(root / "base")
    run = root / "runs" / name
    model = load_model(base)
    torch.manual_seed(seed)
    for layer in inject_lora(model, rank=4, alpha=8).values():
        torch.nn.init.normal_(layer.lora_B, std=0.5)
    save_adapter(model, run / "adapter", base=str(base))
    load_tokenizer(base, template="chatml").save(run / "adapter")
    (run / "config.toml").write_text(f"[model]\npath = '{base}'\n", encoding="utf-8")
    return run


def open_tiny(root: Path) -> Loaded:
    return open_model(tiny_run(root), device="cpu")


def open_two(root: Path) -> Loaded:
    """Two adapters over one copy of the base."""
    loaded = open_model(tiny_run(root), device="cpu")
    open_beside(loaded, tiny_run(root, "other", seed=2))
    return loaded
