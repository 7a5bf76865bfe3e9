"""VideoScore2: what the stock model is given of a clip, how its answer is read, the whole way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AddedToken,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from test_judge import clips_of
from videorepa.artifacts.scores import Scores, failing_checks
from videorepa.benchmarks import videoscore2
from videorepa.benchmarks.videoscore2 import QwenJudge, frame_indices, patches, score_after
from videorepa.errors import ClipError, UserError
from videorepa.evaluate import evaluate
from videorepa.evaluation.tables import table

MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MARKS += ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
# Words of the instructions, so that these are short: other text has a token for each byte.
WORDS = ["visual quality: ", "; text-to-video alignment: ", ", physical/common-sense consistency: "]
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}{% if part.type == 'video' %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_judge(folder: Path) -> Path:
    """A random judge of a few thousand weights in the published folder's layout."""
    vocabulary = {letter: n for n, letter in enumerate(bytes_to_unicode().values())}
    tokenizer: Any = Qwen2Tokenizer(vocab=vocabulary, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in WORDS])
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    ids = {mark: tokenizer.convert_tokens_to_ids(mark) for mark in MARKS}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [2, 3, 3],
            },
        },
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 32,
            "window_size": 112,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
        },
        video_token_id=ids["<|video_pad|>"],
        image_token_id=ids["<|image_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    torch.manual_seed(3)
    model: Any = Qwen2_5_VLForConditionalGeneration(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=1.5 * parameter[0].numel() ** -0.5)
    ends = {"eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"]}
    model.generation_config.update(**ends)
    model.save_pretrained(folder, max_shard_size="100KB")
    return folder


def load_judge(folder: Path) -> QwenJudge:
    return QwenJudge.load(folder, torch.device("cpu"), torch.float32)


def noise(frames: int = 4, height: int = 280, width: int = 392) -> np.ndarray:
    rng = np.random.default_rng(frames)
    return rng.integers(0, 256, (frames, height, width, 3), np.uint8)


def test_frames_are_chosen_as_published():
    assert frame_indices(49, 8.0) == [0, 4, 9, 13, 17, 22, 26, 31, 35, 39, 44, 48]
    assert len(frame_indices(81, 16.0)) == 10 and frame_indices(81, 16.0)[-1] == 80
    # Of a short clip four, or as many pairs as it has.
    assert frame_indices(17, 30.0) == [0, 5, 11, 16]
    assert frame_indices(3, 8.0) == [0, 2] and frame_indices(1, 8.0) == []
    assert len(frame_indices(60 * 30 * 10, 30.0)) == 768


# What the model is given.


