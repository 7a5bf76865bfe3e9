"""Refining prompts: a server that answers as scripted, a tiny language model, and what is generated
from the one text and scored against the other."""

from __future__ import annotations

import csv
import json
import shutil
import socket
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from conftest import OUTSIDE
from videorepa.cli import main
from videorepa.data.manifest import Prompt, read_prompts
from videorepa.data.video import write_video
from videorepa.errors import UserError
from videorepa.evaluate import evaluate
from videorepa.generate import generate
from videorepa.recipe import Recipe
from videorepa.refine import INSTRUCTION, KEY_VARIABLE, WAITS, refine
from videorepa.system.fingerprint import json_digest
from videorepa.world.render import make_clip

PROMPTS = [Prompt("a", "A ball falls."), Prompt("b", 'A "cup",\ntipping.'), Prompt("c", "Rain.")]
SECRET = "sk-very-secret"


class Scripted(HTTPServer):
    """Answers with what stands in `script`, in turn, then with the caption in capitals."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script: list[tuple[int, dict[str, str], bytes]] = []
        self.requests: list[dict[str, Any]] = []
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    @property
    def asked(self) -> list[str]:
        return [request["body"]["messages"][1]["content"] for request in self.requests]

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        named = {key.replace("_", "-"): value for key, value in headers.items()}
        self.script.append((status, named, body))


class _Handler(BaseHTTPRequestHandler):
    server: Scripted

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(
            {
                "path": self.path,
                "headers": {name.lower(): value for name, value in self.headers.items()},
                "body": body,
            }
        )
        said = f'  "{body["messages"][1]["content"].upper()}\n In detail."\n'
        whole = json.dumps({"choices": [{"message": {"content": said}}]}).encode()
        script = self.server.script
        status, headers, body = script.pop(0) if script else (200, {}, whole)
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch) -> Iterator[Scripted]:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    with Scripted() as found:
        thread = Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield found
        found.shutdown()
        thread.join()


@pytest.fixture
def waited(monkeypatch) -> list[float]:
    waits: list[float] = []
    monkeypatch.setattr(sys.modules["videorepa.refine"].time, "sleep", waits.append)
    return waits


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open(newline="")))


def test_what_a_first_frame_shows_is_told_where_the_list_says_it(
    server: Scripted, tmp_path: Path
) -> None:
    described = tmp_path / "prompts.csv"
    described.write_text(
        "id,caption,image,shows\na,A ball falls.,a.png,A red ball.\nb,A ball falls.,b.png,A  box.\n"
    )
    prompts, out = read_prompts(described), tmp_path / "refined.csv"
    refine(prompts, out, model="m", endpoint=server.url, first_frame="shows")
    assert server.asked == [
        f"A ball falls.\n\nThe image shows: A {x}." for x in ("red ball", "box")
    ]
    system = server.requests[0]["body"]["messages"][0]["content"]
    assert system.startswith(INSTRUCTION) and "continues an image" in system
    assert [(row["image"], row["first_frame"]) for row in rows_of(out)] == [
        ("a.png", "A red ball."),
        ("b.png", "A box."),
    ]
    refine(prompts, out, model="m", endpoint=server.url, first_frame="shows")
    assert len(server.requests) == 2
    with pytest.raises(UserError, match="was not written by refine with the columns id, caption"):
        refine(prompts, out, model="m", endpoint=server.url)
    with pytest.raises(UserError, match="'a' has no 'looks'"):
        refine(prompts, tmp_path / "x.csv", model="m", endpoint=server.url, first_frame="looks")
    plain = tmp_path / "plain.csv"
    refine(prompts, plain, model="m", endpoint=server.url)
    assert server.asked[2:] == ["A ball falls."] and rows_of(plain)[1]["image"] == "b.png"


def test_a_server_is_asked_once_for_each_prompt(server: Scripted, tmp_path: Path) -> None:
    out = tmp_path / "refined.csv"
    twice = [*PROMPTS, Prompt("d", "Rain.")]
    found = refine(twice, out, model="m", endpoint=server.url)
    assert found.rows == rows_of(out) and found.asked == 3 and found.failed == {}
    assert server.asked == [prompt.caption for prompt in PROMPTS]
    assert {request["path"] for request in server.requests} == {"/v1/chat/completions"}
    assert server.requests[0]["body"]["model"] == "m"
    system = {"role": "system", "content": INSTRUCTION}
    assert server.requests[0]["body"]["messages"][0] == system
    assert "authorization" not in server.requests[0]["headers"]
    assert [(row["id"], row["caption"]) for row in found.rows] == [(p.id, p.caption) for p in twice]
    assert found.rows[0]["detailed"] == "A BALL FALLS. In detail.", "one line, without its quotes"
    assert found.rows[2]["detailed"] == found.rows[3]["detailed"]
    assert {row["model"] for row in found.rows} == {"m"}
    assert {row["instruction"] for row in found.rows} == {json_digest(INSTRUCTION)}

    before = out.read_bytes()
    more = refine([*twice, Prompt("e", "Snow.")], out, model="m", endpoint=server.url + "/")
    assert server.asked[3:] == ["Snow."] and more.asked == 1 and len(more.rows) == 5
    assert out.read_bytes().startswith(before)
    assert refine([*twice, Prompt("e", "Snow.")], out, model="m", endpoint=server.url).asked == 0
    assert len(server.requests) == 4


def test_rows_are_kept_when_it_is_stopped(server: Scripted, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "sub" / "refined.csv"
    module = sys.modules["videorepa.refine"]
    plain = module._cleaned
    monkeypatch.setattr(
        module, "_cleaned", lambda t: (_ for _ in ()).throw(KeyboardInterrupt)
        if "CUP" in t else plain(t)
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        refine(PROMPTS, out, model="m", endpoint=server.url)
    assert [row["id"] for row in rows_of(out)] == ["a"]
    monkeypatch.setattr(module, "_cleaned", plain)
    assert refine(PROMPTS, out, model="m", endpoint=server.url).asked == 2
    assert [row["id"] for row in rows_of(out)] == ["a", "b", "c"]


def test_a_list_that_repeats_what_is_refined_gets_its_rows_unasked(
    server: Scripted, tmp_path: Path
) -> None:
    out = tmp_path / "refined.csv"
    refine(PROMPTS, out, model="m", endpoint=server.url)
    found = refine([Prompt("d", "Rain."), *PROMPTS], out, model="m", endpoint=server.url)
    assert found.asked == 0 and [row["id"] for row in rows_of(out)] == ["d", "a", "b", "c"]
    before = out.stat().st_mtime_ns
    refine([Prompt("d", "Rain."), *PROMPTS], out, model="m", endpoint=server.url)
    assert out.stat().st_mtime_ns == before


def test_writing_takes_no_longer_for_a_long_list_than_asking(tmp_path: Path, monkeypatch) -> None:
    module = sys.modules["videorepa.refine"]
    written, write = [], module.atomic_write
    monkeypatch.setattr(module, "_server", lambda *_: (str.upper, "m"))
    monkeypatch.setattr(
        module, "atomic_write", lambda path, text: (written.append(path), write(path, text))
    )
    prompts = [Prompt(str(number), f"Ball {number} falls.") for number in range(300)]
    found = refine(prompts, tmp_path / "refined.csv", model="m", endpoint="there")
    # Each answer comes at once, and writing takes a tenth of the time.
    assert len(written) < 100 and written[0] == found.out
    assert rows_of(found.out) == found.rows and len(found.rows) == found.asked == 300


def test_a_busy_server_is_asked_again_later(
    server: Scripted, tmp_path: Path, waited: list[float]
) -> None:
    server.answer(429, Retry_After="7")
    server.answer(503)
    server.answer(500, Retry_After="Wed, 21 Oct 2015 07:28:00 GMT")
    found = refine(PROMPTS[:1], tmp_path / "r.csv", model="m", endpoint=server.url)
    assert len(found.rows) == 1 and waited == [7.0, *WAITS[1:3]]


def test_a_prompt_that_gets_no_answer_costs_itself_alone(
    server: Scripted, tmp_path: Path, waited: list[float], capsys
) -> None:
    for _ in range(len(WAITS) + 1):
        server.answer(502, b"down")
    server.answer(400, b"too rude")
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("id,caption\na,A ball falls.\nb,A cup.\nc,Rain.\n")
    out = tmp_path / "r.csv"
    command = ["refine", str(prompts), "--out", str(out), "--model", "m", "--endpoint", server.url]
    assert main(command) == 1
    said = capsys.readouterr().err
    assert "2 prompts could not be refined" in said
    assert (
        "'a'" in said and "502 down, 6 times" in said and "'b'" in said and "400 too rude" in said
    )
    assert [row["id"] for row in rows_of(out)] == ["c"] and waited == list(WAITS)
    server.answer(200, b'{"choices": [{"message": {"content": "<think>Hm.\\n</think> \\"\\""}}]}')
    server.answer(200, b'{"choices": []}')
    assert main(command) == 1
    said = capsys.readouterr().err
    assert "the model answered nothing" in said and "holds no message" in said
    assert main(command) == 0
    assert "3 refined prompts" in capsys.readouterr().out
    assert [row["id"] for row in rows_of(out)] == ["a", "b", "c"]


def test_the_key_goes_to_the_server_and_nowhere_else(
    server: Scripted, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, SECRET)
    out = tmp_path / "r.csv"
    refine(PROMPTS[:1], out, model="m", endpoint=server.url)
    assert server.requests[0]["headers"]["authorization"] == f"Bearer {SECRET}"
    server.answer(401, f"the key {SECRET} is unknown".encode())
    with pytest.raises(UserError, match=r"401 the key \*\*\* is unknown\. Check --endpoint"):
        refine(PROMPTS, out, model="m", endpoint=server.url)
    server.answer(302, Location=f"{server.url}/elsewhere")
    with pytest.raises(UserError, match="answered 302"):
        refine(PROMPTS, out, model="m", endpoint=server.url)
    assert len(server.requests) == 3 and len(rows_of(out)) == 1
    assert SECRET not in "".join(capsys.readouterr())
    assert all(SECRET not in path.read_text() for path in tmp_path.rglob("*.*"))


@pytest.mark.parametrize(
    "key", ["sk-very\rsecret", "sk-very\n\nsecret", "sk-very\x1bsecret", "schlüssel"]
)
def test_a_faulty_key_is_refused_without_being_shown(
    server: Scripted, tmp_path: Path, monkeypatch, capsys, key: str
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, key)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("A ball falls.\n")
    out = tmp_path / "r.csv"
    command = ["refine", str(prompts), "--out", str(out), "--model", "m", "--endpoint", server.url]
    assert main(command) == 1
    shown = "".join(capsys.readouterr())
    assert f"{KEY_VARIABLE} holds a line break or another character" in shown
    assert "sk-" not in shown and "secret" not in shown and "schl" not in shown
    assert not server.requests and not out.exists()


def test_space_around_a_key_is_left_out(server: Scripted, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, f" {SECRET}\r\n")
    refine(PROMPTS[:1], tmp_path / "r.csv", model="m", endpoint=server.url)
    assert server.requests[0]["headers"]["authorization"] == f"Bearer {SECRET}"


def test_the_login_and_the_offline_mode_of_the_hub_have_no_part_in_it(
    server: Scripted, tmp_path: Path, monkeypatch
) -> None:
    import huggingface_hub

    monkeypatch.setenv("HF_TOKEN", "hf_login")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hooks = huggingface_hub.get_session().event_hooks
    refine(PROMPTS[:1], tmp_path / "r.csv", model="m", endpoint=server.url)
    assert "hf_login" not in str(server.requests)
    assert "authorization" not in server.requests[0]["headers"]
    assert huggingface_hub.get_session().event_hooks == hooks
    with pytest.raises(huggingface_hub.errors.OfflineModeIsEnabled):
        huggingface_hub.get_session().get(server.url)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirection_is_followed(
    server: Scripted, tmp_path: Path, monkeypatch, status: int
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, SECRET)
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        elsewhere.setblocking(False)
        server.answer(status, Location=f"http://127.0.0.1:{elsewhere.getsockname()[1]}/v1")
        with pytest.raises(UserError, match=f"answered {status}"):
            refine(PROMPTS, tmp_path / "r.csv", model="m", endpoint=server.url)
        with pytest.raises(BlockingIOError):
            elsewhere.accept()
    assert len(server.requests) == 1


def test_a_silent_server_is_asked_again_later(
    tmp_path: Path, waited: list[float], monkeypatch
) -> None:
    monkeypatch.setattr(sys.modules["videorepa.refine"], "TIMEOUT", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        refined = refine(PROMPTS[:1], tmp_path / "r.csv", model="m", endpoint=url)
    assert "did not answer within 0.05 s, 6 times" in refined.failed["a"]
    assert waited == list(WAITS) and refined.rows == []


@pytest.mark.parametrize("body", [b'"down"', b"[1]", b"null", b"\xff", b'{"errors": [1]}'])
def test_errors_of_any_form_are_reported(
    server: Scripted, tmp_path: Path, waited: list[float], body: bytes
) -> None:
    server.answer(503, body)
    server.answer(400, body)
    refined = refine(PROMPTS[:1], tmp_path / "r.csv", model="m", endpoint=server.url)
    assert f"answered 400 {body.decode(errors='replace')}" in refined.failed["a"]
    assert waited == [WAITS[0]]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff",
        b"<html>",
        b"[]",
        b'{"items": 1}',
        b'{"choices": [1]}',
        b'{"choices": {"0": 1}}',
        b'{"choices": [{"message": "text"}]}',
        b'{"choices": [{"message": {"content": null}}]}',
    ],
)
def test_an_answer_without_a_message_costs_its_prompt_alone(
    server: Scripted, tmp_path: Path, body: bytes
) -> None:
    server.answer(200, body)
    refined = refine(PROMPTS, tmp_path / "r.csv", model="m", endpoint=server.url)
    assert "the server's answer holds no message: " in refined.failed["a"]
    assert [row["id"] for row in refined.rows] == ["b", "c"]


def test_an_answer_cut_off_at_the_limit_of_tokens_is_refused(
    server: Scripted, tmp_path: Path
) -> None:
    choice = {"message": {"content": "A ball fa"}, "finish_reason": "length"}
    server.answer(200, json.dumps({"choices": [choice]}).encode())
    choice = {"message": {"content": "A cup tips."}, "finish_reason": "stop"}
    server.answer(200, json.dumps({"choices": [choice]}).encode())
    refined = refine(PROMPTS[:2], tmp_path / "r.csv", model="m", endpoint=server.url)
    assert "cut the answer off at its limit of tokens" in refined.failed["a"]
    assert [row["detailed"] for row in refined.rows] == ["A cup tips."]


def test_what_cannot_work_is_said_plainly(
    server: Scripted, tmp_path: Path, waited: list[float]
) -> None:
    out = tmp_path / "r.csv"
    for faulty in (
        *("", "file:///etc", "http://", "http://[", "https://host:port/v1", "http://a..b/v1"),
        *("http://host\0/v1", "http://\u2603.net/v1", f"http://{'a' * 64}.net", "http://host/v1#x"),
        *(f"http://host/{'x' * 100_000}", "http://me:secret@host/v1"),
    ):
        message = r"is an http:// or https:// address .*got ('http|'file|'')"
        with pytest.raises(UserError, match=message) as refused:
            refine(PROMPTS, out, model="m", endpoint=faulty)
        assert "secret" not in str(refused.value) and len(str(refused.value)) < 300
    with pytest.raises(UserError, match="cannot be reached: .*Is the server running"):
        refine(PROMPTS, out, model="m", endpoint="http://127.0.0.1:1/v1")
    assert waited == list(WAITS) and not out.exists()

    refine(PROMPTS, out, model="m", endpoint=server.url)
    before = out.read_bytes()
    with pytest.raises(UserError, match="was refined by m with the instruction .*; this is other"):
        refine(PROMPTS, out, model="other", endpoint=server.url)
    with pytest.raises(UserError, match="holds 1 prompt that the list of prompts lacks.*'c'"):
        refine(PROMPTS[:2], out, model="m", endpoint=server.url)
    assert out.read_bytes() == before
    header = before.decode().splitlines()[0]
    ragged = (f"{header}\n{'a,' * 9}a\n", f"{header}\na,b\n")
    for others in (*ragged, "caption,detailed\nA,B\n", "A red ball falls.\n", "caption,detailed\n"):
        out.write_text(others)
        with pytest.raises(UserError, match="was not written by refine"):
            refine(PROMPTS, out, model="m", endpoint=server.url)
        assert out.read_text() == others
    out.write_text("caption,detailed\nA,B\n")
    with pytest.raises(UserError, match="was not written by refine"):
        refine(PROMPTS, out, model="m", endpoint=server.url)
    out.write_bytes(b"\xff")
    with pytest.raises(UserError, match="cannot be read as CSV"):
        refine(PROMPTS, out, model="m", endpoint=server.url)


@pytest.mark.parametrize("chat", [False, True])
def test_a_model_on_this_machine(tmp_path: Path, chat: bool, monkeypatch) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE({letter: n for n, letter in enumerate(letters)}, []))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="</s>")
    if chat:
        tokenizer.chat_template = (
            "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}[assistant]"
        )
    torch.manual_seed(6)  # It goes a while without repeating itself.
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=tokenizer.eos_token_id,
    )
    folder = tmp_path / "tiny"
    live = LlamaForCausalLM(config)
    live.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    text = (
        f"[system] {INSTRUCTION}[user] A ball falls.[assistant]"
        if chat
        else f"{INSTRUCTION}\n\nCaption: A ball falls.\n\nDescription:"
    )
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    for _ in range(40):  # The likeliest token each time.
        with torch.no_grad():
            following = live(ids).logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, following], 1)
    answer = ids[0, start:].tolist()
    # Of the tokens of its answer, the one that first comes latest is made the one that ends it.
    last = max(map(answer.index, answer))
    live.generation_config.eos_token_id = answer[last]
    live.save_pretrained(folder)

    monkeypatch.setattr("videorepa.system.device.compute_dtype", lambda *_: torch.float32)
    out = tmp_path / "r.csv"
    monkeypatch.setattr(sys.modules["videorepa.refine"], "NEW_TOKENS", last + 1)
    refined = refine(PROMPTS[:1], out, model=str(folder))
    assert f"does not end within {last + 1} tokens" in refined.failed["a"] and not out.exists()
    monkeypatch.setattr(sys.modules["videorepa.refine"], "NEW_TOKENS", 40)
    refined = refine(PROMPTS[:1], out, model=str(folder))
    assert refined.asked == 1 and refined.failed == {}
    (row,) = rows_of(out)
    text = tokenizer.decode(answer[: last + 1], skip_special_tokens=True)
    assert row["detailed"] == " ".join(text.split()) and len(row["detailed"]) > 20
    assert row["model"].startswith("tiny ")
    other = shutil.copytree(folder, tmp_path / "other" / "tiny")
    (other / "model.safetensors").rename(other / "weights.bin")
    with pytest.raises(UserError, match="was refined by tiny .*; this is tiny "):
        refine(PROMPTS[:1], out, model=str(other))
    with pytest.raises(UserError, match="could not be loaded as a causal language model"):
        refine(PROMPTS[:1], tmp_path / "new.csv", model=str(other))


# One text is generated from, the other scored.


def test_columns_say_what_is_generated_from_and_what_is_scored(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("caption,detailed_caption\nA ball.,A red ball on a floor.\n")
    (found,) = read_prompts(path, "detailed_caption")
    assert found == Prompt("0000", "A red ball on a floor.", "A ball.")
    (found,) = read_prompts(path)
    assert (found.text, found.caption) == ("A ball.", "A ball.")
    path.write_text("upsampled_caption,other\nA red ball.,x\n")
    (found,) = read_prompts(path, "upsampled_caption")
    assert found == Prompt("0000", "A red ball.") and found.caption == "A red ball."
    with pytest.raises(UserError, match="expected 'detailed': rename or add it"):
        read_prompts(path, "detailed")


@pytest.mark.parametrize(
    ("name", "column", "count"),
    [("videophy", "detailed_caption", 344), ("videophy2", "upsampled_caption", 590)],
)
def test_the_published_lists_are_read(name: str, column: str, count: int) -> None:
    path = OUTSIDE / "prompts" / f"{name}.csv"
    if not path.exists():
        pytest.skip("the published prompts are not on this machine")
    found = read_prompts(path, column)
    assert len(found) == count and all(len(p.text) > len(p.caption) > 9 for p in found)


def test_clips_are_generated_from_the_detailed_text_and_scored_against_the_caption(
    recipe: Recipe, server: Scripted, tmp_path: Path, monkeypatch
) -> None:
    from videorepa.benchmarks import lab

    clip = make_clip(7, 0, "fall")
    refined = tmp_path / "refined.csv"
    refine([Prompt("a", clip.caption)], refined, model="m", endpoint=server.url)
    (prompt,) = read_prompts(refined, "detailed")
    assert prompt == Prompt("a", clip.caption.upper() + " In detail.", clip.caption)
    base = tmp_path / "base.yaml"
    recipe.to_yaml(base)
    out = tmp_path / "clips"
    given = ["--prompts", str(refined), "--column", "detailed", "--out", str(out)]
    assert main(["generate", str(base), *given]) == 0
    (made,) = out.glob("*.mp4")
    about = json.loads(made.with_suffix(".json").read_text())
    assert (about["prompt"], about["caption"]) == (prompt.text, prompt.caption)
    # The same text as a prompt of its own gives the same clip: the caption has no part in it.
    (same,) = generate(base, [Prompt("a", prompt.text)], tmp_path / "same")
    assert same.read_bytes() == made.read_bytes()

    seen = []
    score = lab.Lab.score
    monkeypatch.setattr(lab.Lab, "score", lambda *all: (seen.append(all[2]), score(*all))[1])
    write_video(made, clip.frames, 8)
    assert evaluate("lab", out).summary.by_scenario.keys() == {"fall"}
    assert seen == [clip.caption]
    # Sidecars of before had one text for both.
    del about["caption"]
    made.with_suffix(".json").write_text(json.dumps(about | {"prompt": clip.caption}))
    evaluate("lab", out, tmp_path / "again")
    assert seen == [clip.caption] * 2
