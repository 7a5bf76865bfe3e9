"""The judge of VideoPhy: the model against golden answers, what it is asked, how it is read."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentencepiece import SentencePieceTrainer
from torch import Tensor

from pages import Tags
from videorepa.artifacts.scores import Scores, failing_checks
from videorepa.benchmarks import videophy, videophy2
from videorepa.benchmarks.mplug_owl import VIDEO, MPlugOwlVideo
from videorepa.benchmarks.mplug_owl.judge import OwlJudge, digest, frame_indices, rate
from videorepa.cli import main
from videorepa.data.manifest import read_prompts
from videorepa.data.video import read_squashed, write_video
from videorepa.errors import UserError
from videorepa.evaluate import evaluate
from videorepa.evaluation.statistics import holm
from videorepa.evaluation.tables import table
from videorepa.exchange import model_card as card
from videorepa.settings import plugins

TINY = {
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 112,
        "image_size": 224,
    },
    "visual_abstractor_config": {
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    },
    "text_config": {
        "vocab_size": 400,
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    },
}


def random_weights(config: dict = TINY) -> dict[str, Tensor]:
    """Under the published names. Matrices keep what goes through them at its size."""
    torch.manual_seed(5)
    shapes = MPlugOwlVideo(config).published_shapes()
    return {
        name: torch.randn(shape) * (0.3 if len(shape) == 1 else shape[-1] ** -0.5)
        for name, shape in shapes.items()
    }


def golden_model(golden: Path) -> tuple[MPlugOwlVideo, dict[str, Tensor]]:
    config = json.loads((golden / "mplug_owl_video_tiny.config.json").read_text())
    weights = load_file(golden / "mplug_owl_video_tiny.safetensors")
    io = load_file(golden / "mplug_owl_video_tiny.io.safetensors")
    return MPlugOwlVideo.from_state_dict(config, weights), io


def error(value: Tensor, expected: Tensor) -> float:
    return ((value.float() - expected).norm() / expected.norm()).item()


def test_the_model_answers_as_the_published_one(golden):
    model, io = golden_model(golden)
    assert (
        error(model.vision_model(io["video_pixel_values"]), io["vision_last_hidden_state"]) < 1e-5
    )
    logits = model(io["video_pixel_values"], io["input_ids"])
    assert logits.shape == io["logits"].shape
    assert error(logits, io["logits"]) < 1e-5
    # What is read from a prompt does not depend on padding after it, nor on its neighbours.
    alone = model(io["video_pixel_values"][1:], io["input_ids"][1:, :30])
    torch.testing.assert_close(alone[0], io["logits"][1, :30], rtol=1e-4, atol=1e-5)


def test_it_computes_in_bfloat16_too(golden):
    config = json.loads((golden / "mplug_owl_video_tiny.config.json").read_text())
    weights = load_file(golden / "mplug_owl_video_tiny.safetensors")
    io = load_file(golden / "mplug_owl_video_tiny.io.safetensors")
    model = MPlugOwlVideo.from_state_dict(config, weights, dtype=torch.bfloat16)
    logits = model(io["video_pixel_values"], io["input_ids"])
    assert logits.dtype == torch.bfloat16
    assert 1e-4 < error(logits, io["logits"]) < 0.05


def test_the_full_size_has_the_published_weights_and_takes_no_memory():
    shapes = MPlugOwlVideo({}).published_shapes()
    of = {"vision_model": 0, "abstractor": 0, "language_model": 0}
    for name in shapes:
        if (part := name.split(".")[0]) in of:
            of[part] += 1
    assert of == {"vision_model": 487, "abstractor": 137, "language_model": 291}
    numbers = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    assert sum(numbers.values()) == 328_480_768 + 85_606_400 + 131_072 + 6_738_415_616
    layer = "vision_model.encoder.layers.23."
    assert shapes[layer + "self_attn.query_key_value.weight"] == (3072, 1024)
    assert shapes[layer + "temporal.down_proj.weight"] == (512, 1024, 1, 1, 1)
    assert shapes[layer + "temporal.conv.weight"] == (512, 1, 3, 1, 1)
    cross = "abstractor.encoder.layers.5.crossattention."
    assert shapes[cross + "output.mlp.w1.weight"] == (2816, 1024)
    assert shapes[cross + "attention.key.bias"] == shapes[cross + "normk.bias"] == (1024,)
    assert shapes["vision_model.embeddings.position_embedding"] == (1, 257, 1024)
    assert shapes["abstractor.vit_eos"] == (1, 1, 4096)


def test_weights_are_taken_not_copied():
    weights = random_weights()
    model = MPlugOwlVideo.from_state_dict(TINY, weights)
    for name in ("language_model.lm_head.weight", "abstractor.layers.0.w2.weight"):
        published = name.replace("layers.0.w2", "encoder.layers.0.crossattention.output.mlp.w2")
        assert model.get_parameter(name).data_ptr() == weights[published].data_ptr()
    assert not any(value.is_meta for value in (*model.parameters(), *model.buffers()))
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_what_old_files_hold_besides_is_ignored():
    weights = random_weights()
    weights["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
    MPlugOwlVideo.from_state_dict(TINY, weights)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (lambda w: w.pop("abstractor.vit_eos"), r"missing: abstractor\.vit_eos"),
        (lambda w: w.update({"head.weight": torch.ones(1)}), r"extra: head\.weight"),
        (
            lambda w: w.update({"query_tokens": torch.ones(1, 3, 16)}),
            r"misshapen: query_tokens \(1, 3, 16\), expected \(1, 64, 16\)",
        ),
        (
            # Reshaping would have hidden it.
            lambda w: w.update(
                {
                    (key := "vision_model.encoder.layers.1.temporal.conv.weight"): w[key].transpose(
                        1, 2
                    )
                }
            ),
            r"misshapen: vision_model\.encoder\.layers\.1\.temporal\.conv\.weight",
        ),
    ],
    ids=["missing", "extra", "misshapen", "turned"],
)
def test_weights_that_do_not_fit_are_refused_by_name(fault, says):
    weights = random_weights()
    fault(weights)
    with pytest.raises(UserError, match=says):
        MPlugOwlVideo.from_state_dict(TINY, weights)


def test_half_precision_is_refused_but_files_in_it_can_be_loaded():
    weights = {name: value.half() for name, value in random_weights().items()}
    with pytest.raises(UserError, match="bfloat16 or float32"):
        MPlugOwlVideo.from_state_dict(TINY, weights)
    model = MPlugOwlVideo.from_state_dict(TINY, weights, dtype=torch.float32)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_prompt_has_a_place_for_each_of_the_videos_tokens():
    model = MPlugOwlVideo.from_state_dict(TINY, random_weights())
    seen = model.see(torch.randn(1, 3, 4, 224, 224))
    assert seen.shape == (1, 65, 24)
    with pytest.raises(ValueError, match=r"\[64\] places.*expected 65"):
        model.embed(seen, torch.tensor([[1] + [VIDEO] * 64]))
    with pytest.raises(ValueError, match=r"2\+ frames"):
        model.see(torch.randn(1, 3, 1, 224, 224))


# The judge: what it is asked, and how its answer is read.


def make_judge(folder: Path, shards: int = 2) -> Path:
    """A random judge of a few thousand weights in the published folder's layout."""
    folder.mkdir()
    words = f"{videophy.PROMPT} {videophy2.PROMPT} Does this video follow the physical laws? match"
    text = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter([words, *["Yes", "No", "0", "1", "2", "3", "4", "5"] * 50]),
        model_writer=text,
        model_type="bpe",
        vocab_size=TINY["text_config"]["vocab_size"],
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(text.getvalue())
    (folder / "config.json").write_text(json.dumps(TINY))
    weights = random_weights()
    # So that clips and captions, not the last layer alone, decide what it answers.
    weights["language_model.lm_head.weight"] *= 4
    names = sorted(weights)
    for shard in range(shards):
        part = {name: weights[name] for name in names[shard::shards]}
        torch.save(part, folder / f"pytorch_model-{shard + 1:05d}-of-{shards:05d}.bin")
    return folder


