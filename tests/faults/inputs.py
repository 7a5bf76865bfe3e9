"""Bad inputs from a grammar, each to every verb that reads such a thing.

A grammar's draw is a `Laid`: files to lay down, and commands to run over them. An outcome is a
fault if it is a traceback, a hang, an exit code other than 0, 1 and 2, or if a file of the user's
has changed.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import yaml
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st

from faults.child import run
from faults.ground import Ground, refining, selecting
from faults.outcome import snapshot
from faults.results import Fault, Results

BATCH = 40
"""So many inputs of a kind are drawn at once: hypothesis draws no single one by its number."""

Strategy = st.SearchStrategy


@dataclass(frozen=True)
class Special:
    """Something other than a file with content: "fifo", "folder", or "link" to a target."""

    kind: str
    target: str = ""


Content = bytes | Special


@dataclass(frozen=True)
class Command:
    """A verb's arguments, and which of what was laid down it may write to."""

    arguments: list[str]
    may_write: tuple[str, ...] = ()


@dataclass(frozen=True)
class Laid:
    """An input as it lies in a folder: files by their names, over copies of the ground's."""

    about: str
    files: dict[str, Content]
    commands: list[Command]
    copies: tuple[str, ...] = ()


def lay(laid: Laid, ground: Ground, folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "out").mkdir()
    for name in laid.copies:
        source = ground.root / name
        (shutil.copytree if source.is_dir() else shutil.copy2)(source, folder / name)
    for name, content in laid.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content.kind == "fifo":
            os.mkfifo(path)
        elif content.kind == "folder":
            path.mkdir()
        elif content.kind == "link":
            path.symlink_to(content.target)


# Text and numbers that programs stumble over.

LONG_NUMBER = "9" * 5000
NASTY = st.sampled_from(
    ["", " ", "\t", "\n", "a\r\nb", "\x00", "a\x00b", "\x1b[31m", "\u2028", "\u202e", "\ufeff"]
    + ["🎈🏀", "e\u0301", "é", "a" * 10_000, "'", '"', '"""', "`$(touch x)`", "%s %n", "{x}", "con"]
    + ["../up", "/etc/passwd", "~", "~/x", ".", "..", "-", "--help", "-1", "=", "a=b", "[", "]"]
    + ["null", "true", "nan", ".inf", "-.inf", "1e999", "0x10", "1_000", LONG_NUMBER, "# ", ": "]
    + ["!!python/name:os.system", "&a [*a]", "*b", "<<: *b", "? ", "| ", "%YAML 9", "\\"]
)
TEXT = st.one_of(NASTY, st.text(max_size=20), st.text("ab,;\t\n'\"", min_size=2, max_size=6))
ODD_NUMBERS = [0, -1, 1, 2, 3, 7, 2**31, 2**63, 2**64, 10**15, -(2**63), 10**400, 0.5, -0.5, 1e300]
VALUE: Strategy[Any] = st.one_of(
    st.sampled_from(ODD_NUMBERS),
    st.sampled_from([float("nan"), float("inf"), -float("inf"), None, True, False]),
    TEXT,
    st.sampled_from([[], {}, [1], {"name": "x"}, [[]], {"a": {"b": {}}}, [None], ["a", 1], {1: 2}]),
)
GARBAGE: Strategy[bytes] = st.one_of(
    st.binary(max_size=64),
    st.sampled_from(
        [b"", b"\n", b"\x00" * 100, b"\xff\xfe\x00", b"\xef\xbb\xbf", b"\x80\x04K\x01.", b"null"]
        + [b"[" * 5000, b"{" * 5000, b"[]", b"{}", b"[1]", b'"text"', b"1", b"NaN", b"1e999"]
        + [LONG_NUMBER.encode(), b"PK\x03\x04 and then nothing", b'{"a": ' * 3000 + b"}" * 3000]
    ),
)
NO_FILE = st.sampled_from(
    [Special("fifo"), Special("folder"), Special("link", "/dev/zero"), Special("link", "nowhere")]
    + [Special("link", "/proc/self/mem"), Special("link", "/dev/stdin")]
)


