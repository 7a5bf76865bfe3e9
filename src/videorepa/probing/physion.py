"""Physion's clips, in half of which a red object will touch a yellow one, and its protocols.

The clips stop before the contact. This module reads the folders of both releases, 2021 (arXiv
2106.08261) and v1.5. It has the frames that each release shows and the readout that it fits.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from videorepa.errors import UserError
from videorepa.probing.readout import FOLDS, decide
from videorepa.system.files import check_is_file, check_is_folder, parse_json, read_text
from videorepa.world.contact import KINDS

LABELS = "all_video_labels.json"
"""The file with v1.5's answers, in either split's folder."""

FrameChoice = Literal["resampled", "published", "padded"]


class StepsRead(NamedTuple):
    """How many evenly spaced steps in time are read of a model's block and of an encoder."""

    models: int
    encoders: int


@dataclass(frozen=True)
class Stimulus:
    """A clip.

    Attributes:
        id: "train/" or "test/", and the stem of its file.
        touches: Whether red will touch yellow.
    """

    id: str
    path: Path
    scenario: str
    touches: bool

    @property
    def stem(self) -> str:
        return self.id.partition("/")[2]

    @property
    def is_test(self) -> bool:
        return self.id.startswith("test/")


@dataclass(frozen=True)
class Protocol:
    """The frames of a clip that are shown, and how the answer is read from features.

    Attributes:
        names: Scenarios by patterns of file names, tried in this order.
        load: Reads a split's folder and returns each video's label, and notes on videos that were
            left out.
        frames: Numbers of the frames that published extractors see, at 30 per second.
        strengths: Inverse strengths of regularisation to choose from.
        iterations: Largest number of iterations of a fit.
        seed: Seed of the folds, and of the clips that are drawn to balance the answers.
        by_scenario: Whether each scenario has its own readout. Otherwise all share one.
        balanced: Whether the readout is fitted to equally many clips of either answer.
        exceptions: Other frames for some scenarios.
        only: The scenarios whose clips are read; all of them if empty.
        steps: The steps in time that are read; None leaves the choice to the user.
        through_projector: Whether models that have a projector are read through it.
    """

    name: str
    names: Mapping[str, str]
    load: Callable[[Path, str], tuple[dict[Path, bool], list[str]]]
    frames: tuple[int, ...]
    strengths: tuple[float, ...]
    iterations: int
    seed: int
    by_scenario: bool
    balanced: bool
    exceptions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    only: tuple[str, ...] = ()
    steps: StepsRead | None = None
    through_projector: bool = False

    def shown(self, scenario: str, count: int, choice: FrameChoice = "resampled") -> list[int]:
        """The numbers of `count` frames, none of them after the last that is shown.

        Args:
            choice: "resampled" takes frames evenly from all that are shown, "published" only from
                those that published extractors see. "padded" takes each frame once, after copies
                of the first, as v1.5's code does for an extractor that asks for more frames than
                there are; where there are enough, it is "resampled".
        """
        frames: Sequence[int] = self.exceptions.get(scenario, self.frames)
        if choice != "published":
            frames = range(frames[-1] + 1)
        if choice == "padded" and count > len(frames):
            return [frames[0]] * (count - len(frames)) + list(frames)
        places = np.linspace(0, len(frames) - 1, count).round().astype(int)
        return [frames[place] for place in places]

    def read(self, root: Path) -> tuple[list[Stimulus], list[str]]:
        """Read the clips in `root`/train and `root`/test.

        Returns:
            The clips, sorted by id, and notes on videos that were left out.

        Raises:
            UserError: The folder has another layout, or a clip belongs to no scenario.
        """
        check_is_folder(root, "the folder with train/ and test/ in it")
        stimuli, notes = [], []
        for split in ("train", "test"):
            folder = root / split
            if not folder.is_dir():
                raise UserError(
                    f"{root} has no folder {split!r}; expected {split}/ with the videos and labels "
                    f"of Physion {self.name} in it."
                )
            labelled, left_out = self.load(folder, split)
            notes += left_out
            by_stem: dict[str, Path] = {}
            others = 0
            for path, touches in sorted(labelled.items()):
                if path.stem in by_stem:
                    raise UserError(
                        f"{by_stem[path.stem]} and {path} have the same name; expected each once."
                    )
                by_stem[path.stem] = path
                scenario = self._scenario(path.relative_to(folder))
                if self.only and scenario not in self.only:
                    others += 1
                    continue
                stimuli.append(Stimulus(f"{split}/{path.stem}", path, scenario, touches))
            of = f" of the scenarios {', '.join(self.only)}" if self.only else ""
            if len(labelled) == others:
                raise UserError(f"{folder} holds no video with a label{of}.")
            if others:
                notes.append(
                    f"The protocol {self.name} reads clips{of} alone: {others} other {split} clips "
                    "were left out."
                )
        return sorted(stimuli, key=lambda stimulus: stimulus.id), notes

    def _scenario(self, path: Path) -> str:
        for part in path.parts:  # A folder's name takes precedence over the file's.
            for pattern, scenario in self.names.items():
                if re.search(pattern, part.lower()):
                    return scenario
        raise UserError(
            f"{path} belongs to no scenario of Physion {self.name}; expected one of "
            f"{', '.join(self.names.values())} (or its older name) in the file's name. Remove it "
            "from the folder."
        )

    def decide(
        self,
        features: Float[np.ndarray, "n d"],
        fitted: Sequence[Stimulus],
        unseen_features: Float[np.ndarray, "m d"],
        unseen: Sequence[Stimulus],
    ) -> tuple[Float[np.ndarray, " m"], dict[str, float]]:
        """Fit the readout to some clips and score others.

        Returns:
            The score of each unseen clip, above 0 for a yes, and the inverse strength of
            regularisation that was chosen, by scenario.

        Raises:
            UserError: There are too few clips, as for `check`.
        """
        self.check(fitted, unseen)
        label = np.array([stimulus.touches for stimulus in fitted])
        score = np.empty(len(unseen))
        strengths = {}
        for group in self._groups(fitted, unseen):
            mine, theirs = (
                np.array([n for n, clip in enumerate(clips) if clip.scenario in group], int)
                for clips in (fitted, unseen)
            )
            if self.balanced:
                mine = mine[_balanced(label[mine], self.seed)]
            score[theirs], strength = decide(
                features[mine],
                label[mine],
                unseen_features[theirs],
                self.strengths,
                seed=self.seed,
                iterations=self.iterations,
            )
            strengths |= dict.fromkeys(group, strength)
        return score, strengths

    def check(
        self,
        fitted: Sequence[Stimulus],
        unseen: Sequence[Stimulus],
        lost: Mapping[str, str] | None = None,
    ) -> None:
        """Raise UserError if no clip is unseen, or too few of either answer are there to fit to.

        Args:
            fitted: The clips to fit to.
            unseen: The test clips.
            lost: Why further clips could not be read, by their ids, for the message.
        """
        first = next(iter((lost or {}).items()), None)
        why = "" if first is None else f" {first[0]!r} could not be read: {first[1]}."
        if lost and len(lost) > 1:
            why += f" Nor could {len(lost) - 1} more."
        if not unseen:
            raise UserError(f"No test clip is left to score.{why}")
        for group in self._groups(fitted, unseen):
            touching = [clip.touches for clip in fitted if clip.scenario in group]
            yes, no = touching.count(True), touching.count(False)
            if min(yes, no) < FOLDS:
                raise UserError(
                    f"There are too few training clips of {', '.join(group)}. Found {yes} clips "
                    f"with contact and {no} without; expected at least {FOLDS} of each to fit "
                    f"to.{why}"
                )

    def _groups(self, fitted: Sequence[Stimulus], unseen: Sequence[Stimulus]) -> list[list[str]]:
        """The scenarios that share a readout."""
        if self.by_scenario:
            return [[name] for name in sorted({stimulus.scenario for stimulus in unseen})]
        return [sorted({stimulus.scenario for stimulus in (*fitted, *unseen)})]