def load_judge(folder: Path) -> OwlJudge:
    return OwlJudge.load(folder, torch.device("cpu"), torch.float32)


def test_frames_are_chosen_as_published():
    assert frame_indices(49)[:13] == [0, 2, 3, 4, 6, 8, 9, 10, 12, 14, 15, 16, 18]
    assert frame_indices(49)[-3:] == [44, 45, 46]
    assert frame_indices(81)[:6] == [1, 3, 6, 9, 11, 13] and frame_indices(81)[-2:] == [76, 79]
    assert len(frame_indices(9)) == 32 and set(frame_indices(9)) <= set(range(9))


def test_frames_are_scaled_as_the_published_reader_does(real_clips):
    """Against what decord 0.6.0 gave for three frames, every 16th pixel."""
    golden = np.load(Path(__file__).parent / "golden" / "decord-ts_repa_4.npz")
    frames = read_squashed(real_clips / "ts_repa_4.mp4", 224, 224)
    shown = frames[golden["frames"], ::16, ::16]
    # Bicubic scaling is 0.6 off on average, scaling after the way to RGB 1.3.
    assert np.abs(shown.astype(int) - golden["pixels"]).mean() < 0.05


def test_a_prompt_is_encoded_in_the_published_pieces(live):
    encode = live.tokenizer.encode
    head, _, tail = videophy.PROMPT.partition("<|video|>")
    ids = live.ids(videophy.PROMPT.format(question="Yes?"), videophy.SPLIT)
    assert ids == [
        live.tokenizer.bos_id(),
        *encode(head.removesuffix("\nHuman: ")),
        *encode("\nHuman: "),
        *[VIDEO] * 65,
        *encode("\nHuman: "),
        *encode("Yes?\n"),
        *encode("AI: "),
    ]
    head = videophy2.PROMPT.partition("<|video|>")[0]
    ids = live.ids(videophy2.PROMPT.format(question="Yes?"), videophy2.SPLIT)
    running = encode("\nHuman: Yes?\nAI: ")
    assert ids == [live.tokenizer.bos_id(), *encode(head), *[VIDEO] * 65, *running]