def test_patches_lie_as_the_model_wants_them():
    frames = noise()
    pixels, grid = patches(Qwen2VLImageProcessorPil(), frames)
    assert grid.tolist() == [[2, 20, 28]] and pixels.shape == (2 * 20 * 28, 3 * 2 * 14 * 14)
    mean, std = Qwen2VLImageProcessorPil.image_mean, Qwen2VLImageProcessorPil.image_std
    for t, y, x, c in np.random.default_rng(1).integers(0, (4, 280, 392, 3), (200, 4)):
        # Tokens row by row; the four patches of a token row by row within it.
        token = (t // 2 * 10 + y // 28) * 14 + x // 28
        patch = token * 4 + y % 28 // 14 * 2 + x % 28 // 14
        place = ((c * 2 + t % 2) * 14 + y % 14) * 14 + x % 14
        expected = (frames[t, y, x, c] / 255 - mean[c]) / std[c]
        assert pixels[patch, place].item() == pytest.approx(expected, abs=1e-5)


def test_a_clip_of_equal_frames_is_a_still_image_to_the_stock_processor():
    still = noise(1, 100, 130)
    limits = {"shortest_edge": 128 * 28**2, "longest_edge": 768 * 28**2}
    stock = Qwen2VLImageProcessorPil(size=limits)(list(still), return_tensors="pt")
    # Whatever limits of its own a processor has.
    pixels, grid = patches(Qwen2VLImageProcessorPil(), still.repeat(2, 0))
    assert torch.equal(pixels, stock["pixel_values"])
    assert grid.tolist() == stock["image_grid_thw"].tolist() == [[1, 20, 26]]


def test_frames_of_a_long_clip_are_smaller(monkeypatch):
    frames = noise(2, 560, 784)
    assert patches(Qwen2VLImageProcessorPil(), frames)[1].tolist() == [[1, 40, 56]]
    # The multiples of 28 below that in the same aspect: 308 x 448 = 137,984.
    monkeypatch.setattr(videoscore2, "MOST_PIXELS_OF_ALL", 150_000)
    assert patches(Qwen2VLImageProcessorPil(), frames)[1].tolist() == [[1, 22, 32]]


def test_a_clip_too_narrow_for_the_stock_processor_is_one_that_cannot_be_scored():
    with pytest.raises(ClipError, match="frames are 2x600; the judge takes frames whose long side"):
        patches(Qwen2VLImageProcessorPil(), noise(2, 2, 600))
    assert patches(Qwen2VLImageProcessorPil(), noise(2, 2, 400))[1].prod() > 0


def test_the_model_is_given_a_place_for_each_of_the_videos_tokens(live):
    frames = noise()
    inputs = live.inputs(frames, "Rate it.")
    text = live.tokenizer.decode(inputs["input_ids"][0])
    marks = "<|video_pad|>" * 280
    assert text == (
        f"<|im_start|>user\n<|vision_start|>{marks}<|vision_end|>Rate it.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert inputs["mm_token_type_ids"].sum() == 2 * 280
    seen = live.model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"])
    assert sum(map(len, seen.pooler_output)) == 280
    with pytest.raises(UserError, match="make 2 places for the video"):
        live.inputs(frames, "Rate <|video_pad|>.")


def test_answers_are_the_likeliest_tokens_one_after_the_other(live, monkeypatch):
    monkeypatch.setattr(videoscore2, "ANSWER_LENGTH", 3)
    frames = noise()
    tokens, logits = live.answer(frames, "Rate it.")
    inputs = live.inputs(frames, "Rate it.")
    assert len(tokens) == len(logits) == 3
    # As in one go, with the video's tokens in their places in time, height and width.
    answer = torch.tensor([tokens])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], answer], 1)
    inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], 0 * answer.int()], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    places, _ = live.model.model.get_rope_index(**inputs)
    # A token covers a second, which is two places in time; text goes on after the widest of them.
    assert places[0, 0].unique().tolist()[6:10] == [6, 7, 9, 7 + 14]
    with torch.no_grad():
        whole = live.model(**inputs, position_ids=places).logits[0, -4:-1]
    assert whole.argmax(-1).tolist() == tokens
    torch.testing.assert_close(logits, whole[:, live.digits], rtol=1e-3, atol=1e-3)
    _, backwards = live.answer(frames[::-1].copy(), "Rate it.")
    assert not torch.allclose(backwards[0], logits[0], atol=1e-3)


# How its answer is read.

FORM = "".join(f"{word}{{}}" for word in WORDS)


