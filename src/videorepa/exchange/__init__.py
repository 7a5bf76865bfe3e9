"""Weights on their way in and out: LoRA files, ZeRO checkpoints, model cards, the stock check."""
