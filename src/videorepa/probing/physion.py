"""Physion's clips, in half of which a red object will touch a yellow one, and how they are asked.

The clips stop before that is decided. This module reads the folders of both releases, 2021 (arXiv
2106.08261) and v1.5, and keeps what each shows of a clip and how it reads features out.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float

from videorepa.errors import UserError
from videorepa.probing.readout import FOLDS, decide
from videorepa.system.files import check_is_file, check_is_folder, read_text
from videorepa.world.contact import KINDS

LABELS = "all_video_labels.json"
"""The file with v1.5's answers, in either split's folder."""


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
    """What is shown of a clip, and how the answer is read from features.

    Attributes:
        names: Scenarios by patterns of file names, tried in this order.
        load: Reads a split's folder: each video's label, and notes of what was left out.
        frames: Numbers of the frames that published extractors are given, at 30 a second.
        strengths: Inverse strengths of regularisation to choose from.
        iterations: The most that a fit may take.
        seed: Of the folds, and of the clips that are drawn to balance the answers.
        by_scenario: Each scenario has a readout of its own; otherwise one serves all.
        balanced: The readout is fitted to as many clips of either answer.
        exceptions: Other frames for some scenarios.
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

    def shown(self, scenario: str, count: int, published: bool = False) -> list[int]:
        """The numbers of `count` frames, evenly spaced over all that are shown.

        Args:
            published: Choose from the frames alone that published extractors are given.
        """
        frames: Sequence[int] = self.exceptions.get(scenario, self.frames)
        if not published:
            frames = range(frames[-1] + 1)
        places = np.linspace(0, len(frames) - 1, count).round().astype(int)
        return [frames[place] for place in places]

    def read(self, root: Path) -> tuple[list[Stimulus], list[str]]:
        """All clips in `root`/train and `root`/test by id, and notes of what was left out.

        Raises:
            UserError: The folder is not laid out so, or a clip is of no scenario.
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
            for path, touches in sorted(labelled.items()):
                if path.stem in by_stem:
                    raise UserError(
                        f"{by_stem[path.stem]} and {path} have one name; expected each video once."
                    )
                by_stem[path.stem] = path
                scenario = self._scenario(path.relative_to(folder))
                stimuli.append(Stimulus(f"{split}/{path.stem}", path, scenario, touches))
            if not labelled:
                raise UserError(f"{folder} holds no video with a label.")
        return sorted(stimuli, key=lambda stimulus: stimulus.id), notes

    def _scenario(self, path: Path) -> str:
        for part in path.parts:  # A folder of that name counts for more than the file's.
            for pattern, scenario in self.names.items():
                if re.search(pattern, part.lower()):
                    return scenario
        raise UserError(
            f"{path} is of no scenario of Physion {self.name}; expected one of "
            f"{', '.join(self.names.values())} (or its older name) in the file's name. Take it out "
            "of the folder."
        )

    def decide(
        self,
        features: Float[np.ndarray, "n d"],
        fitted: Sequence[Stimulus],
        unseen_features: Float[np.ndarray, "m d"],
        unseen: Sequence[Stimulus],
    ) -> tuple[Float[np.ndarray, " m"], dict[str, float]]:
        """The score of each unseen clip, above 0 for a yes, and by scenario the strength chosen.

        Raises:
            UserError: There are too few clips, as `check` tells.
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
            decided = decide(
                features[mine],
                label[mine],
                unseen_features[theirs],
                self.strengths,
                seed=self.seed,
                iterations=self.iterations,
            )
            score[theirs] = decided.score
            strengths |= dict.fromkeys(group, decided.strength)
        return score, strengths

    def check(self, fitted: Sequence[Stimulus], unseen: Sequence[Stimulus]) -> None:
        """Raises UserError if there is no unseen clip, or too few of either answer to fit to."""
        if not unseen:
            raise UserError("No test clip is left to be judged.")
        for group in self._groups(fitted, unseen):
            touching = [clip.touches for clip in fitted if clip.scenario in group]
            yes, no = touching.count(True), touching.count(False)
            if min(yes, no) < FOLDS:
                raise UserError(
                    f"There are too few training clips of {', '.join(group)}. Found {yes} clips "
                    f"that have the label and {no} that have not; expected at least {FOLDS} of "
                    "each to fit to."
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
    """Places of as many clips of either answer; those of the more frequent one are drawn."""
    rng = np.random.default_rng(seed)
    sides = [np.flatnonzero(label == answer) for answer in (False, True)]
    fewest = min(map(len, sides))
    return np.sort(np.concatenate([rng.permutation(side)[:fewest] for side in sides]))


def _load_v1_5(folder: Path, split: str) -> tuple[dict[Path, bool], list[str]]:
    """Reads *.mp4 and all_video_labels.json, stem -> {"label": whether they touch, ...}."""
    path = folder / LABELS
    try:
        entries = json.loads(read_text(path))
        labels = {Path(stem).stem: _answer(about["label"]) for stem, about in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} cannot be used ({type(error).__name__}: {error}); expected an object of "
            'stem -> {"label": true or false}.'
        ) from None
    return _labelled(list(folder.glob("*.mp4")), labels, split)


def _load_2021(folder: Path, split: str) -> tuple[dict[Path, bool], list[str]]:
    """Reads labels.csv, whose columns are a stem and "ground truth outcome", and videos below.

    Where folders `mp4s-redyellow` exist, in which the objects have their colours, only those count.
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

PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            name="v1.5",
            names=_SCENARIOS,
            load=_load_v1_5,
            # Every 15th up to the last, 45; collide's last is 15, and its first is repeated.
            frames=(0, 15, 30, 45),
            exceptions={"collide": (0, 0, 0, 15)},
            strengths=(1e-6, 1e-5, 0.01, 0.1, 1.0, 5.0, 10.0, 20.0),
            iterations=20_000,
            seed=42,
            by_scenario=False,
            balanced=False,
        ),
        Protocol(
            name="2021",
            names=_SCENARIOS | {"drape|cloth": "drape"},
            load=_load_2021,
            frames=tuple(range(0, 42, 6)),  # The first 7 of 25, every 6th.
            strengths=tuple(np.logspace(-8, 8, 17).tolist()),
            iterations=200,
            seed=0,
            by_scenario=True,
            balanced=True,
        ),
        # The lab's own clips (`videorepa lab contact`), in v1.5's layout and read as it is.
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
    )
}
