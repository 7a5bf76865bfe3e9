"""The lab's best teacher: no network, but what the simulator knows of the bodies in each token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field, field_validator
from torch import Tensor

from videorepa.encoders import Encoder, EncoderSpec, Sizes
from videorepa.settings.bounds import Frames, Side
from videorepa.system.fingerprint import json_digest
from videorepa.tokens import TokenGrid
from videorepa.world.render import visible
from videorepa.world.simulator import (
    COLOURS,
    SIZE,
    TOUCHED,
    VERSION,
    Scene,
    Trajectory,
    simulate,
    until_contact,
)

FORMAT = 1
"""Raised whenever the same scene would get other tokens."""

SPEED = 2.0
"""The speed that counts as 1, in pixels a frame. Most bodies that move have 1 to 4."""

HORIZON = 4.0
"""How far ahead contact counts, in multiples of tau; a later one would count for less than 0.02."""

FACTS = 3 + len(TOUCHED)
"""Channels of a body: its share, its velocity and how near it is to touching something."""

TELLS: dict[str, list[int]] = {
    "place": [0],
    "motion": [1, 2],
    "contact": [*range(3, FACTS)],
}
"""The channels of a body by what they tell."""

Tells = Literal["place", "motion", "contact", "scene"]


class Truth(EncoderSpec):
    """The simulator's own state. No teacher can tell more of a clip of the lab.

    Each colour of bodies has six channels: the share of the token that such a body covers, in area
    and time; this share times the body's velocity to the right and down, in 2 pixels a frame; and
    this share times exp(-time / tau), with the time until the body touches the floor, a plank or
    another body. Three more are the shares of planks, of the screen and of the room. What is hidden
    covers nothing.

    Args:
      patch: Pixels along a side of a token.
      tubelet: Frames that a token covers.
      tau: Frames in which the nearness of a contact falls to 1/e.
      tells: Which of these are told: "place" is the bodies' shares, "motion" their velocities,
        "contact" what they near, and "scene" the last three shares.
    """

    reads_scenes: ClassVar[bool] = True

    name: Literal["truth"] = "truth"
    weights: Literal["none"] = "none"
    frames: Frames = 16
    height: Literal[64] = SIZE
    width: Literal[64] = SIZE
    # Tokens know nothing of pixels, nor of each other.
    normalized: Literal[False] = False
    group: None = None
    crop: None = None
    patch: Side = 8
    tubelet: Frames = 2
    tau: float = Field(default=4.0, gt=0, le=100)
    tells: tuple[Tells, ...] = Field(("place", "motion", "contact", "scene"), min_length=1)

    @field_validator("tells")
    @classmethod
    def _once(cls, tells: tuple[Tells, ...]) -> tuple[Tells, ...]:
        if len(set(tells)) < len(tells):
            raise ValueError(f"each is told once; got {', '.join(tells)}")
        return tells

    @property
    def _channels(self) -> list[int]:
        """Which of all channels a token has, in their order."""
        facts = sorted(fact for name, of in TELLS.items() if name in self.tells for fact in of)
        bodies = [body * FACTS + fact for body in range(len(COLOURS)) for fact in facts]
        last = FACTS * len(COLOURS)
        return bodies + ([last, last + 1, last + 2] if "scene" in self.tells else [])

    def shape(self, clip_frames: int) -> TokenGrid:
        return self.patch_grid(Sizes(len(self._channels), self.patch, self.tubelet), clip_frames)

    def fingerprint(self) -> dict[str, str]:
        return {"encoder": json_digest([FORMAT, VERSION, self.model_dump()])}

    def load(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Encoder:
        self.shape(self.frames)  # Raises for sizes that do not divide.
        return TruthEncoder(self)

    def tokens(self, scene: Scene, frames: int) -> Float[np.ndarray, "t h w d"]:
        """The tokens of a scene's clip of so many frames."""
        start = self.first_frame(frames)
        path = simulate(scene, frames + 1)
        shown = Trajectory(path.positions[:-1], path.angles[:-1], path.touched[:-1])
        velocity = np.diff(path.positions, axis=0) / SPEED
        waits = until_contact(scene, frames, math.ceil(HORIZON * self.tau))
        facts = np.concatenate(
            [np.ones_like(velocity[..., :1]), velocity, np.exp(-waits / self.tau)], -1
        )
        steps, rows, columns = self.shape(frames).size
        shares = visible(scene, shown).reshape(frames, rows, self.patch, columns, self.patch, -1)
        shares = shares.mean((2, 4))
        bodies = np.zeros((frames, rows, columns, len(COLOURS), FACTS))
        for index, body in enumerate(scene.bodies):
            of_body = shares[..., index, None] * facts[:, None, None, index]
            bodies[..., list(COLOURS).index(body.colour), :] += of_body
        still = shares[..., len(scene.bodies) :]
        by_frame = np.concatenate([bodies.reshape(*still.shape[:3], -1), still], -1)[start:]
        by_step = by_frame.reshape(steps, self.tubelet, *by_frame.shape[1:])
        return by_step.mean(1)[..., self._channels].astype(np.float32)


class TruthEncoder(Encoder):
    """Gives the tokens of scenes, always in float32."""

    def __init__(self, spec: Truth) -> None:
        super().__init__(spec, spec.tubelet)
        self.truth = spec

    def forward(self, video: Float[Tensor, "b f 3 h w"]) -> TokenGrid:
        return self.see(video, [None] * len(video))

    def see(self, video: Float[Tensor, "b f 3 h w"], scenes: Sequence[Scene | None]) -> TokenGrid:
        drawn = [scene for scene in scenes if scene is not None]
        self.truth.check_sees(has_scenes=len(drawn) == len(video))
        frames = video.shape[1]
        tokens = np.stack([self.truth.tokens(scene, frames) for scene in drawn])
        start = self.truth.first_frame(frames)
        return TokenGrid(torch.from_numpy(tokens).to(video.device), start, self.stride)