def split(
    stimuli: Sequence[Stimulus], left_out: Collection[str]
) -> tuple[list[Stimulus], list[Stimulus]]:
    """The clips to fit to, and the test clips whose stems are not in `left_out`."""
    fitted = [stimulus for stimulus in stimuli if not stimulus.is_test]
    return fitted, [s for s in stimuli if s.is_test and s.stem not in left_out]


def _balanced(label: Bool[np.ndarray, " n"], seed: int) -> np.ndarray:
    """Indices of equally many clips of either answer, drawn from the more frequent one."""
    rng = np.random.default_rng(seed)
    sides = [np.flatnonzero(label == answer) for answer in (False, True)]
    fewest = min(map(len, sides))
    return np.sort(np.concatenate([rng.permutation(side)[:fewest] for side in sides]))


def _load_v1_5(folder: Path, split: str) -> tuple[dict[Path, bool], list[str]]:
    """Read *.mp4 and all_video_labels.json, stem -> {"label": whether they touch, ...}."""
    path = folder / LABELS
    try:
        entries = parse_json(read_text(path))
        labels = {Path(stem).stem: _answer(about["label"]) for stem, about in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} cannot be used ({type(error).__name__}: {error}); expected an object of "
            'stem -> {"label": true or false}.'
        ) from None
    return _labelled(list(folder.glob("*.mp4")), labels, split)