@st.composite
def damaged(draw: Any, whole: bytes) -> Content:
    """A file's content after something has happened to it."""
    how = draw(
        st.sampled_from(["cut", "flip", "flip", "put", "garbage", "none", "doubled", "text"])
    )
    if how == "cut":
        return whole[: draw(st.integers(0, len(whole)))]
    if how in ("flip", "put") and whole:
        bytes_ = bytearray(whole)
        for _ in range(draw(st.integers(1, 8))):
            # Headers are at the beginning or at the end.
            near = draw(st.sampled_from([64, 512, len(whole)]))
            place = draw(st.integers(0, min(near, len(whole)) - 1))
            if draw(st.booleans()):
                place = len(whole) - 1 - place
            if how == "put":
                odd = draw(st.sampled_from([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff"]))
                bytes_[place : place + 4] = odd
            else:
                bytes_[place] ^= 1 << draw(st.integers(0, 7))
        return bytes(bytes_)
    if how == "garbage":
        return draw(GARBAGE)
    if how == "none":
        return draw(NO_FILE)
    if how == "text":
        return whole + draw(TEXT).encode("utf-8", "surrogatepass")
    return whole + whole


def leaves(value: Any, path: tuple = ()) -> list[tuple]:
    """The path of every value in nested tables and lists, tables and lists included."""
    found = [path] if path else []
    inner = value.items() if isinstance(value, dict) else ()
    inner = enumerate(value) if isinstance(value, list) else inner
    return found + [one for key, below in inner for one in leaves(below, (*path, key))]


@st.composite
def changed(draw: Any, values: Any, spare: frozenset[str] = frozenset()) -> Any:
    """Nested values of which one to three are odd, missing or too many.

    spare: Dotted names that get no large number, since a long run would be what was asked for.
    """
    values = json.loads(json.dumps(values))
    for _ in range(draw(st.integers(1, 3))):
        paths = leaves(values)
        if not paths:
            break
        path = draw(st.sampled_from(paths))
        parent = values
        for key in path[:-1]:
            parent = parent[key]
        how = draw(st.sampled_from(["value", "value", "value", "drop", "add", "rename"]))
        if how == "value":
            odd = draw(VALUE)
            is_spared = ".".join(map(str, path)) in spare or any(
                ".".join(map(str, path)) == name.rpartition(".")[0] for name in spare
            )
            if not (is_spared and isinstance(odd, int | float) and odd > 3):
                parent[path[-1]] = odd
        elif how == "drop":
            del parent[path[-1]]
        elif isinstance(parent, dict):
            kept = parent[path[-1]] if how == "add" else parent.pop(path[-1])
            parent[draw(TEXT)] = kept
    return values


# Manifests.


@st.composite
def manifests(draw: Any, ground: Ground) -> Laid:
    name = "list" + draw(
        st.sampled_from([".csv"] * 5 + [".jsonl"] * 4 + [".txt"] * 2 + [".tsv", ""])
    )
    pick_file = st.sampled_from(["clip0.mp4", "clip1.mp4", "sub/clip2.mp4"])
    odd_file = st.sampled_from(
        ["pipe.mp4", "folder.mp4", "link.mp4", "list.m3u8", "zero.mp4", "none.mp4"]
        + ["http://x/y.mp4", "./clip0.mp4", "clip0.MP4", "file:clip0.mp4"]
    )
    file = st.one_of(pick_file, pick_file, odd_file, TEXT)
    columns = draw(
        st.sampled_from(
            [["video", "caption"]] * 4
            + [["id", "video", "caption"]] * 4
            + [["prompt"], ["caption"], ["id", "prompt"], ["video", "caption", "video"]]
            + [["video", "caption", "detailed"], ["Video", "Caption"], [], ["video;caption"]]
        )
    )
    known = {"video": file, "id": st.one_of(st.just("a"), st.text("abc", min_size=1), TEXT)}
    caption = st.one_of(st.just("A ball falls."), TEXT)
    rows = draw(
        st.lists(st.tuples(*(known.get(column, caption) for column in columns)), max_size=3)
    )
    if name.endswith(".jsonl"):
        lines = [json.dumps(dict(zip(columns, row, strict=True))) for row in rows]
        if lines and draw(st.integers(0, 3)) == 0:
            lines[draw(st.integers(0, len(lines) - 1))] = draw(
                st.sampled_from(["[]", "{", "1", "null", LONG_NUMBER, '{"video": []}', "NaN", ""])
            )
        if rows and draw(st.integers(0, 3)) == 0:
            odd = draw(changed(dict(zip(columns, rows[0], strict=True))))
            lines[0] = json.dumps(odd)
        text = "\n".join(lines) + draw(st.sampled_from(["\n", "", "\r\n"]))
    else:
        file_ = io.StringIO()
        delimiter = draw(st.sampled_from([",", ",", ",", ";", "\t"]))
        try:
            writer = csv.writer(
                file_,
                delimiter=delimiter,
                lineterminator=draw(st.sampled_from(["\n", "\r\n", "\r"])),
                quoting=draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])),
            )
            writer.writerows([columns, *rows])
        except csv.Error:
            file_.write("video,caption\n")
        text = file_.getvalue()
        if draw(st.integers(0, 5)) == 0:
            text = text.replace('"', "", 1) + draw(st.sampled_from(['"', "a,b,c,d,e\n", ",\n"]))
    encoding = draw(st.sampled_from(["utf-8"] * 6 + ["utf-8-sig", "utf-16", "latin-1", "utf-32"]))
    whole = text.encode(encoding, "replace" if encoding == "latin-1" else "surrogatepass")
    content: Content = whole
    if draw(st.integers(0, 4)) == 0:
        content = draw(damaged(whole))
    clips = {
        f"{'sub/' * (n == 2)}clip{n}.mp4": (ground.root / f"clips/clip{n}.mp4").read_bytes()
        for n in range(3)
    }
    odd_files: dict[str, Content] = {
        "pipe.mp4": Special("fifo"),
        "folder.mp4": Special("folder"),
        "link.mp4": Special("link", str(ground.root / "clips/clip3.mp4")),
        "zero.mp4": Special("link", "/dev/zero"),
        "list.m3u8": playlist(str(ground.root / "clips/clip4.mp4")),
    }
    return Laid(
        f"a manifest ({name})", {**clips, **odd_files, name: content}, reading(ground, name)
    )