@pytest.mark.parametrize(
    ("answer", "numbers"),
    [
        (FORM.format(4, 3, 2), ["4", "3", "2"]),
        # It says the words, and numbers, while it reasons.
        (
            "First, visual quality: 2 balls are sharp. Physical/common-sense consistency: 1 of "
            f"them hovers.\n\n{FORM.format(4, 3, 2)}\nSo its visual quality is good.",
            ["4", "3", "2"],
        ),
        ("**Visual Quality**: **5**\n- text-to-video alignment:3", ["5", "3", None]),
        # The number after a missing one is another's.
        (FORM.format(4, "", 2), ["4", None, "2"]),
        ("The video looks fine, 5 of 5.", [None, None, None]),
        (
            "<think>Visual quality: 2 faults.</think>\n(1) visual quality – sharp, steady: 3"
            "\n(2) **text-to-video alignment (is it all there):** 4\n"
            "(3) physical/common-sense consistency - does it fall: 5",
            ["3", "4", "5"],
        ),
        # Another's number, after a marker without a colon.
        ("visual quality, text-to-video alignment: 3", [None, "3", None]),
        (FORM.format(10, 45, 4.5), ["10", "45", "4.5"]),
        (FORM.format("<4>", "3/5", "2."), ["4", "3", "2"]),
        ("visual quality: 4; later, visual quality: unclear", [None, None, None]),
    ],
)
def test_the_number_after_the_last_marker_counts(answer, numbers):
    read = [score_after(answer, marker) for marker in videoscore2.MARKERS.values()]
    assert [match and match[0] for match in read] == numbers
    assert all(answer[match[1] :].startswith(match[0]) for match in read if match)


def test_a_score_knows_how_sure_the_judge_was(live):
    text = f"Ein Würfel, 立方体 🎲: visual quality: 1 cube.\n{FORM.format(4, 10, 0)}"
    tokens = live.tokenizer.encode(text)
    logits = torch.zeros(len(tokens), 5)
    place = max(n for n, token in enumerate(tokens) if live.decode([token]) == "4")
    logits[place] = torch.tensor([0.0, 0.0, 1.0, 2.0, 1.0])
    shares = np.exp([0, 0, 1, 2, 1]) / np.exp([0, 0, 1, 2, 1]).sum()
    rating = live.rate(tokens, logits, "visual quality")
    assert (rating.value, rating.text) == (4, "4")
    assert list(rating.probabilities.values()) == pytest.approx(shares.tolist())
    assert rating.expected == pytest.approx((shares * [1, 2, 3, 4, 5]).sum())
    for marker, number in (("text-to-video alignment", "10"), (WORDS[2][2:-2], "0")):
        rating = live.rate(tokens, logits, marker)
        assert (rating.value, rating.text, rating.expected) == (None, number, None)
    logits[place, 3] = float("nan")
    rating = live.rate(tokens, logits, "visual quality")
    assert rating.value is None and "not finite" in rating.text


# Folders of clips.

PROMPTS = ["A ball falls.", "White milk is poured slowly."]


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    path = tmp_path / "captions.csv"
    path.write_text(
        "caption,detailed_caption\nA ball falls.,A red ball falls.\n"
        "Milk is poured.,White milk is poured slowly.\nTea.,Hot tea.\n"
    )
    return path


@pytest.fixture
def in_form(monkeypatch):
    """Whatever it would say, the judge answers in the form; which digits is up to it."""
    kind: Any = Qwen2_5_VLForConditionalGeneration
    generate = kind.generate
    asked: list[int] = []

    def constrained(self: Any, input_ids: torch.Tensor, **options: Any) -> Any:
        end, length = self.generation_config.eos_token_id, input_ids.shape[1]
        asked.append(length)
        words = iter(range(len(self.lm_head.weight) - len(WORDS), len(self.lm_head.weight)))
        form = [allowed for word in words for allowed in ([word], list(range(16, 21)))]

        def allowed(_: int, ids: torch.Tensor) -> list[int]:
            return [*form, [end]][len(ids) - length]

        return generate(self, input_ids=input_ids, prefix_allowed_tokens_fn=allowed, **options)

    monkeypatch.setattr(kind, "generate", constrained)
    return asked


