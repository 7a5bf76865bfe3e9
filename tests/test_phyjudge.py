"""PhyJudge: what the stock model is given of a clip, how its answers are read, the whole way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import (
    AddedToken,
    Qwen2Tokenizer,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLProcessor,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from test_judge import clips_of
from test_videoscore2 import MARKS
from videorepa.artifacts.scores import Scores, failing_checks
from videorepa.benchmarks import phyjudge
from videorepa.benchmarks.phyjudge import (
    GENERAL,
    LAWS,
    PhyJudge,
    PhyJudgeModel,
    SeenClip,
    sample,
    score_of,
)
from videorepa.data.video import write_video
from videorepa.errors import ClipError, UserError
from videorepa.evaluate import evaluate
from videorepa.evaluation.agreement import agreement
from videorepa.evaluation.tables import table

# Words of the questions, so that these are short: other text has a token for each byte.
WORDS = [phyjudge.SYSTEM, "Rate one thing about the video: ", '{"', '": ', "}"]
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'video' %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
LIMITS = (4096, 25_165_824)


def make_judge(folder: Path) -> Path:
    """A random judge of a few thousand weights, linear attention included, as it is published."""
    vocabulary = {letter: n for n, letter in enumerate(bytes_to_unicode().values())}
    tokenizer: Any = Qwen2Tokenizer(vocab=vocabulary, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in WORDS])
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    ids = {mark: tokenizer.convert_tokens_to_ids(mark) for mark in MARKS}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    config = Qwen3_5Config(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "eos_token_id": ids["<|im_end|>"],
            "rope_parameters": rope | {"partial_rotary_factor": 1.0, "mrope_interleaved": True},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
        },
        video_token_id=ids["<|video_pad|>"],
        image_token_id=ids["<|image_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    torch.manual_seed(3)
    model: Any = Qwen3_5ForConditionalGeneration(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=1.5 * parameter[0].numel() ** -0.5)
    ends = {"eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"]}
    model.generation_config.update(**ends)
    model.save_pretrained(folder, max_shard_size="100KB")
    size = {"shortest_edge": LIMITS[0], "longest_edge": LIMITS[1]}
    (folder / "video_preprocessor_config.json").write_text(json.dumps({"size": size}))
    return folder


ADAPTED = ("language_model.layers.0.linear_attn.in_proj_qkv", "visual.merger.linear_fc1")


def make_adapter(folder: Path, judge: Path, names: tuple[str, ...] = ADAPTED) -> Path:
    """A LoRA of a linear-attention projection and of the vision merger, as the published one."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8}))
    stored: dict[str, torch.Tensor] = {}
    for shard in judge.glob("*.safetensors"):
        stored |= load_file(shard)
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name in names:
        rows, columns = stored[f"model.{name}.weight"].shape
        prefix = f"base_model.model.model.{name}"
        weights[f"{prefix}.lora_A.weight"] = torch.randn(4, columns, generator=generator)
        weights[f"{prefix}.lora_B.weight"] = torch.randn(rows, 4, generator=generator)
    save_file(weights, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def judge(tmp_path_factory) -> Path:
    return make_judge(tmp_path_factory.mktemp("phyjudge"))


@pytest.fixture(scope="module")
def live(judge) -> PhyJudgeModel:
    return load(judge)


def load(folder: Path) -> PhyJudgeModel:
    pictures = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return PhyJudgeModel.load(folder, torch.device("cpu"), torch.float32, pictures)


def noise(frames: int = 4, height: int = 64, width: int = 96) -> SeenClip:
    rng = np.random.default_rng(frames)
    pictures = rng.integers(0, 256, (frames, height, width, 3), np.uint8)
    return SeenClip(pictures, [0.25 + n for n in range(frames // 2)])


# What the model is given.


@pytest.mark.parametrize(("count", "fps"), [(49, 8.0), (81, 16.0), (17, 30.0), (41, 15.0), (3, 8)])
def test_frames_and_times_are_those_of_the_stock_processor(count, fps):
    """The stock classes choose frames without torchvision, but cannot be made without it."""
    frames = np.arange(count, dtype=np.uint8)[:, None, None, None].repeat(3, 3)
    clip = sample(frames, fps)
    chosen = min(max(int(count / fps * 2), 4), 768, count)
    expected = np.linspace(0, count - 1, chosen).round().astype(int).tolist()
    times = Qwen3VLProcessor._calculate_timestamps(None, expected, fps, 2)  # Fills up odd ones.
    assert clip.frames[:, 0, 0, 0].tolist() == expected
    assert clip.seconds == pytest.approx(times)


def test_the_model_is_given_each_pair_of_frames_behind_its_time(live):
    clip = noise()
    inputs = live.inputs(clip, LIMITS, "Rate it.")
    metadata = SimpleNamespace(fps=4.0, frames_indices=[0, 2, 4, 6])  # In the middle 1/4 and 5/4.
    stock = Qwen3VLProcessor.replace_video_token(
        SimpleNamespace(
            video_processor=SimpleNamespace(merge_size=2, temporal_patch_size=2),
            vision_start_token="<|vision_start|>",
            vision_end_token="<|vision_end|>",
            video_token="<|video_pad|>",
            _calculate_timestamps=lambda *of: Qwen3VLProcessor._calculate_timestamps(None, *of),
        ),
        {"video_grid_thw": inputs["video_grid_thw"], "video_metadata": [metadata]},
        0,
    )
    assert live.tokenizer.decode(inputs["input_ids"][0]) == (
        f"<|im_start|>system\n{phyjudge.SYSTEM}<|im_end|>\n<|im_start|>user\n"
        f"{stock}Rate it.<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    assert inputs["video_grid_thw"].tolist() == [[2, 4, 6]]
    assert inputs["mm_token_type_ids"].sum() == 2 * 2 * 6
    seen = live.model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"])
    assert sum(map(len, seen.pooler_output)) == 12
    # Colours from -1 to 1, row by row within a token.
    first = inputs["pixel_values_videos"][0].view(3, 2, 16, 16)
    expected = torch.tensor(clip.frames[:2, :16, :16]).permute(3, 0, 1, 2) / 127.5 - 1
    torch.testing.assert_close(first, expected, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="make 1 places for the video and 2 of its marks"):
        live.inputs(clip, LIMITS, "Rate <|video_pad|>.")


def test_a_clip_with_too_many_pixels_is_scaled(live):
    inputs = live.inputs(noise(), (4096, 4 * 32 * 64), "Rate it.")
    assert inputs["video_grid_thw"].tolist() == [[2, 2, 2]]
    inputs = live.inputs(noise(), (4 * 128 * 128, 10**8), "Rate it.")
    assert inputs["video_grid_thw"].tolist() == [[2, 8, 10]]


def test_answers_are_the_likeliest_tokens_one_after_the_other(live):
    clip = noise()
    inputs = live.inputs(clip, LIMITS, "Rate it.")
    tokens, logits = live.generate(inputs, 3)
    assert len(tokens) == len(logits) == 3
    answer = torch.tensor([tokens])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], answer], 1)
    inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], 0 * answer.int()], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.no_grad():
        whole = live.model(**inputs).logits[0, -4:-1]
    assert whole.argmax(-1).tolist() == tokens
    torch.testing.assert_close(logits, whole[:, live.digits], rtol=1e-3, atol=1e-3)
    backwards = live.inputs(clip._replace(frames=clip.frames[::-1].copy()), LIMITS, "Rate it.")
    assert not torch.allclose(live.generate(backwards, 1)[1][0], logits[0], atol=1e-3)
    later = live.inputs(clip._replace(seconds=[3.0, 4.0]), LIMITS, "Rate it.")
    assert not torch.allclose(live.generate(later, 1)[1][0], logits[0], atol=1e-3)