def test_answers_are_the_likeliest_tokens_one_after_the_other(live):
    rng = np.random.default_rng(0)
    seen = live.see(rng.integers(0, 256, (32, 224, 224, 3), np.uint8))
    ids = live.ids(videophy2.PROMPT.format(question="Yes?"), videophy2.SPLIT)
    tokens, logits = live.answer(seen, ids, 3)
    for number, token in enumerate(tokens):
        expected = live.next_logits(seen, ids + tokens[:number])
        torch.testing.assert_close(logits[number], expected, rtol=1e-4, atol=1e-4)
        assert token == expected.argmax().item()


NOTHING = torch.empty(0)


class Scripted(OwlJudge):
    """In a judge's place: it gives these logits, or these answers, and keeps what it was asked."""

    answers: list[Tensor | str]
    asked: list[str]

    def __init__(self, live: OwlJudge, *answers: Tensor | str) -> None:
        super().__init__(live.model, live.tokenizer, live.mean, live.std, live.side)
        self.__dict__ |= {"answers": list(answers), "asked": []}

    def see(self, frames: np.ndarray) -> Tensor:
        assert frames.shape[0] == 32
        return NOTHING

    def ids(self, prompt: str, split: str) -> list[int]:
        self.asked.append(prompt)
        return []

    def next_logits(self, seen: Tensor, ids: list[int]) -> Tensor:
        answer = self.answers.pop(0)
        assert isinstance(answer, Tensor)
        return answer

    def answer(self, seen: Tensor, ids: list[int], length: int) -> tuple[list[int], Tensor]:
        answer = self.answers.pop(0)
        assert isinstance(answer, str)
        empty = [self.token("▁")] if answer.startswith(" ") else []
        tokens = (empty + [self.token(letter) for letter in answer.strip()])[:length]
        logits = torch.nn.functional.one_hot(torch.tensor([*tokens, 2]), 400).float() * 3
        return tokens, logits


def yes_no(live: OwlJudge, yes: float, no: float) -> Tensor:
    logits = torch.linspace(-1, 1, 400)
    logits[live.token("▁Yes")], logits[live.token("▁No")] = yes, no
    return logits