def test_two_folders_are_judged_and_compared(judge, captions, in_form, tmp_path, capsys):
    ours = clips_of(tmp_path / "ours", PROMPTS, samples=2)
    theirs = clips_of(tmp_path / "theirs", PROMPTS, samples=2, salt=1)
    (ours / "0001-1.mp4").write_bytes(b"no video")
    options = [f"judge={judge}", f"captions={captions}", "precision=float32"]
    evaluation = evaluate("videoscore2", ours, against=theirs, settings=options)
    # Once, for both folders; a terminal breaks its lines anywhere.
    printed = " ".join(capsys.readouterr().err.split())
    assert printed.count("do not compare with published ones") == 1
    assert evaluation.summary.n == 3 and len(evaluation.summary.failures) == 1
    assert [(m["prompt"], m["k"]) for m in evaluation.summary.missing] == [("Tea.", 0), ("Tea.", 1)]
    rows = [json.loads(line) for line in (ours / "scores" / "scores.jsonl").open()]
    for row in rows:
        assert row["invalid"] == {} and row["joint"] == (row["sa"] and row["pc"])
        for metric in ("vq", "sa", "pc"):
            assert row[metric] == (row[f"{metric}_rating"] >= 4)
            assert 1 <= row[f"{metric}_expected"] <= 5
        assert row["answer"] == FORM.format(*(row[f"{m}_rating"] for m in ("vq", "sa", "pc")))
        about = row["judge"]
        assert about["dtype"] == "float32" and len(about["weights"]) == 16
        assert about["frames"] == "2 a second, 4 to 768"
        assert about["instruction"].endswith("(own, not comparable with published scores)")
    # Other pixels, other scores: the clip is looked at.
    assert len({row["pc_expected"] for row in rows}) == 3
    metrics = evaluation.summary.metrics
    means = [f"{metric}_{name}" for name in ("rating", "expected") for metric in ("vq", "sa", "pc")]
    assert list(metrics) == ["vq", "sa", "pc", "joint", *means]
    mean = np.mean([row["vq_expected"] for row in rows])
    assert metrics["vq_expected"].mean == pytest.approx(mean)
    assert metrics["vq"].by_threshold.keys() == {"3", "4", "5"}
    assert evaluation.comparison is not None and evaluation.comparison.unpaired == 1
    assert evaluation.comparison.metrics["sa_expected"].n == 3
    assert evaluation.comparison.metrics["vq"].p_holm is not None
    assert "vq " in table({"ours": evaluation})
    assert all(failing_checks(row) == [] for row in Scores.read(evaluation.folder).rows)


def test_the_published_instruction_comes_from_a_file(judge, in_form, tmp_path, capsys):
    """And without a list of captions, a clip is scored against its own prompt."""
    clips = clips_of(tmp_path / "clips", PROMPTS)
    text = tmp_path / "instruction.txt"
    text.write_text("Rate: {caption}")
    options = [f"judge={judge}", "precision=float32", f"instruction={text}"]
    evaluation = evaluate("videoscore2", clips, settings=options)
    assert "warning" not in capsys.readouterr().err
    assert evaluation.summary.asked["judge"]["instruction"].endswith("(given)")
    assert evaluation.summary.n == 2 and evaluation.summary.missing == []
    assert in_form[1] - in_form[0] == len(PROMPTS[1]) - len(PROMPTS[0])
    # The same again costs nothing; other words make other scores.
    evaluate("videoscore2", clips, settings=options)
    assert len(in_form) == 2
    text.write_text("Judge: {caption}")
    evaluate("videoscore2", clips, settings=options)
    assert len(in_form) == 4
    text.write_text("Rate it.")
    with pytest.raises(UserError, match=r"has no place for the caption; write \{caption\}"):
        evaluate("videoscore2", clips, settings=options)
    with pytest.raises(UserError, match=r"nowhere\.txt cannot be read"):
        evaluate("videoscore2", clips, settings=[*options, "instruction=nowhere.txt"])


