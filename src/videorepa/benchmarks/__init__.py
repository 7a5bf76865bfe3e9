"""Benchmarks: what to generate, how to score a clip, and how scores become a table.

A benchmark is a module of this package that defines a subclass of `Benchmark` with a literal `name`
and the benchmark's settings as fields.

A row is a dict that holds one clip's score: "prompt_id", "k" (the number of the sample for that
prompt), "scenario" (or None), "clip" (the digest of the video), and everything that
`Benchmark.about`, `Benchmark.about_prompt` and `Benchmark.score` returned.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from videorepa.artifacts.scores import Better, Row
from videorepa.data.manifest import Prompt
from videorepa.errors import UserError
from videorepa.settings.section import Section

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class ClipForm:
    """What clips have to be for a benchmark to score them.

    Attributes:
        frames: How many; a longer clip's first ones. None for any number.
        samples: Clips of each prompt; None for as many as the model's settings say.
        whole_image: Clips continue images, which are squeezed to the clips' shape and not cropped,
            since the scorer stretches clips to the shape of its films.
        shown: How many first frames models have to be shown, where these are drawn and no images;
            see `Benchmark.opening`. 0 for none.
        note: What the scorer has to do where its films are of another rate.
    """

    frames: int | None = None
    samples: int | None = None
    whole_image: bool = False
    shown: int = 0
    note: str = ""


class Benchmark(Section):
    """The base of all benchmarks. Making one is cheap: `load` loads a judge.

    In the methods below, a prompt is the caption that a clip is scored against. The clip may have
    been generated from a detailed version of it.

    Attributes:
        version: Changes whenever the same clip could get another score.
    """

    name: str
    version: ClassVar[str]

    @abstractmethod
    def prompts(self, count: int, seed: int) -> list[Prompt]:
        """What to generate. An id is unique within a benchmark and never changes.

        Args:
            count: The most prompts to return.
            seed: Chooses among several series of prompts, where the benchmark has them.
        """

    def every_prompt(self) -> list[Prompt]:
        """All prompts of a benchmark whose list is closed.

        Raises:
            UserError: Its list is open, or it has none.
        """
        closed = self.missing(())
        if not closed:
            raise UserError(
                f"The benchmark {self.name} has no list of prompts to generate from, as it is set. "
                "Give a .txt, .csv or .jsonl file of prompts."
            )
        return self.prompts(len(closed), 0)

    def form(self, fps: float) -> ClipForm:
        """What clips of the benchmark's prompts have to be.

        Args:
            fps: The frames per second that a model makes.

        Raises:
            UserError: The benchmark cannot score clips at that rate.
        """
        return ClipForm()

    def opening(self, prompt: str, frames: int, height: int, width: int) -> np.ndarray:
        """The first frames of a clip, (F, H, W, 3) uint8, which models continue, for benchmarks
        that draw them.

        Raises:
            UserError: It has none of that shape.
        """
        raise NotImplementedError

    def filmed(self, prompt: str, frames: int, height: int, width: int) -> np.ndarray | None:
        """What happened, in the form of a clip, (F, H, W, 3) uint8; None if nobody knows."""
        return None

    def published_path(self, prompt: str, k: int) -> Path | None:
        """Where a prompt's clip lies in the layout of the benchmark's authors, if they have one."""
        return None

    @classmethod
    def ranked_by(cls) -> dict[str, Better]:
        """The columns of a row by which clips of a prompt can be ranked, each with what is better.

        A measure of motion is none of them, since neither more nor less of it is better.
        """
        return {}

    def about(self) -> dict[str, Any]:
        """Whatever else a score depends on, such as a judge's weights.

        It becomes part of every row, and a row in which it differs is scored anew.
        """
        return {}

    def about_prompt(self, prompt: str) -> dict[str, Any]:
        """What a clip's score depends on beside its frames and what `about` says.

        It becomes part of the clip's row, and a row in which it differs is scored anew.

        Returns:
            At least "caption", the prompt. Rows with the same "asked", or without one the same
            "caption", are taken to be alike, and not for independent.

        Raises:
            UserError: The prompt is none of the benchmark's.
        """
        return {"caption": prompt}

    def scenario(self, prompt: str) -> str | None:
        """The part of the benchmark that the prompt belongs to, which gets a table of its own."""
        return None

    def missing(self, prompts: Collection[str]) -> list[Prompt]:
        """The benchmark's own prompts that are not among these; [] if its list is open."""
        return []

    def clips(self, videos: Path) -> list[tuple[Path, dict[str, Any]]]:
        """The clips of a folder in the layout of the benchmark's authors.

        Returns:
            Each video with its "prompt_id", "caption" and "k"; [] for a folder in the layout of
            `generate`.
        """
        return []

    def results(self, folder: Path) -> tuple[list[Row], list[dict[str, Any]]]:
        """Rows that another tool's files in a folder hold, for which no clip is needed.

        Returns:
            The rows, and a "prompt_id", "k" and "prompt" for each clip that is missing; two empty
            lists for a benchmark that scores clips itself.
        """
        return [], []

    def load(self) -> None:
        """Load the models that `score` needs, if any. It is called before the first clip is scored.

        Raises:
            UserError: One cannot be loaded, so that no clip can be scored.
        """

    def read(self, video: Path) -> Any:
        """What `score` expects of a video: by default its frames, (F, H, W, 3) uint8.

        Raises:
            ClipError: The video cannot be read or scored.
        """
        from videorepa.data.video import read_all

        return read_all(video)[0]

    @abstractmethod
    def score(self, frames: Any, prompt: str) -> dict[str, Any]:
        """Score one clip.

        Args:
            frames: What `read` returned.
            prompt: The clip's caption.

        Returns:
            Columns of the clip's row. A metric without a value is None, and "invalid" maps its
            name to the reason.

        Raises:
            UserError: The prompt is not one of the benchmark's.
        """

    @abstractmethod
    def aggregate(self, rows: list[Row]) -> dict[str, dict[str, Any]]:
        """Metrics over rows. It is called with all rows, and with those of each scenario.

        Returns:
            By metric, {"percent" or "mean": value, "low", "high", "n", ...}.
        """

    @abstractmethod
    def compare(self, rows_a: list[Row], rows_b: list[Row]) -> dict[str, Any]:
        """Compare two models by the clips that both have.

        Returns:
            By metric, {"difference": B minus A, "low", "high", "p", ...}; and "unpaired", the
            number of rows that have no partner.
        """
