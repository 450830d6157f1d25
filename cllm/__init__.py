"""cllm: LoRA and QLoRA fine-tuning of Chinese language models on one 8 GB GPU, in plain PyTorch."""

__version__ = "0.1.0"