def test_an_answer_without_scores_is_invalid_not_zero(judge, tmp_path, monkeypatch):
    monkeypatch.setattr(videoscore2, "ANSWER_LENGTH", 2)
    clips = clips_of(tmp_path / "clips", PROMPTS[:1])
    options = [f"judge={judge}", "precision=float32"]
    evaluation = evaluate("videoscore2", clips, settings=options)
    row = json.loads((evaluation.folder / "scores.jsonl").read_text())
    assert row["vq"] is row["sa_expected"] is row["pc_rating"] is row["joint"] is None
    assert row["invalid"].keys() == {"vq", "sa", "pc"} and row["answer"]
    assert "nothing as its visual quality" in row["invalid"]["vq"]
    for metric in evaluation.summary.metrics.values():
        assert (metric.n, metric.invalid) == (0, 1)


def test_clips_of_one_frame_and_prompts_of_no_list_are_refused(judge, captions, tmp_path):
    from videorepa.data.video import write_video

    bench = videoscore2.VideoScore2(captions=str(captions), judge=str(judge))
    assert bench.find("A red ball falls.").caption == "A ball falls."
    with pytest.raises(UserError, match="column detailed_caption or upsampled_caption"):
        bench.find("A cat.")
    write_video(tmp_path / "one.mp4", noise(1, 28, 28), 8)
    with pytest.raises(ClipError, match="has one frame"):
        bench.read(tmp_path / "one.mp4")


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (lambda folder: (folder / "config.json").write_text("["), "could not be loaded"),
        (lambda folder: [f.unlink() for f in folder.glob("*.safetensors")], "could not be loaded"),
        (
            lambda folder: (folder / "chat_template.json").write_text('{"template": ""}'),
            "could not be loaded: KeyError",
        ),
    ],
    ids=["config", "weights", "template"],
)
def test_a_folder_that_is_no_judge_is_refused(judge, tmp_path, fault, says):
    folder = shutil.copytree(judge, tmp_path / "judge")
    fault(folder)
    with pytest.raises(UserError, match=says):
        load_judge(folder)


def without_head(judge: Path, folder: Path) -> Path:
    """A copy of a judge that lacks weights."""
    shutil.copytree(judge, folder)
    shard = sorted(folder.glob("*.safetensors"))[0]
    weights = load_file(shard)
    del weights["lm_head.weight"]
    save_file(weights, shard, {"format": "pt"})
    return folder


def test_weights_that_are_missing_are_named(judge, tmp_path):
    folder = without_head(judge, tmp_path / "judge")
    with pytest.raises(UserError, match=r"does not fit the judge; missing: lm_head\.weight\. Copy"):
        load_judge(folder)


def test_a_judge_that_cannot_be_loaded_is_tried_once_and_costs_no_scores(
    judge, in_form, tmp_path, monkeypatch
):
    clips = clips_of(tmp_path / "clips", PROMPTS)
    evaluation = evaluate("videoscore2", clips, settings=[f"judge={judge}", "precision=float32"])
    before = (evaluation.folder / "scores.jsonl").read_bytes()
    folder = without_head(judge, tmp_path / "judge")
    load, tried = QwenJudge.load, []
    monkeypatch.setattr(QwenJudge, "load", lambda *given: tried.append(given) or load(*given))
    with pytest.raises(UserError, match=rf"^{folder} does not fit the judge; missing: lm_head"):
        evaluate("videoscore2", clips, settings=[f"judge={folder}", "precision=float32"])
    assert len(tried) == 1
    assert (evaluation.folder / "scores.jsonl").read_bytes() == before


def test_the_template_of_an_older_folder_stands_in_a_file_of_its_own(judge, tmp_path):
    folder = shutil.copytree(judge, tmp_path / "judge")
    before = videoscore2.VideoScore2(judge=str(folder)).about()
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": f"Hi! {CHAT}"}))
    old = load_judge(folder)
    text = old.decode(old.inputs(noise(), "Rate it.")["input_ids"][0].tolist())
    assert text.startswith("Hi! ")
    assert videoscore2.VideoScore2(judge=str(folder)).about() != before
