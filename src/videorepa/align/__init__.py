"""Brings a student's tokens and a teacher's onto one grid, and compares them while a model trains.

The steps are: tap a block (`taps`), bring both sides to one grid (`resampling`) and one width
(`projector`), compare them by the recipe's terms (`terms`), and measure each term's gradient
(`gradients`). `contract` checks a recipe's shapes before any of this runs.
"""

from videorepa.align.projector import Projector
from videorepa.align.resampling import resample
from videorepa.align.taps import tap

__all__ = ["Projector", "resample", "tap"]