# How its answer is read.


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ('{"SA": 3}', "3"),
        ('```json\n{ "SA" :4 }\n```', "4"),
        ('First {"SA": 2}, no: {"SA": 5, "why": "fine"}', "5"),
        ('{"SA": 45}', "45"),
        ('{"SA": 4.5}', "4.5"),
        ('{"SA": -1}', "-1"),
        ('{"PTV": 3}', None),
        ('{"SA": "3"}', None),
        ('{"SA": 3', None),
        ("3", None),
    ],
)
def test_the_number_of_the_asked_key_counts(answer, number):
    found = score_of(answer, "SA")
    assert (found and found[0]) == number
    assert found is None or answer[found[1] :].startswith(str(number))


# The LoRA.


def test_a_lora_is_merged_as_published(judge, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", judge)
    before, model = load(judge), load(judge)
    model.merge(adapter)
    weights = load_file(adapter / "adapter_model.safetensors")
    old, new = (dict(one.model.named_parameters()) for one in (before, model))
    for name, value in new.items():
        part = name.removeprefix("model.").removesuffix(".weight")
        expected = old[name].detach()
        if part in ADAPTED:
            a, b = (weights[f"base_model.model.model.{part}.lora_{x}.weight"] for x in "AB")
            expected = expected + 8 / 4 * b @ a
        torch.testing.assert_close(value.detach(), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("config", "change", "says"),
    [
        ({"r": 4}, {}, "r 4, lora_alpha None; expected a plain LoRA"),
        ({"r": 4, "lora_alpha": 8, "use_dora": True}, {}, "and use_dora; expected a plain LoRA"),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"proj": 32}}, {}, "and alpha_pattern; expec"),
        ({"r": 8, "lora_alpha": 8}, {}, r"its weight is \(.*\) and r is 8\."),
        ({"r": 4, "lora_alpha": 8}, {"x.lora_A.weight": (4, 32)}, r"x\.lora_B\.weight"),
        ({"r": 4, "lora_alpha": 8}, {"x.magnitude": (4,)}, r"does not fit the judge: x\.magnitude"),
        (
            {"r": 4, "lora_alpha": 8},
            {"lm_head.lora_A.weight": (4, 9), "lm_head.lora_B.weight": (9, 4)},
            "It is of another model",
        ),
    ],
)
def test_another_adapter_is_refused(judge, live, tmp_path, config, change, says):
    adapter = make_adapter(tmp_path / "adapter", judge, ADAPTED[:1])
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    path = adapter / "adapter_model.safetensors"
    weights = load_file(path) if "another" not in says else {}
    save_file(weights | {name: torch.zeros(shape) for name, shape in change.items()}, path)
    with pytest.raises(UserError, match=says):
        load(judge).merge(adapter)


