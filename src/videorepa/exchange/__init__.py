"""Reads and writes weights for others: LoRA files, ZeRO checkpoints, model cards, stock checks."""
