"""Brings a student's tokens and a teacher's onto one grid, and compares them while a model trains.

`taps` keeps a block's output. `resampling` brings both sides to one grid, and `projector` to one
width. `terms` compares them as the recipe says, and `gradients` measures each term's gradient.
`contract` checks a recipe's shapes before any of this runs.
"""

from videorepa.align.projector import Projector
from videorepa.align.resampling import resample
from videorepa.align.taps import tap

__all__ = ["Projector", "resample", "tap"]