# Folders of clips.

PROMPTS = ["A ball falls.", "Milk is poured."]


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    path = tmp_path / "phyground.json"
    entries = [
        {"id": 1, "prompt": "A ball falls.", "physical_laws": ["gravity"], "id_stem": "ball_1"},
        {"id": 2, "prompt": "Milk is poured.", "physical_laws": ["flow_dynamics", "gravity"]},
        {"id": 3, "prompt": "Tea.", "physical_laws": ["buoyancy"]},
    ]
    path.write_text(json.dumps(entries))
    return path


@pytest.fixture
def in_form(monkeypatch):
    """Whatever it would say, the judge answers in the form; which digit is up to it."""
    generate = PhyJudgeModel.generate
    asked: list[str] = []

    def constrained(self: PhyJudgeModel, inputs: dict[str, Any], length: int) -> Any:
        question = self.decode(inputs["input_ids"][0].tolist())
        key = question.rpartition('{"')[2].partition('": ')[0]
        asked.append(key)
        before = self.tokenizer.encode(f'{{"{key}": ')
        _, logits = generate(self, inputs, 1)
        digit = self.digits[int(logits[0].argmax())]
        tokens = [*before, digit, *self.tokenizer.encode("}")]
        return tokens, logits.repeat(len(tokens), 1)

    monkeypatch.setattr(PhyJudgeModel, "generate", constrained)
    return asked


def options_of(judge: Path, *more: str) -> list[str]:
    return [f"judge={judge}", "adapter=", "precision=float32", *more]


