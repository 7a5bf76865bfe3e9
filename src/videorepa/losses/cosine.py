"""REPA: each student token points where the teacher's token does (arXiv 2410.06940)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from videorepa.losses import Loss, check_same_grid, unit_tokens
from videorepa.tokens import TokenGrid


class Cosine(Loss):
    """REPA: loss = -mean over tokens i of cos(s_i, y_i), from -1 (equal directions) to 1."""

    name: Literal["cosine"] = "cosine"

    def __call__(self, student: TokenGrid, teacher: TokenGrid) -> Tensor:
        check_same_grid(student, teacher, widths=True)
        with torch.autocast(student.tokens.device.type, enabled=False):
            return -(unit_tokens(student) * unit_tokens(teacher).detach()).sum(-1).mean()
