"""Measures a training step's time and memory beside what is predicted for it."""

from __future__ import annotations

import time

import torch

from videorepa.data.batches import Batch
from videorepa.recipe import Recipe
from videorepa.system.device import peak_memory
from videorepa.tokens import TokenGrid
from videorepa.training.cost import predict
from videorepa.training.parallel import Alone
from videorepa.training.state import Training
from videorepa.training.student import Student
from videorepa.verifying.pipeline import drawn_text
from videorepa.verifying.record import Verification

CLOSE = 0.15
"""How far the measured memory may be from the predicted one, as a share."""


def measure_step(record: Verification, recipe: Recipe, device: torch.device) -> None:
    """Take two steps on drawn values of the recipe's sizes, and measure the second.

    On the CPU the memory is the process's, whose peak so far is known and no later one.
    """
    cost = predict(recipe, device)
    # What CUDA takes for itself is not measured.
    predicted = cost.peak - cost.parts.get("context", 0)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    before = peak_memory(device)
    student = Student(recipe, device)
    training = Training(recipe, Alone(device), student)
    batch = _batch(recipe, student, device)
    optim, seconds, loss = recipe.optim, 0.0, torch.zeros(())
    with student.tapped():
        for step in range(2):
            begun = time.monotonic()
            # A third micro-batch takes what a second one does.
            micros = min(2, optim.accumulate)
            for _ in range(micros):
                denoised, aligned = training.model(step, batch)
                loss = denoised.loss.mean()
                ((loss + aligned.loss) / optim.accumulate).backward()
            norm = training.clip_gradients()
            training.update(optim.learning_rate)
            is_finite = bool(loss.isfinite() and norm.isfinite())  # Also waits for the device.
            seconds = (time.monotonic() - begun) * optim.accumulate / micros
    record.add(
        "step",
        "ok" if is_finite else "fails",
        f"{optim.batch_size * optim.accumulate} clips in {seconds:.3g} s; loss {loss.item():.4g}, "
        f"gradient {norm.item():.4g}",
    )
    measured = peak_memory(device)
    record.measured |= {"seconds": round(seconds, 4), "predicted_bytes": predicted}
    words = f"{predicted / 1e9:.2f} GB predicted"
    if measured == before and device.type == "cpu":
        record.add("memory", "open", f"{words}; earlier work of this process took more")
        return
    record.measured["measured_bytes"] = measured
    ratio = predicted / measured
    record.add(
        "memory",
        "ok" if abs(ratio - 1) <= CLOSE else "doubtful",
        f"{words}, {measured / 1e9:.2f} GB measured: {ratio:.2f} of it",
    )


def _batch(recipe: Recipe, student: Student, device: torch.device) -> Batch:
    count, draw = recipe.optim.batch_size, torch.Generator().manual_seed(8)
    latents, noise = torch.randn(
        2, count, *recipe.backbone.shapes(recipe.data).latents, generator=draw
    ).to(device)
    one = drawn_text(recipe.backbone, torch.float32)
    text = {name: value.expand(count, *value.shape[1:]).to(device) for name, value in one.items()}
    teachers = {}
    for term in recipe.terms.values():
        if term.encoder is not None:
            shape = term.encoder.shape(recipe.data.frames)
            tokens = torch.randn(shape.tokens.shape, generator=draw)
            saliency = shape.saliency
            if saliency is not None:
                saliency = torch.ones(saliency.shape)
            grid = TokenGrid(tokens, shape.start, shape.stride, saliency)
            teachers[term.encoder] = TokenGrid.batch([grid] * count).to(device)
    timestep = student.backbone.sample_timesteps(latents, draw)
    opening = student.backbone.blank_opening(recipe.data, count)
    return Batch(latents, text, noise, timestep, teachers, opening)