def reading(ground: Ground, manifest: str) -> list[Command]:
    """Every verb that reads a manifest, a list of prompts or of clips."""
    recipe, own = ground / "recipe.yaml", ["--data.manifest", manifest]
    cache = ["--data.cache", "out/cache"]
    short = ["--optim.steps", "1"]
    return [
        Command(["inspect", recipe, *own, *cache]),
        Command(["train", recipe, *own, *cache, *short, "--out", "out/unprepared"]),
        Command(["prepare", recipe, *own, *cache]),
        Command(["train", recipe, *own, *cache, *short, "--out", "out/run"]),
        Command(["scan", recipe, *own, "--out", "out/scan", "--clips", "2", "--noise", "0.5"]),
        Command(["likelihood", recipe, "--pairs", manifest, "--out", "out/likelihood"]),
        Command(["head", recipe, *own, "--kind", "motion", "--out", "out/head.safetensors"]),
        Command(["generate", ground / "run", "--prompts", manifest, "--out", "out/made"]),
        Command(["refine", manifest, "--out", "out/refined.csv", *refining(ground)]),
        Command(["evaluate", "lab", manifest, "--out", "out/scores"]),
        Command(["report", ground / "run", "--clips", manifest, "--out", "out/page.html"]),
    ]


def playlist(target: str) -> bytes:
    return f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{target}\n#EXT-X-ENDLIST\n".encode()


# Recipes.

WORK = frozenset(
    [
        "optim.steps",
        "generation.steps",
        "generation.samples",
        "data.lab.clips",
        "recipe.optim.steps",
    ]
    + ["recipe.generation.steps", "recipe.generation.samples", "prompts", "recipe.data.lab.clips"]
)
"""What makes a run long because the user asks for it."""


def bomb(levels: int, width: int) -> bytes:
    """YAML whose aliases double at each level."""
    lines = ["a0: &a0 [x, x]"]
    for level in range(1, levels):
        lines.append(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * width)}]")
    return ("\n".join(lines) + f"\nname: *a{levels - 1}\n").encode()