def scripted(bench: Any, live: OwlJudge, *answers: Tensor | str) -> Scripted:
    bench.__dict__["live"] = judge = Scripted(live, *answers)
    return judge


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    path = tmp_path / "captions.csv"
    path.write_text(
        "caption,detailed_caption,upsampled_caption,states_of_matter,is_hard\n"
        "A ball falls.,A red ball falls from a high tower.,A ball.,solid_solid,True\n"
        "Milk is poured.,White milk is poured slowly.,Some milk.,fluid_fluid,False\n"
        "Tea meets milk.,Hot tea meets cold milk.,Some tea.,fluid_fluid,False\n"
    )
    return path


BLACK = np.zeros((32, 224, 224, 3), np.uint8)


def test_videophy_reads_the_share_of_yes(live, captions):
    bench = videophy.VideoPhy(captions=str(captions))
    script = scripted(bench, live, yes_no(live, 2.0, 0.5), yes_no(live, -0.3, 0.4))
    # It was generated from the lengthened caption, and is scored against the caption.
    row = bench.score(BLACK, "A red ball falls from a high tower.")
    assert row["sa_score"] == pytest.approx(1 / (1 + np.exp(-1.5)))
    assert row["pc_score"] == pytest.approx(1 / (1 + np.exp(0.7)))
    assert (row["sa"], row["pc"], row["joint"], row["invalid"]) == (True, False, False, {})
    assert row["pc_logits"] == pytest.approx({"yes": -0.3, "no": 0.4})
    header = videophy.PROMPT.partition("{question}")[0]
    assert script.asked[0] == (
        header + 'Does this video entail the description: "A ball falls"?\nAI: '
    )
    assert script.asked[1] == header + "Does this video follow the physical laws?\nAI: "
    assert bench.scenario("A ball falls.") == "solid_solid"
    whole = videophy.VideoPhy(captions=str(captions), caption="whole")
    script = scripted(whole, live, yes_no(live, 2.0, 0.5), yes_no(live, -0.3, 0.4))
    whole.score(BLACK, "A ball falls.")
    assert '"A ball falls."?' in script.asked[0]


def test_a_tie_in_bfloat16_counts_as_yes_and_only_there(live, captions):
    close = yes_no(live, 0.500, 0.501)
    plain = videophy.VideoPhy(captions=str(captions))
    scripted(plain, live, close, close)
    assert plain.score(BLACK, "A ball falls.")["sa"] is False
    rounded = videophy.VideoPhy(captions=str(captions), compat_bf16=True)
    scripted(rounded, live, close, close)
    row = rounded.score(BLACK, "A ball falls.")
    assert row["sa"] is True and row["sa_score"] == 0.5
    assert plain.readout() != rounded.readout()


def test_logits_that_are_not_finite_make_a_row_invalid_not_zero(live, captions):
    bench = videophy.VideoPhy(captions=str(captions))
    scripted(bench, live, yes_no(live, float("nan"), 0.0), yes_no(live, 1.0, 0.0))
    row = bench.score(BLACK, "A ball falls.")
    assert row["sa"] is row["sa_score"] is row["joint"] is None and row["pc"] is True
    assert list(row["invalid"]) == ["sa"]
    row |= {"prompt_id": "0", "k": 0}
    metrics = bench.aggregate([row])
    assert (metrics["sa"]["n"], metrics["sa"]["invalid"], metrics["pc"]["n"]) == (0, 1, 1)


@pytest.mark.parametrize(
    ("answer", "digits", "value", "published"),
    [
        (" 4", "12345", 4, 4),
        ("4", "12345", 4, 4),
        (" 0", "12345", None, 0),
        (" 0", "012", 0, 0),
        (" 3", "012", None, 3),
        ("100000", "12345", None, 0),
        ("1.1.1.", "12345", None, 1),
        ("No", "12345", None, 0),
    ],
)
def test_a_rating_is_exactly_one_legal_digit(live, answer, digits, value, published):
    rating = rate(Scripted(live, answer), NOTHING, [], digits)
    assert rating.value == value
    assert rate(Scripted(live, answer), NOTHING, [], digits, compat=True).value == published
    assert rating.probabilities.keys() == set(digits)
    assert sum(rating.probabilities.values()) == pytest.approx(1)


def test_a_rating_knows_how_sure_the_judge_was(live):
    rating = rate(Scripted(live, " 4"), NOTHING, [], "12345")
    sure = np.exp(3) / (np.exp(3) + 4)
    # The digit is the second token; what stands in the first place says nothing of it.
    assert rating.probabilities["4"] == pytest.approx(sure)
    assert rating.expected == pytest.approx(4 * sure + (1 + 2 + 3 + 5) * (1 - sure) / 4)


