"""The lab: physics with ground truth, small enough for a laptop's CPU."""

from pathlib import Path


def micro_weights(model: str) -> Path:
    """The folder of a shipped micro model, "cogvideox", "videomae" or "dinov2", or the file of its
    teacher's head, "motion.safetensors"."""
    return Path(__file__).with_name("weights") / model