@st.composite
def recipes(draw: Any, ground: Ground) -> Laid:
    study = draw(st.integers(0, 4)) == 0
    file = "study.yaml" if study else "recipe.yaml"
    text = (ground.root / file).read_text()
    values = yaml.safe_load(text)
    if not study and draw(st.booleans()):
        values |= {"validation": {"every": 1, "prompts": ["A ball falls."]}}
        values["train"] |= {"lora": {"rank": 2, "alpha": 4, "targets": ["to_q"]}}
    how = draw(st.sampled_from(["changed"] * 6 + ["bomb", "damaged", "line", "nested", "garbage"]))
    whole = yaml.safe_dump(values).encode()
    content: Content = whole
    if how == "changed":
        content = yaml.safe_dump(draw(changed(values, WORK)), allow_unicode=True).encode(
            "utf-8", "surrogatepass"
        )
    elif how == "bomb":
        into = draw(st.sampled_from([b"", whole]))
        content = into + bomb(draw(st.integers(3, 40)), draw(st.integers(2, 9)))
    elif how == "damaged":
        content = draw(damaged(whole))
    elif how == "garbage":
        content = draw(GARBAGE)
    elif how == "nested":
        key = draw(st.sampled_from([b"about", b"name", b"data", b"x"]))
        content = whole + key + b": " + b"[" * (n := draw(st.sampled_from([10, 100, 900, 4000])))
        content += b"]" * n + b"\n"
    else:
        lines = text.splitlines()
        place = draw(st.integers(0, len(lines)))
        odd = draw(
            st.sampled_from(
                [
                    *("seed: 1", "seed: 9" + LONG_NUMBER, "x: &a [*a]", "x: *nothing", "<<: 3"),
                    *("name: !!python/object/apply:os.system ['true']", "name: !x y", "? [1]\n: 2"),
                    *("seed: 0o7", "seed: 12:30:45", "about: 2020-13-45", "about: !!binary ####"),
                    *("\tname: x", "---", "...", "%YAML 1.9", "optim: {steps: 1}", "seed: 1e3"),
                    *("about: !!set {a, a}", "about: !!omap 3", "about: !!timestamp x", "\x07"),
                    *("about: !!int x", "about: !!float x", "about: 0x", "about: !!bool 3"),
                ]
            )
        )
        content = "\n".join([*lines[:place], odd, *lines[place:]]).encode()
    if study:
        return Laid("a study", {file: content}, [Command(["lab", "study", file, "--out", "out/s"])])
    lab_parts = ["text-encoder", "autoencoder", "teacher", "assemble", "ship", "phyworld"]
    cache = ["--data.cache", "out/cache"]
    commands = [
        Command(["inspect", file]),
        Command(["prepare", file, *cache]),
        Command(["train", file, *cache, "--out", "out/run"]),
        Command(["generate", file, "--prompts", ground / "prompts.csv", "--out", "out/made"]),
        Command(["scan", file, "--out", "out/scan", "--clips", "2", "--noise", "0.5"]),
        Command(["head", file, "--kind", "motion", "--out", "out/head.safetensors"]),
        Command(["probe", file, "--data", ground / "none", "--out", "out/probe"]),
        Command(["verify", file, "--out", "out/verified.json"]),
        Command(["lab", draw(st.sampled_from(lab_parts)), file]),
        Command(["lab", "study", file, "--out", "out/study"]),
    ]
    return Laid(f"a recipe ({how})", {file: content}, commands)


# Videos.