def _load_2021(folder: Path, split: str) -> tuple[dict[Path, bool], list[str]]:
    """Read labels.csv, whose columns are a stem and "ground truth outcome", and videos below it.

    If there are folders `mp4s-redyellow`, where the objects have their colours, only theirs count.
    """
    path = folder / "labels.csv"
    try:
        check_is_file(path)
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.reader(file))
        column = rows[0].index("ground truth outcome")
        labels = {row[0]: _answer(row[column]) for row in rows[1:] if row}
    except (OSError, ValueError, IndexError) as error:
        raise UserError(
            f"{path} cannot be used ({type(error).__name__}: {error}); expected a first column "
            'with video names and a column "ground truth outcome" with True or False.'
        ) from None
    videos = [video for video in folder.rglob("*.mp4") if not video.name.startswith(".")]
    coloured = [video for video in videos if video.parent.name == "mp4s-redyellow"]
    return _labelled(coloured or videos, labels, split)


def _answer(value: object) -> bool:
    answer = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    try:
        return answer[str(value).lower()]
    except KeyError:
        raise ValueError(f"a label is {value!r}, not true or false") from None


def _labelled(
    videos: Sequence[Path], labels: Mapping[str, bool], split: str
) -> tuple[dict[Path, bool], list[str]]:
    labelled, missing = {}, []
    for video in videos:
        # The coloured version of a clip has no label of its own.
        label = labels.get(video.stem, labels.get(video.stem.replace("-redyellow", "")))
        if label is None:
            missing.append(video.stem)
        else:
            labelled[video] = label
    notes = [f"{split} clip {stem} has no label and was left out." for stem in sorted(missing)]
    return labelled, notes


_SCENARIOS = {
    r"^(?!.*roll).*(collision|collide)": "collide",
    "drop": "drop",
    "towers|support": "support",
    "link": "link",
    "roll": "roll",
    "contain": "contain",
    "domino": "dominoes",
}

_V1_5 = Protocol(
    name="v1.5",
    names=_SCENARIOS,
    load=_load_v1_5,
    # Every 15th up to 45. Collide ends at 15, so its first frame is repeated.
    frames=(0, 15, 30, 45),
    exceptions={"collide": (0, 0, 0, 15)},
    strengths=(1e-6, 1e-5, 0.01, 0.1, 1.0, 5.0, 10.0, 20.0),
    iterations=20_000,
    seed=42,
    by_scenario=False,
    balanced=False,
)

PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        _V1_5,
        Protocol(
            name="2021",
            names=_SCENARIOS | {"drape|cloth": "drape"},
            load=_load_2021,
            frames=tuple(range(0, 42, 6)),  # Every 6th: the first 7 of 25.
            strengths=tuple(np.logspace(-8, 8, 17).tolist()),
            iterations=200,
            seed=0,
            by_scenario=True,
            balanced=True,
        ),
        # The lab's own clips (`videorepa lab contact`), in v1.5's layout.
        Protocol(
            name="lab",
            names={kind: kind for kind in KINDS},
            load=_load_v1_5,
            frames=tuple(range(17)),
            strengths=(1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.1, 1.0),
            iterations=2_000,
            seed=42,
            by_scenario=False,
            balanced=False,
        ),
        # What VideoREPA's author says of figure 1 (issue 10 of his repository): 3 of the 12 latent
        # steps, 12 of the 24 of VideoMAEv2, and VideoREPA, unlike CogVideoX, after its projector.
        replace(
            _V1_5,
            name="videorepa",
            only=("contain", "roll"),
            steps=StepsRead(models=3, encoders=12),
            through_projector=True,
        ),
    )
}