def test_videophy2_takes_four_and_five(live, captions):
    bench = videophy2.VideoPhy2(captions=str(captions))
    script = scripted(bench, live, " 5", " 3", " 4", "No", " 2")
    row = bench.score(BLACK, "A ball.")
    assert (row["sa"], row["pc"], row["joint"]) == (True, False, False)
    assert (row["sa_rating"], row["pc_rating"]) == (5, 3)
    assert 'match the description: "A ball falls."? Please rate' in script.asked[0]
    assert "between a curious human and an AI assistant" in script.asked[0]
    other = bench.score(BLACK, "Milk is poured.")
    assert other["sa"] is True and other["pc"] is other["joint"] is None
    assert "No" in other["invalid"]["pc"]
    assert bench.scenario("A ball falls.") == "hard" and bench.scenario("Milk is poured.") is None
    rule = bench.follows(BLACK, "Balls fall.")
    assert rule.value == 2 and rule.probabilities.keys() == {"0", "1", "2"}
    assert script.asked[-1].endswith("or 2 if indeterminate. \nAI: ")
    rows = [r | {"prompt_id": str(n), "k": 0} for n, r in enumerate((row, other))]
    metrics = bench.aggregate(rows)
    assert metrics["sa"]["percent"] == 100 and metrics["sa"]["by_threshold"] == {
        "3": 100,
        "4": 100,
        "5": 50,
    }
    assert metrics["pc"]["n"] == 1 and metrics["joint"]["invalid"] == 1
    assert metrics["sa_rating"]["mean"] == 4.5


def test_the_published_lists_are_read_whole(published_prompts):
    first = videophy.VideoPhy(captions=str(published_prompts / "videophy.csv"))
    prompts = first.prompts(1000, 0)
    assert len(prompts) == 344 == len({prompt.id for prompt in prompts})
    states = Counter(first.scenario(prompt.caption) for prompt in prompts)
    assert states == {"solid_solid": 143, "solid_fluid": 146, "fluid_fluid": 55}
    rows = read_prompts(published_prompts / "videophy.csv", "detailed_caption")
    assert first.missing([row.text for row in rows[:340]]) == prompts[340:]
    second = videophy2.VideoPhy2(captions=str(published_prompts / "videophy2.csv"))
    assert len(second.prompts(1000, 0)) == 590
    # That list does not say which are hard.
    assert {second.scenario(prompt.caption) for prompt in second.prompts(1000, 0)} == {None}


def test_captions_of_several_rows_count_once_and_others_are_refused(tmp_path):
    folder = tmp_path / "list"
    folder.mkdir()
    rows = "caption,states_of_matter\nA ball falls.,solid_solid\nTea.,fluid_fluid\n"
    (folder / "test.csv").write_text(rows + rows.partition("\n")[2])
    bench = videophy.VideoPhy(captions=str(folder))
    assert [prompt.caption for prompt in bench.prompts(9, 0)] == ["A ball falls.", "Tea."]
    with pytest.raises(UserError, match="'A cat.' is no caption of"):
        bench.find("A cat.")
    # A row says what the judge was asked about, and is no longer of use where the list says else.
    assert bench.about_prompt("Tea.") == {"caption": "Tea.", "asked": "Tea."}
    (folder / "more.csv").write_text(rows)
    with pytest.raises(UserError, match=r"found more\.csv, test\.csv"):
        videophy.VideoPhy(captions=str(folder)).prompts(1, 0)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (lambda folder: (folder / "tokenizer.model").unlink(), r"tokenizer\.model"),
        (lambda folder: (folder / "config.json").write_text("["), r"config\.json.*as a model"),
        (
            lambda folder: torch.save({}, folder / "model.safetensors"),
            r"model\.safetensors cannot be read as plain weights",
        ),
        (
            lambda folder: torch.save(
                {"query_tokens": torch.ones(1)}, folder / "pytorch_model.bin"
            ),
            "several copies of the model",
        ),
        (
            lambda folder: torch.save(Path("code"), folder / "pytorch_model-00002-of-00002.bin"),
            "a pickle that would run code",
        ),
        (
            lambda folder: [path.unlink() for path in folder.glob("*.bin")],
            "holds no weights",
        ),
    ],
    ids=["tokenizer", "config", "safetensors", "twice", "pickle", "none"],
)
def test_a_folder_that_is_no_judge_is_refused(judge, tmp_path, fault, says):
    folder = shutil.copytree(judge, tmp_path / "judge")
    fault(folder)
    with pytest.raises(UserError, match=says):
        load_judge(folder)