@st.composite
def videos(draw: Any, ground: Ground) -> Laid:
    source = draw(st.sampled_from(["clips/clip0.mp4", "lab/0-0.mp4"]))
    whole = (ground.root / source).read_bytes()
    suffix = draw(st.sampled_from([".mp4"] * 5 + [".avi", ".mkv", ".gif", ".webm", ".png", ".txt"]))
    how = draw(st.sampled_from(["damaged"] * 5 + ["header"] * 3 + ["playlist"]))
    content: Content
    if how == "damaged":
        content = draw(damaged(whole))
    elif how == "header":
        # Sizes, counts and times stand in the boxes of an MP4 file's index.
        data = bytearray(whole)
        boxes = [b"mvhd", b"tkhd", b"mdhd", b"stsd", b"avc1", b"avcC", b"stts", b"stsz", b"stco"]
        boxes += [b"stsc", b"elst", b"moov", b"trak", b"ctts", b"stss", b"hdlr", b"ftyp", b"colr"]
        for _ in range(draw(st.integers(1, 3))):
            place = whole.find(draw(st.sampled_from(boxes)))
            offset = place + draw(st.integers(-4, 60))
            odd = st.sampled_from(
                [b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\0\0\0\1", b"\xff"]
            )
            if place > 0:
                data[offset : offset + 4] = (draw(odd) + b"\0" * 3)[:4]
        content = bytes(data)
    else:
        suffix = draw(st.sampled_from([".m3u8", ".mp4", ".txt", ".avi"]))
        target = draw(
            st.sampled_from([ground / "clips/clip1.mp4", "/etc/passwd", "bad.mp4", "pipe"])
        )
        forms = [playlist(target), f"ffconcat version 1.0\nfile '{target}'\n".encode()]
        forms += [b"#EXTM3U\n" + target.encode(), b"[playlist]\nFile1=" + target.encode()]
        forms += [f"subfile,,start,0,end,0,,:{target}".encode()]
        content = draw(st.sampled_from(forms))
    bad = f"clips/bad{suffix}"
    sound = (ground.root / "clips/clip1.mp4").read_bytes()
    rows = f"video,caption\nbad{suffix},A ball.\ngood.mp4,Another.\nalso.mp4,A third.\n"
    files: dict[str, Content] = {
        bad: content,
        "clips/good.mp4": sound,
        "clips/also.mp4": sound,
        "clips/list.csv": rows.encode(),
    }
    if suffix == ".mp4":
        files["made/0-0.mp4"] = content
    probing = ["--protocol", "lab", "--timesteps", "0", "--draws", "1", "--pools", "1"]
    contact = next((ground.root / "contact").rglob("*.mp4")).relative_to(ground.root)
    files[str(contact)] = content
    sidecars = [
        Command(["evaluate", "lab", "made", "--out", "out/made-scores"]),
        Command(["report", ground / "run", "--clips", "made", "--out", "out/made.html"]),
    ]
    recipe = ground / "recipe.yaml"
    probe = ["probe", recipe, "--data", "contact", "--out", "out/probe", *probing]
    commands = [*reading(ground, "clips/list.csv"), *sidecars, Command(probe)]
    reads_pictures = ("prepare", "train", "scan", "head", "evaluate", "report", "probe")
    commands = [command for command in commands if command.arguments[0] in reads_pictures]
    return Laid(f"a video ({how}, {suffix})", files, commands, ("contact", "made"))


# What verbs have left behind.


def readers(ground: Ground, what: str) -> list[Command]:
    """Every verb that reads something of the ground's, copied here; True if it may mend it, as
    `evaluate --against` scores both."""
    g, recipe, lora = ground, ground / "recipe.yaml", ground / "lora.yaml"
    prompts = ["--prompts", g / "prompts.csv"]
    page, best = ["--out", "out/page.html"], ["--out", "out/best"]
    own_models = ["--backbone.weights", "backbone"], ["--encoder.weights", "teacher"]
    probing = ["--protocol", "lab", "--timesteps", "0", "--draws", "1", "--pools", "1"]
    pairs: dict[str, list[tuple[list[str], bool]]] = {
        "lora": [
            (["generate", "lora", *prompts, "--out", "out/made"], False),
            (["report", "lora", g / "run", *page], False),
            (["compare", "lora", "--reference", g / "normal.json"], False),
            (["compare", "lora", g / "seeds/0", g / "seeds/1", "--make", "out/normal.json"], False),
            (["export", "lora", "out/exported"], False),
            (["train", lora, "--out", "lora"], True),
        ],
        "run": [
            (["generate", "run", *prompts, "--out", "out/made"], False),
            (["report", "run", *page], False),
            (["compare", "run", "--reference", g / "normal.json"], False),
            (
                ["probe", recipe, "--data", g / "contact", "--out", "out/p", "--models", "run"]
                + ["--through-projector", *probing],
                False,
            ),
            (["train", recipe, "--out", "run"], True),
        ],
        "cache": [
            (["train", recipe, "--data.cache", "cache", "--out", "out/run"], False),
            (["prepare", recipe, "--data.cache", "cache"], True),
            (["train", recipe, "--data.cache", "cache", "--out", "out/again"], False),
        ],
        "made": [
            (["evaluate", "lab", "made", "--out", "out/scores"], False),
            (["evaluate", "lab", g / "made", "--out", "out/s", "--against", "made"], True),
            (["report", g / "run", "--clips", "made", g / "lab", *page], False),
            (["generate", g / "run", *prompts, "--out", "made"], True),
        ],
        "lab": [
            (["report", g / "run", "--clips", "lab", g / "lab2", *page], False),
            (["export", g / "run", "out/exported", "--scores", "lab/scores"], False),
            (["evaluate", "lab", g / "lab2", "--against", "lab", "--out", "out/scores"], True),
            (["evaluate", "lab", "lab"], True),
        ],
        "samples": [
            (["select", "samples", "--by", "samples/scores", "--column", "pc", *best], False),
            (["select", "samples", *selecting(g), "--out", "out/other"], False),
            (
                ["select", g / "samples", *selecting(g), "--judged-by", "samples/scores"]
                + ["--judged-column", "pc", "--out", "out/judged"],
                False,
            ),
        ],
        "best": [
            (["select", g / "samples", *selecting(g), "--out", "best"], False),
            (["evaluate", "lab", "best", "--out", "out/scores"], False),
            (["generate", g / "run", *prompts, "--out", "best"], False),
            (["report", "--clips", "best", *page], False),
        ],
        "scan": [
            (["report", "--scan", "scan", *page], False),
            (["scan", recipe, "--out", "scan", "--clips", "3", "--noise", "0.3", "0.7"], True),
        ],
        "probe": [
            (["report", "--probe", "probe", *page], False),
            (["probe", recipe, "--data", g / "contact", "--out", "probe", *probing], True),
        ],
        "contact": [(["probe", recipe, "--data", "contact", "--out", "out/p", *probing], False)],
        "published": [(["import", "published", "out/imported"], False)],
        "published-lora.safetensors": [
            (["import", "published-lora.safetensors", "out/imported", "--alpha", "4"], False)
        ],
        "normal.json": [(["compare", g / "seeds/0", "--reference", "normal.json"], False)],
        "ratings.json": [
            (
                ["evaluate", "rated", g / "lab", "--against", g / "lab2", "--out", "out/scores"]
                + ["--ratings", "ratings.json"],
                False,
            )
        ],
        "annotations": [
            (
                ["evaluate", "agreement", g / "lab", "--ratings", "annotations"]
                + ["--set", "column=motion", "--out", "out/scores"],
                False,
            )
        ],
        "refined.csv": [
            (["generate", g / "run", "--prompts", "refined.csv", "--out", "out/made"], False),
            (
                ["generate", g / "run", "--prompts", "refined.csv", "--column", "detailed"]
                + ["--out", "out/long"],
                False,
            ),
            (["refine", g / "prompts.csv", "--out", "refined.csv", *refining(g)], True),
        ],
        "backbone": [
            (["inspect", recipe, *own_models[0]], False),
            (["prepare", recipe, *own_models[0], "--data.cache", "out/cache"], False),
            (["generate", "backbone", *prompts, "--out", "out/made", "--steps", "1"], False),
            (["scan", recipe, *own_models[0], "--out", "out/scan", "--clips", "2"], False),
            (["verify", recipe, *own_models[0], "--out", "out/verified.json"], False),
        ],
        "teacher": [
            (["inspect", recipe, *own_models[1]], False),
            (["prepare", recipe, *own_models[1], "--data.cache", "out/cache"], False),
            (["verify", recipe, *own_models[1], "--out", "out/verified.json"], False),
        ],
        "head.safetensors": [
            (
                [verb, recipe, "--data.cache", "out/cache", "--encoder.name", "headed"]
                + ["--encoder.weights", "head.safetensors", "--set", f"encoder.of={of(ground)}"],
                False,
            )
            for verb in ("inspect", "prepare")
        ],
    }
    return [Command(words, (what,) if mends else ()) for words, mends in pairs[what]]


def of(ground: Ground) -> str:
    spec = yaml.safe_load((ground.root / "recipe.yaml").read_text())["encoder"]
    return json.dumps(spec)


LEFT = ["lora", "run", "cache", "made", "lab", "scan", "probe", "contact", "published"]
LEFT += [
    "samples",
    "best",
    "published-lora.safetensors",
    "normal.json",
    "ratings.json",
    "refined.csv",
    "backbone",
]
LEFT += ["teacher", "head.safetensors", "annotations"]


@st.composite
def leftovers(draw: Any, ground: Ground) -> Laid:
    what = draw(st.sampled_from(LEFT))
    root = ground.root / what
    paths = sorted(p for p in root.rglob("*") if p.is_file()) if root.is_dir() else [root]
    # Small files with words in them are where a reader meets what it does not expect.
    worded = [p for p in paths if p.suffix in (".json", ".jsonl", ".yaml", ".csv", ".txt")]
    path = draw(st.sampled_from(worded * 3 + paths if draw(st.booleans()) else paths))
    whole = path.read_bytes()
    content: Content
    if path.suffix in (".json", ".jsonl") and draw(st.integers(0, 2)):
        lines = whole.decode().splitlines() if path.suffix == ".jsonl" else [whole.decode()]
        place = draw(st.integers(0, max(len(lines) - 1, 0)))
        odd = json.dumps(draw(changed(json.loads(lines[place])))) if lines else "{"
        content = "\n".join([*lines[:place], odd, *lines[place + 1 :]]).encode()
    elif path.suffix == ".yaml" and draw(st.booleans()):
        odd = draw(changed(yaml.safe_load(whole), WORK))
        content = yaml.safe_dump(odd).encode("utf-8", "surrogatepass")
    else:
        content = draw(damaged(whole))
    name = str(path.relative_to(ground.root))
    commands = [*readers(ground, what)]
    return Laid(f"what was left: {name}", {name: content}, commands, (what,))


# Options.


@st.composite
def options(draw: Any, ground: Ground) -> Laid:
    number = st.sampled_from(
        ["0", "-1", "1", "2", "99", "2147483648", "1000000000000", "-9223372036854775809", "1.5"]
        + ["nan", "inf", "1e400", LONG_NUMBER, "", " ", "a", "null", "[1]", "{}", "½", "٣"]
    )
    text = st.one_of(NASTY, number).filter(lambda value: "\x00" not in value)
    g, recipe = ground, ground / "recipe.yaml"
    out = ["--out", "out/x"]
    small = ["--data.cache", "out/cache"]
    bases: list[tuple[list[str], list[str]]] = [
        (
            ["inspect", recipe],
            ["--device", "--optim.batch_size", "--data.height", "--data.width", "--data.frames"]
            + ["--align.hidden", "--align.block", "--encoder.frames", "--encoder.height", "--set"]
            + ["--data.fps", "--seed", "--align.weight", "--optim.betas", "--train.lora.rank"]
            + ["--encoder.group", "--encoder.crop", "--backbone.weights", "--data.lab.clips"],
        ),
        (
            ["verify", recipe, "--out", "out/verified.json"],
            ["--judge", "--against", "--skip", "--device", "--data.frames", "--backbone.weights"],
        ),
        (["prepare", recipe, *small], ["--shard", "--data.manifest", "--data.root", "--set"]),
        (["prepare", recipe], ["--data.cache", "--data.frames", "--data.prepare_batch"]),
        (
            ["train", recipe, *out, "--optim.steps", "1"],
            ["--optim.learning_rate", "--optim.batch_size", "--optim.accumulate", "--align.hidden"]
            + ["--train.precision", "--train.keep_checkpoints", "--set", "--optim.warmup_steps"]
            + ["--optim.gradient_clip", "--train.lora.rank", "--train.trackers", "--seed"],
        ),
        (
            ["generate", g / "run", "--prompts", g / "prompts.csv", *out],
            ["--seed", "--shard", "--step", "--guidance-scale", "--column", "--backbone"]
            + ["--images", "--set", "--prompts"],
        ),
        (["evaluate", "lab", g / "made", "--out", "out/x"], ["--shard", "--set", "--against"]),
        (
            ["select", g / "samples", *selecting(g), *out],
            ["--column", "--by", "--judged-by", "--judged-column", "--most"],
        ),
        (["scan", recipe, *out], ["--clips", "--noise", "--blocks", "--teacher"]),
        (
            ["probe", recipe, "--data", g / "contact", "--protocol", "lab", *out],
            ["--pools", "--draws", "--steps", "--timesteps", "--blocks", "--teacher", "--against"]
            + ["--leave-out", "--models", "--frames", "--through-projector"],
        ),
        (["head", recipe, "--kind", "motion", "--out", "out/h.safetensors"], ["--clips", "--kind"]),
        (["import", g / "published-lora.safetensors", "out/x"], ["--alpha", "--base"]),
        (["export", g / "none", "out/x"], ["--scores", "--dtype", "--format"]),
        (["report", g / "run", "--out", "out/p.html"], ["--clips", "--scan", "--probe"]),
        (["compare", g / "seeds/0"], ["--reference"]),
        (
            ["refine", g / "prompts.csv", "--out", "out/r.csv"],
            ["--model", "--endpoint", "--first-frame"],
        ),
        (
            ["lab", "study", g / "study.yaml", "--out", "out/s"],
            ["--shard", "--rows", "--set"],
        ),
        (["lab"], ["study", "laws", "contact", "phyworld"]),
    ]
    arguments, names = draw(st.sampled_from(bases))
    if arguments == ["lab"]:
        return Laid("options", {}, [Command(["lab", draw(st.sampled_from(names)), draw(text)])])
    command = list(arguments)
    for _ in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from(names))
        value = draw(text)
        if name == "--set":
            value = f"{draw(st.sampled_from(['seed', 'name', 'align.loss', 'data', '']))}={value}"
        command += [name, value]
    return Laid("options", {}, [Command(command)])