def test_two_folders_are_judged_and_compared(judge, captions, in_form, tmp_path, capsys):
    ours = clips_of(tmp_path / "ours", PROMPTS, samples=2)
    theirs = clips_of(tmp_path / "theirs", PROMPTS, samples=2, salt=1)
    (ours / "0001-1.mp4").write_bytes(b"no video")
    options = options_of(judge, f"captions={captions}")
    evaluation = evaluate("phyjudge", ours, against=theirs, settings=options)
    printed = " ".join(capsys.readouterr().err.split())
    assert printed.count("do not compare with published ones") == 1
    assert evaluation.summary.n == 3 and len(evaluation.summary.failures) == 1
    assert [m["prompt"] for m in evaluation.summary.missing] == ["Tea.", "Tea."]
    # One call for each general score and each law of the prompt.
    assert in_form[:4] == ["SA", "PTV", "persistence", "gravity"]
    assert len(in_form) == (4 + 4 + 5) + (4 + 4 + 5 + 5)
    rows = Scores.read(evaluation.folder).rows
    for row in rows:
        laws = row["laws"]
        assert laws == (["gravity"] if row["asked"] == PROMPTS[0] else ["flow_dynamics", "gravity"])
        assert set(row["answers"]) == {*GENERAL, *laws} and row["invalid"] == {}
        assert row["coverage"] == 1 and "buoyancy_rating" not in row
        assert row["pc_rating"] == np.mean([row[f"{law}_rating"] for law in laws])
        for name in ("sa", "ptv", "persistence", *laws):
            assert 1 <= row[f"{name}_rating"] <= 5 and 1 <= row[f"{name}_expected"] <= 5
            assert sum(row[f"{name}_probabilities"].values()) == pytest.approx(1)
        assert row["judge"]["frames"] == "2 a second, 4 to 768" and "adapter" not in row["judge"]
    metrics = evaluation.summary.metrics
    assert metrics["sa_rating"].mean == pytest.approx(np.mean([r["sa_rating"] for r in rows]))
    assert (metrics["gravity_rating"].n, metrics["flow_dynamics_expected"].n) == (3, 1)
    assert evaluation.comparison is not None and evaluation.comparison.unpaired == 1
    change = evaluation.comparison.metrics["pc_expected"]
    assert change.n == 3 and change.p_holm is not None
    assert evaluation.comparison.metrics["flow_dynamics_expected"].n == 1
    assert "persistence_expected" in table({"ours": evaluation})
    assert all(failing_checks(row) == [] for row in rows)
    # And people can be asked about the same laws.
    ratings = tmp_path / "ratings.csv"
    lines = [f"{r['prompt_id']},{r['k']},gravity,{n}\n" for n, r in enumerate(rows)]
    ratings.write_text("id,k,dimension,rating\n" + "".join(lines))
    found = agreement(ours, [ratings])
    assert found.rows[0]["column"] == "gravity_expected"
    assert found.summary.metrics["gravity spearman"].n == 3


def test_the_published_instruction_comes_from_a_file(judge, captions, in_form, tmp_path, capsys):
    clips = clips_of(tmp_path / "clips", PROMPTS[:1])
    path = tmp_path / "instruction.yaml"
    texts = {key: f'Rate {key} of {{caption}} {{"{key}": 3}}' for key in (*GENERAL, *LAWS, "new")}
    path.write_text(yaml.safe_dump(texts))
    options = options_of(judge, f"instruction={path}", "laws=[new,gravity]")
    evaluation = evaluate("phyjudge", clips, settings=options)
    assert "warning" not in capsys.readouterr().err
    assert evaluation.summary.asked["judge"]["instruction"].endswith("(given)")
    assert in_form == ["SA", "PTV", "persistence", "new", "gravity"]
    # The same again costs nothing; other words or laws make other scores.
    evaluate("phyjudge", clips, settings=options)
    assert len(in_form) == 5
    evaluate("phyjudge", clips, settings=[*options, "laws=[gravity]"])
    assert len(in_form) == 9
    for content, says in (
        (texts | {"SA": "Rate it."}, "has no place for the caption in SA"),
        ({"SA": "{caption}"}, "expected a text for each of SA, PTV, persistence and the laws"),
        ([1], "expected a text for each"),
        (texts | {False: "{caption}"}, "expected a text for each"),
    ):
        path.write_text(yaml.safe_dump(content))
        with pytest.raises(UserError, match=says):
            evaluate("phyjudge", clips, settings=options)
    with pytest.raises(UserError, match=r"nowhere\.yaml cannot be read"):
        evaluate("phyjudge", clips, settings=[*options, "instruction=nowhere.yaml"])


def test_an_answer_without_a_score_is_invalid_not_zero(judge, tmp_path, monkeypatch):
    monkeypatch.setattr(phyjudge, "ANSWER_LENGTH", 2)
    clips = clips_of(tmp_path / "clips", PROMPTS[:1])
    evaluation = evaluate("phyjudge", clips, settings=options_of(judge, "laws=[gravity]"))
    row = Scores.read(evaluation.folder).rows[0]
    assert row["sa_rating"] is row["pc_expected"] is row["gravity_rating"] is None
    assert row["coverage"] == 0 and row["invalid"]["sa"] == "the judge gave nothing as SA"
    for metric in evaluation.summary.metrics.values():
        assert (metric.n, metric.invalid, metric.mean) == (0, 1, None)