def test_a_judges_digest_is_of_what_decides_its_answers(judge, tmp_path):
    folder = shutil.copytree(judge, tmp_path / "judge")
    (folder / "README.md").write_text("Other words.")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "downloaded.metadata").write_text("today")
    assert digest(folder) == digest(judge)
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5]}')
    other = digest(folder)
    assert other != digest(judge)
    path = folder / "pytorch_model-00001-of-00002.bin"
    torch.save({k: v + 1 for k, v in torch.load(path).items()}, path)
    assert digest(folder) not in (other, digest(judge))
    live = load_judge(folder)
    assert live.mean == (0.5, 0.5, 0.5)


# Folders of clips.


def clips_of(folder: Path, prompts: list[str], samples: int = 1, salt: int = 0) -> Path:
    """Clips as `generate` leaves them, of moving noise."""
    folder.mkdir()
    for number, prompt in enumerate(prompts):
        for k in range(samples):
            rng = np.random.default_rng([salt, number, k])
            still = rng.integers(0, 256, (1, 4, 6, 3), np.uint8).repeat(8, 1).repeat(8, 2)
            clip = np.concatenate([np.roll(still, step * (k + 1), 2) for step in range(9)])
            path = folder / f"{number:04d}-{k}.json"
            write_video(path.with_suffix(".mp4"), clip, 8)
            about = {"prompt_id": f"{number:04d}", "prompt": prompt, "k": k}
            path.write_text(json.dumps(about | {"model_digest": folder.name}))
    return folder


DETAILED = ["A red ball falls from a high tower.", "White milk is poured slowly."]


def settings(judge: Path, captions: Path) -> list[str]:
    return [f"judge={judge}", f"captions={captions}", "precision=float32"]


def test_two_folders_are_judged_and_compared(judge, captions, tmp_path):
    ours = clips_of(tmp_path / "ours", DETAILED, samples=2)
    theirs = clips_of(tmp_path / "theirs", DETAILED, samples=2, salt=1)
    (ours / "0001-1.mp4").write_bytes(b"no video")
    options = settings(judge, captions)
    evaluation = evaluate("videophy", ours, against=theirs, settings=options)
    assert evaluation.summary.n == 3 and len(evaluation.summary.failures) == 1
    # The third caption has no clip, for either sample.
    assert [(m["prompt_id"], m["k"]) for m in evaluation.summary.missing] == [
        ("0002", 0),
        ("0002", 1),
    ]
    assert evaluation.summary.by_scenario.keys() == {"solid_solid", "fluid_fluid"}
    assert evaluation.comparison is not None and evaluation.comparison.unpaired == 1
    both = [evaluation.comparison.metrics, *evaluation.comparison.by_scenario.values()]
    claims = [metrics[flag] for metrics in both for flag in ("sa", "pc", "joint")]
    assert [c.p_holm for c in claims] == pytest.approx(holm([c.p for c in claims]))
    assert evaluation.comparison.metrics["sa_score"].p is None
    rows = [json.loads(line) for line in (ours / "scores" / "scores.jsonl").open()]
    assert len(rows) == 3 and {row["scenario"] for row in rows} == {"solid_solid", "fluid_fluid"}
    for row in rows:
        assert 0 < row["sa_score"] < 1 and row["sa_score"] != row["pc_score"]
        assert row["judge"]["dtype"] == "float32" and len(row["judge"]["weights"]) == 16
        assert row["judge"]["frames"].startswith("32 of n")
        assert row["judge"]["caption"] == "cut"
    # Other pixels, other scores: the clip is looked at.
    assert len({row["pc_score"] for row in rows}) == 3
    text = table({"ours": evaluation}, by_scenario=True)
    assert "of 2 different prompts, 1 clip could not be scored, 2 clips missing" in text
    assert "fluid_fluid" in text and "against theirs" in text
    read = Scores.read(evaluation.folder)
    assert len(read.summary.missing) == 2
    page = card._scores(read)
    assert f"| sa_score | {evaluation.summary.metrics['sa_score'].mean:.4g} | [" in page
    assert read.summary.metrics.keys() == {"sa", "pc", "joint", "sa_score", "pc_score"}
    assert failing_checks(read.by_clip["0000", 0]) == []


