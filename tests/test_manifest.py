"""Manifests and prompt lists: what is kept to the letter, and what is refused, with the line."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import unicodedata
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from videorepa.data.manifest import Entry, Prompt, read_manifest, read_prompts
from videorepa.errors import UserError

captions = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


def write_csv(path: Path, header: list[str], *rows: list[str]) -> Path:
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(captions, min_size=1, max_size=5))
def test_captions_survive(tmp_path: Path, texts: list[str]) -> None:
    rows = [[f"{i}.mp4", text] for i, text in enumerate(texts)]
    write_csv(tmp_path / "a.csv", ["video", "caption"], *rows)
    objects = [{"video": name, "caption": text} for name, text in rows]
    for ascii_only in (True, False):
        lines = "\n".join(json.dumps(item, ensure_ascii=ascii_only) for item in objects)
        write(tmp_path / f"{ascii_only}.jsonl", lines)
    for name in ("a.csv", "True.jsonl", "False.jsonl"):
        assert [entry.caption for entry in read_manifest(tmp_path / name)] == texts
        assert [prompt.text for prompt in read_prompts(tmp_path / name)] == texts


@pytest.mark.parametrize(
    "caption",
    ["two\nlines", "two\rlines", 'a "quoted" word, here', "🎾 caught", "x" * 10_000, "y" * 10**6],
)
def test_unusual_captions(tmp_path: Path, caption: str) -> None:
    path = write_csv(tmp_path / "m.csv", ["video", "caption"], ["a.mp4", caption])
    assert read_manifest(path)[0].caption == caption


def test_columns(tmp_path: Path) -> None:
    header = ["video", "caption", "aesthetic score", "fps"]
    path = write_csv(tmp_path / "m.csv", header, ["sub/a.mp4", "A ball.", "5", "8"])
    assert read_manifest(path) == [Entry("sub/a.mp4", tmp_path / "sub/a.mp4", "A ball.")]
    path = write_csv(tmp_path / "m.csv", ["id", "caption", "video"], ["7", "A ball.", "a.mp4"])
    assert read_manifest(path, tmp_path) == [Entry("7", tmp_path / "a.mp4", "A ball.")]
    line = json.dumps({"video": "a.mp4", "caption": "A ball.", "id": "7", "fps": 8})
    path = write(tmp_path / "m.jsonl", f"\n{line}\r\n\n")
    (tmp_path / "videos").mkdir()
    found = read_manifest(path, tmp_path / "videos")
    assert found == [Entry("7", tmp_path / "videos" / "a.mp4", "A ball.")]


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_byte_order_mark(tmp_path: Path, bom: bytes) -> None:
    write(tmp_path / "m.csv", bom + "video,caption\r\na.mp4,ä\r\n".encode())
    write(tmp_path / "m.jsonl", bom + '{"video": "a.mp4", "caption": "ä"}'.encode())
    write(tmp_path / "m.txt", bom + "ä".encode())
    assert read_manifest(tmp_path / "m.csv")[0].caption == "ä"
    assert read_manifest(tmp_path / "m.jsonl")[0].caption == "ä"
    assert read_prompts(tmp_path / "m.txt")[0].text == "ä"


HEAD = "video,caption\n"
GOOD = '{"video": "a.mp4", "caption": "x"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.csv", "", "holds no rows"),
        ("m.csv", HEAD, "holds no rows"),
        ("m.jsonl", "\n\n", "holds no rows"),
        ("m.xlsx", HEAD, "ends in '.xlsx'; expected .csv or .jsonl"),
        ("m.csv", "path,caption\na.mp4,x\n", "line 2: found the columns 'path', 'caption'"),
        ("m.csv", "video,text\na.mp4,x\n", "expected 'caption'"),
        ("m.csv", "video,caption,caption\na,b,c\n", "'caption' is there more than once"),
        ("m.csv", HEAD + "a.mp4, \n", "line 2: 'caption' is empty"),
        ("m.csv", HEAD + 'a.mp4,"\n\u2003\n"\n', "line 2: 'caption' is empty"),
        ("m.csv", HEAD + ",x\n", "line 2: 'video' is empty"),
        ("m.csv", HEAD + 'a,"1\n2"\nb,x\n\na,y\n', "lines 2 and 6: both have the id 'a'"),
        ("m.csv", "id,video,caption\n1,a,x\n1,b,y\n", "lines 2 and 3: both have the id '1'"),
        ("m.csv", "id,video,caption\n,a,x\n", "line 2: 'id' is empty"),
        ("m.csv", HEAD + "a.mp4,A ball, falling\n", "line 2: found 3 fields, expected 2"),
        ("m.csv", HEAD + "a.mp4\n", "line 2: found 1 fields"),
        ("m.csv", HEAD + 'a,x\nb,"open\nc,z\n', "line 3: not valid CSV"),
        ("m.csv", (HEAD + "a,x\nb,ä\n").encode("latin-1"), "line 3: byte 3 is 0xe4"),
        ("m.csv", (HEAD + "a,x\n").encode("utf-16"), "not UTF-8"),
        ("m.jsonl", GOOD + "{'video': 1}\n", "line 2: not valid JSON"),
        ("m.jsonl", GOOD + "[" * 100_000, "line 2: not valid JSON"),
        ("m.jsonl", GOOD + '["a.mp4", "x"]\n', "line 2: found .*expected a JSON object"),
        ("m.jsonl", '{"video": "a.mp4"}', "line 1: found the columns 'video'; expected 'caption'"),
        ("m.jsonl", "{}", "found the columns .none."),
        ("m.jsonl", '{"video": "a.mp4", "caption": ["x"]}', "line 1: 'caption' is ..x"),
        ("m.jsonl", '{"video": "a.mp4", "caption": null}', "'caption' is null; expected text"),
        ("m.jsonl", '{"video": "a", "caption": "x", "id": 3}', "'id' is 3; expected text"),
        ("m.jsonl", '{"video": "a", "caption": "x\\ud83d"}', "lone surrogate. at position 1"),
        ("m.jsonl", GOOD + GOOD, "lines 1 and 2: both have the id 'a.mp4'"),
    ],
)
def test_refused(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(UserError, match=message) as caught:
        read_manifest(path)
    assert str(path) in str(caught.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for read in (read_manifest, read_prompts):
        with pytest.raises(UserError, match="none.csv does not exist"):
            read(tmp_path / "nowhere" / "none.csv")
        with pytest.raises(UserError, match="is a folder"):
            read(tmp_path)
    path = write(tmp_path / "m.csv", HEAD + "a,x\n")
    with pytest.raises(UserError, match="nowhere does not exist"):
        read_manifest(path, tmp_path / "nowhere")
    with pytest.raises(UserError, match="m.csv is not a folder"):
        read_manifest(path, path)


@pytest.mark.parametrize(
    ("video", "message"),
    [
        ("/etc/passwd", "leads out of the root"),
        ("C:\\clips\\a.mp4", "a path of Windows"),
        ("../a.mp4", "leads out of the root"),
        ("sub/../../a.mp4", "leads out of the root"),
        (".", "leads out of the root"),
        ("link/a.mp4", "leads out of the root"),
        ("file.mp4", "leads out of the root"),
        ("a\0.mp4", "a zero byte"),
        ("link/../a.mp4", "leads out of the root"),
    ],
)
def test_paths_that_leave_the_root(tmp_path: Path, video: str, message: str) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    (outside / "sub").mkdir()
    (outside / "sub" / "a.mp4").touch()
    (outside / "a.mp4").touch()
    # Its parent is the folder outside, not the root.
    (root / "link").symlink_to(outside / "sub")
    (root / "file.mp4").symlink_to(outside / "a.mp4")
    path = write_csv(root / "m.csv", ["video", "caption"], ["good.mp4", "x"], [video, "y"])
    with pytest.raises(UserError, match=message) as caught:
        read_manifest(path)
    assert "line 3" in str(caught.value)


def test_symlink_to_itself(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    path = write(tmp_path / "m.csv", HEAD + "loop/a.mp4,x\n")
    # Newer Pythons resolve it without complaint; then reading the clip fails later.
    with contextlib.suppress(UserError):
        assert len(read_manifest(path)) == 1


def test_paths_that_stay_inside(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / "link").symlink_to(root / "sub")
    # The root itself may be reached through a symlink.
    (tmp_path / "alias").symlink_to(root)
    names = ["sub/../a.mp4", "link/b.mp4", "..c.mp4", "not there/d:e.mp4"]
    path = write_csv(root / "m.csv", ["video", "caption"], *([name, "x"] for name in names))
    for base in (root, tmp_path / "alias"):
        assert [entry.path for entry in read_manifest(path, base)] == [base / n for n in names]


def test_an_absolute_path_inside_the_root_is_taken(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "alias").symlink_to(root)
    names = [str(root / "a.mp4"), str(tmp_path / "alias" / "sub" / "b.mp4")]
    path = write_csv(root / "m.csv", ["video", "caption"], *([name, "x"] for name in names))
    for base in (None, root, tmp_path / "alias"):
        found = read_manifest(path, base)
        assert [(entry.id, entry.path) for entry in found] == [(n, Path(n)) for n in names]


def test_the_advice_can_be_followed(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    path = write(tmp_path / "m.csv", HEAD + "/etc/passwd,x\n")
    with pytest.raises(UserError, match="or put m.csv into a folder that holds all videos"):
        read_manifest(path)
    with pytest.raises(UserError, match="or name a root that holds all videos"):
        read_manifest(path, tmp_path / "videos")


def test_names_match_however_their_accents_are_composed(tmp_path: Path) -> None:
    composed, apart = (unicodedata.normalize(form, "fête/é.mp4") for form in ("NFC", "NFD"))
    for listed, stored in ((composed, apart), (apart, composed)):
        root = tmp_path / str(listed == composed)
        (root / stored).parent.mkdir(parents=True)
        (root / stored).touch()
        path = write_csv(root / "m.csv", ["video", "caption"], [listed, "x"], ["ü.mp4", "y"])
        (found, missing) = read_manifest(path)
        assert (found.id, found.path) == (listed, root / stored)
        assert missing.path == root / "ü.mp4"
        # Where both are there, each is itself; where the other leads out, so does this.
        (root / listed).parent.mkdir()
        (root / listed).touch()
        assert read_manifest(path)[0].path == root / listed
        (root / listed).unlink()
        (root / stored).unlink()
        (root / listed).parent.rmdir()
        (root / stored).symlink_to("/etc/passwd")
        with pytest.raises(UserError, match="leads out of the root"):
            read_manifest(path)


@pytest.mark.parametrize("mark", [";", "\t"])
def test_other_marks_between_fields(tmp_path: Path, mark: str) -> None:
    """Excel writes semicolons where the comma is decimal."""
    name = {";": "semicolons", "\t": "tabs"}[mark]
    rows = ['a.mp4;"Balls; a ""red"" one";3,5', "b.mp4;One, two, three.;4"]
    text = "\ufeffvideo;caption;score\r\n" + "\r\n".join(rows) + "\r\n"
    path = write(tmp_path / "m.csv", text.replace(";", mark).replace(f"Balls{mark}", "Balls;"))
    captions = [entry.caption for entry in read_manifest(path)]
    assert captions == ['Balls; a "red" one', "One, two, three."]
    assert [prompt.text for prompt in read_prompts(path)] == captions
    path = write(tmp_path / "m.csv", f"video{mark}caption\na{mark}b{mark}c\n")
    with pytest.raises(UserError, match=f"found 3 fields, expected 2.*that holds quotes, {name}"):
        read_manifest(path)


def test_a_long_manifest_asks_the_disk_little(tmp_path: Path, monkeypatch) -> None:
    rows = [[f"sub{n % 3}/{n}.mp4", "x"] for n in range(1000)]
    path = write_csv(tmp_path / "m.csv", ["video", "caption"], *rows)
    asked: list[object] = []
    lstat = os.lstat
    monkeypatch.setattr(
        os, "lstat", lambda *given, **named: asked.append(given) or lstat(*given, **named)
    )
    assert len(read_manifest(path)) == 1000
    assert len(asked) < 1100, "one question for each video, and some for each folder"


def test_prompts(tmp_path: Path) -> None:
    path = write(tmp_path / "p.txt", "A ball.\r\n\n  \nA \u2028 box. \n")
    expected = [Prompt("0000", "A ball."), Prompt("0001", "A \u2028 box. ")]
    assert read_prompts(path) == expected
    path = write_csv(tmp_path / "p.csv", ["prompt", "id"], ["A ball.", "x"], ["A box.", "y"])
    assert read_prompts(path) == [Prompt("x", "A ball."), Prompt("y", "A box.")]
    path = write_csv(tmp_path / "p.csv", ["prompt", "caption"], ["short", "long"])
    assert read_prompts(path) == [Prompt("0000", "long")]
    (found,) = read_prompts(path, "prompt")
    assert found == Prompt("0000", "short", "long") and found.row["caption"] == "long"
    with pytest.raises(UserError, match="expected 'other'"):
        read_prompts(path, "other")
    path = write(tmp_path / "p.jsonl", '{"caption": "A ball."}\n{"prompt": "A box.", "id": "b"}')
    assert read_prompts(path) == [Prompt("0000", "A ball."), Prompt("b", "A box.")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "\n \n", "holds no rows"),
        ("p.md", "A ball.", "expected .txt or .csv or .jsonl"),
        ("p.txt", b"A ball.\n\xff\n", "line 2: byte 1 is 0xff"),
        ("p.csv", "text\nA ball.\n", "found the columns 'text'; expected 'caption' or 'prompt'"),
        ("p.csv", "id,prompt\na,x\na,y\n", "lines 2 and 3: both have the id 'a'"),
        ("p.jsonl", '{"prompt": "x", "id": "0001"}\n{"prompt": "y"}', "both have the id '0001'"),
        ("p.jsonl", '{"prompt": 3}', "'prompt' is 3; expected text"),
    ],
)
def test_prompts_refused(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_prompts(write(tmp_path / name, content))