def test_a_law_without_an_answer_leaves_the_mean_of_the_others(judge, monkeypatch):
    bench = PhyJudge(judge=str(judge), adapter=None, laws=("gravity", "shadow"))
    told = {"gravity": '{"gravity": 4}', "shadow": '{"shadow": 0}'}

    def answer(self: Any, clip: Any, question: str, caption: str, key: str) -> Any:
        text = told.get(key, f'{{"{key}": 2}}')
        tokens = bench.live.tokenizer.encode(text)
        logits = torch.zeros(len(tokens), 5)
        return text, bench.live.digit(tokens, logits, score_of(text, key))

    monkeypatch.setattr(PhyJudge, "_rate", answer)
    row = bench.score(noise(), "A ball falls.")
    assert (row["pc_rating"], row["coverage"], row["sa_rating"]) == (4, 0.5, 2)
    assert row["shadow_rating"] is None and row["invalid"] == {
        "shadow": "the judge gave 0 as shadow"
    }
    assert row["pc_expected"] == pytest.approx(3)  # All digits alike.


def test_what_is_not_phygrounds_is_refused(judge, captions, tmp_path):
    def bench(**settings: Any) -> PhyJudge:
        return PhyJudge(judge=str(judge), adapter=None, **settings)

    with pytest.raises(UserError, match="Name PhyGround's list of them"):
        bench().about()
    with pytest.raises(UserError, match="Give one of the two"):
        bench(captions=str(captions), laws=("gravity",)).about()
    with pytest.raises(UserError, match=r"are \('wind',\); expected some of boundary_interaction"):
        bench(laws=("wind",)).about_prompt("A ball falls.")
    with pytest.raises(UserError, match=r"no caption of .*phyground\.json; phyjudge scores"):
        bench(captions=str(captions)).about_prompt("A cat.")
    write_video(tmp_path / "one.mp4", noise(2, 32, 32).frames[:1], 8)
    with pytest.raises(ClipError, match="has one frame"):
        bench(laws=("gravity",)).read(tmp_path / "one.mp4")
    for content, says in (
        ([{"id": 1, "prompt": "A."}], "the prompt 1 has no laws"),
        ([], "it is empty"),
        (
            [
                {"id": n, "prompt": text, "physical_laws": []}
                for n, text in enumerate(("A.", "A. "))
            ],
            "the prompt 0 is also another entry's",
        ),
        ([{"id": 1, "prompt": "A.", "physical_laws": [["wind"]]}], r"are \[\['wind'\]\]; expected"),
        ({"prompts": []}, "expected PhyGround's phyground.json"),
    ):
        captions.write_text(json.dumps(content))
        with pytest.raises(UserError, match=says):
            bench(captions=str(captions)).about_prompt("A.")
    folder = shutil.copytree(judge, tmp_path / "judge")
    (folder / "video_preprocessor_config.json").write_text('{"size": {"height": 3}}')
    with pytest.raises(UserError, match="with shortest_edge and longest_edge"):
        PhyJudge(judge=str(folder), adapter=None, laws=("gravity",)).score(noise(), "A.")


def test_the_adapter_is_part_of_what_a_row_depends_on(judge, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", judge)
    bench = PhyJudge(judge=str(judge), adapter=str(adapter), laws=("gravity",), precision="float32")
    plain = PhyJudge(judge=str(judge), adapter=None, laws=("gravity",), precision="float32")
    assert bench.about()["judge"]["adapter"] and bench.about() != plain.about()
    name = f"model.{ADAPTED[0]}.weight"
    merged, base = (dict(one.live.model.named_parameters())[name] for one in (bench, plain))
    assert not torch.equal(merged, base)


def test_phygrounds_prompts_come_with_their_first_frames(tmp_path):
    table = tmp_path / "prompts" / "phyground.json"
    table.parent.mkdir()
    entry = {"id": 7, "prompt": "A ball.", "physical_laws": ["gravity"], "id_stem": "0007_ball"}
    table.write_text(json.dumps([entry]))
    (prompt,) = PhyJudge(captions=str(tmp_path)).every_prompt()
    assert (prompt.id, prompt.text, prompt.image) == ("7", "A ball.", None)
    (tmp_path / "first_images").mkdir()
    for captions in (tmp_path, table):
        (prompt,) = PhyJudge(captions=str(captions)).every_prompt()
        assert prompt.image == tmp_path / "first_images" / "0007_ball.jpg"
    with pytest.raises(UserError, match="phyjudge has no list of prompts to generate from"):
        PhyJudge().every_prompt()