def test_shards_are_put_together_and_nothing_is_scored_twice(
    judge, captions, tmp_path, monkeypatch
):
    folder = clips_of(tmp_path / "clips", ["A ball falls.", "Milk is poured.", "Tea meets milk."])
    options = settings(judge, captions)
    alone = evaluate("videophy2", folder, tmp_path / "alone", settings=options)
    parts = [
        evaluate("videophy2", folder, settings=options, shard=(index, 2)).summary.n
        for index in range(2)
    ]
    # More shards than clips: the last have nothing to do.
    idle = evaluate("videophy2", folder, settings=options, shard=(3, 4))
    assert idle.summary.n == 0 and not idle.summary.metrics
    assert "n=0" in table({"idle": idle})
    assert parts == [2, 1] and not (folder / "scores" / "summary.json").exists()

    def never(*_: object) -> None:
        raise AssertionError("a clip was scored again")

    monkeypatch.setattr(videophy2.VideoPhy2, "score", never)
    whole = evaluate("videophy2", folder, settings=options)
    assert whole.summary == alone.summary
    rows = (folder / "scores" / "scores.jsonl").read_text()
    assert rows == (alone.folder / "scores.jsonl").read_text()
    # Read another way, the same answers are other scores.
    with pytest.raises(AssertionError, match="scored again"):
        evaluate("videophy2", folder, settings=[*options, "compat_parser=true"])


def test_settings_are_checked(judge, captions, tmp_path):
    folder = clips_of(tmp_path / "clips", DETAILED[:1])
    with pytest.raises(UserError, match=r"captions: missing"):
        evaluate("videophy", folder, settings=[f"judge={judge}"])
    with pytest.raises(UserError, match=r"compat_bf61: unknown key; did you mean compat_bf16"):
        evaluate("videophy", folder, settings=[*settings(judge, captions), "compat_bf61=true"])
    with pytest.raises(UserError, match=r"the benchmark lab:\n  judge: unknown key"):
        evaluate("lab", folder, settings=["judge=x"])
    with pytest.raises(UserError, match="shard 2/2 does not exist"):
        evaluate("videophy", folder, settings=settings(judge, captions), shard=(2, 2))


def test_what_plugins_share_is_no_plugin():
    assert set(plugins.names("benchmarks")) >= {"lab", "videophy", "videophy2"}
    assert not {"mplug_owl", "_listed"} & set(plugins.names("benchmarks"))


def test_real_clips_of_a_list_are_judged(judge, real_clips, tmp_path):
    """The authors' own twelve clips of three models, listed in files, with a random judge."""
    with (real_clips / "clips.csv").open(newline="") as file:
        listed = list(csv.DictReader(file))
    for model in ("cogvideox", "repa", "videorepa"):
        lines = ["id,video,caption"]
        for row in listed:
            if f"_{model}_" in row["video"]:
                shutil.copy(real_clips / row["video"], tmp_path)
                prompt = row["video"].rpartition("_")[2].removesuffix(".mp4")
                lines.append(f'{prompt},{row["video"]},"{row["caption"]}"')
        (tmp_path / f"{model}.csv").write_text("\n".join(lines))
    options = settings(judge, real_clips / "clips.csv")
    ours, theirs = tmp_path / "videorepa.csv", tmp_path / "cogvideox.csv"
    evaluation = evaluate("videophy", ours, against=theirs, settings=options)
    assert evaluation.summary.n == 4 and evaluation.summary.missing == []
    assert evaluate("videophy", tmp_path / "repa.csv", settings=options).summary.n == 4
    assert evaluation.comparison is not None and evaluation.comparison.metrics["pc"].n == 4
    rows = [json.loads(line) for line in (evaluation.folder / "scores.jsonl").open()]
    assert len({row["pc_score"] for row in rows}) == 4