KINDS: list[Callable[[Ground], Strategy[Laid]]] = [manifests, recipes, videos, leftovers, options]


def drawn(ground: Ground, seed: str, number: int, cache: dict[tuple[int, int], list[Laid]]) -> Laid:
    """The input of a number. The kinds take turns."""
    kind, nth = number % len(KINDS), number // len(KINDS)
    batch, place = divmod(nth, BATCH)
    if (kind, batch) not in cache:
        found: list[Laid] = []

        @hypothesis.seed(f"{seed} {kind} {batch}")
        @hypothesis.settings(
            max_examples=BATCH,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @hypothesis.given(KINDS[kind](ground))
        def collect(laid: Laid) -> None:
            found.append(laid)

        collect()
        cache[kind, batch] = found
    found = cache[kind, batch]
    return found[place % len(found)]


def feed(ground: Ground, laid: Laid, folder: Path, number: int) -> Results:
    """Run every command of an input."""
    results, here = Results(), folder / "here"
    results.cases["inputs"] = 1
    results.cases[f"inputs: {laid.about.partition('(')[0].partition(':')[0].strip()}"] = 1
    lay(laid, ground, here)
    for place, command in enumerate(laid.commands):
        mine = {here / name for name in (*command.may_write, "out")}
        before = snapshot([ground.root, here])
        ended = run(command.arguments, here, folder / f"{place}")
        after = snapshot([ground.root, here])
        results.runs[f"inputs {command.arguments[0]}"] += 1

        def fault(what: str, said: str, command: Command = command) -> None:
            words = f"{laid.about}\ncd {here} && videorepa {' '.join(command.arguments)[:2000]}"
            more = f"{words}\n{said[-3000:]}"
            name = command.arguments[0]
            results.faults.append(Fault("inputs", number, name, what, more, str(folder)))

        if ended.fault:
            fault(ended.fault, ended.said)
        touched = [
            path
            for path in before.keys() | after.keys()
            if before.get(path) != after.get(path)
            and not any(Path(path) == own or own in Path(path).parents for own in mine)
        ]
        if touched:
            fault(f"touched what is the user's: {Path(min(touched)).name}", "\n".join(touched))
    return results