@pytest.mark.slow
def test_real_clips_go_from_a_list_to_the_page(judge, real_clips, tmp_path, monkeypatch):
    """The twelve clips and a coarse copy of each as a second model: scored, compared and shown."""
    # So that the random judge lets some pass.
    monkeypatch.setattr(videophy.VideoPhy, "threshold", 0.2384)
    with (real_clips / "clips.csv").open(newline="") as file:
        listed = list(csv.DictReader(file))
    states = dict.fromkeys((row["caption"] for row in listed), "solid_solid")
    states["Maple syrup drizzling from a bottle onto pancakes."] = "solid_fluid"
    captions = tmp_path / "captions.csv"
    lines = [f'"{caption}",{state}' for caption, state in states.items()]
    captions.write_text("\n".join(["caption,states_of_matter", *lines]))
    for model in ("original", "coarse"):
        (tmp_path / model).mkdir()
        lines = ["id,video,caption"]
        for row in listed:
            name = row["video"]
            lines.append(f'{Path(name).stem},{model}/{name},"{row["caption"]}"')
            if model == "original":
                shutil.copy(real_clips / name, tmp_path / model)
            else:
                write_video(tmp_path / model / name, read_squashed(real_clips / name, 40, 60), 8)
        (tmp_path / f"{model}.csv").write_text("\n".join(lines))
    original, coarse = tmp_path / "original.csv", tmp_path / "coarse.csv"
    options = [part for setting in settings(judge, captions) for part in ("--set", setting)]
    assert main(["evaluate", "videophy", str(original), "--against", str(coarse), *options]) == 0
    assert main(["evaluate", "videophy", str(coarse), *options]) == 0
    path = tmp_path / "page.html"
    assert main(["report", "--clips", str(coarse), str(original), "--out", str(path)]) == 0

    html = path.read_text()
    assert len(Tags(html).clips()) == 24
    rows = re.findall(r'<article class="row.*?</article>', html, re.S)
    assert len(rows) == 12
    table_ = html.partition('<table class="scores">')[2].partition("</table>")[0]
    for model, cells in zip(("coarse", "original"), (0, 1), strict=True):
        scores = tmp_path / f"{model}.scores"
        of = [json.loads(line) for line in (scores / "scores.jsonl").open()]
        assert [row["prompt_id"] for row in of] == [Path(row["video"]).stem for row in listed]
        for article, row in zip(rows, sorted(of, key=lambda row: row["prompt_id"]), strict=True):
            assert f'data-prompt="{row["prompt_id"]}"' in article
            figure = re.findall(r"<figure.*?</figure>", article, re.S)[cells]
            assert f"{model}</span></span></span>" in figure
            badges = re.findall(r'<span class="badge \w+">(.*?)</span>', figure)
            words = {True: "pass", False: "fail"}
            assert badges == [
                f"SA {words[row['sa']]} ({row['sa_score']:.3g})",
                f"PC {words[row['pc']]} ({row['pc_score']:.3g})",
                f"joint {words[row['joint']]}",
            ]
        assert {row["sa"] for row in of} == {row["joint"] for row in of} == {True, False}
        summary = json.loads((scores / "summary.json").read_text())
        shown = table_.split("<tr>")[2 + cells]
        for metric in ("sa", "pc", "joint"):
            value = summary["metrics"][metric]
            assert value["n"] == 12 and value["percent"] == 100 * sum(r[metric] for r in of) / 12
            assert f"<strong>{value['percent']:.1f} %</strong>" in shown
            assert f"{value['low']:.1f} to {value['high']:.1f}" in shown
    compared = json.loads((tmp_path / "original.scores" / "comparison.json").read_text())
    assert compared["against"] == "coarse" and compared["unpaired"] == 0
    overall = html.partition("Paired differences</h3>")[2].partition("</table>")[0]
    for claim in compared["metrics"].values():
        digits = 1 if "p" in claim else 3
        difference = f"<strong>{claim['difference']:+.{digits}f}</strong>".replace("-", "−")
        assert difference in overall and f"<td>{claim['n']}</td>" in overall
    # The twelve clips show four captions, one of them a fluid: too few of either to compare.
    assert compared["by_scenario"].keys() == {"solid_solid", "solid_fluid"}
    assert "fewer than 6 prompts: solid_fluid (1), solid_solid (3)" in html
