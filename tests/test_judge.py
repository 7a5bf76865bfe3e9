"""The judge of VideoPhy: the model against golden answers, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from videorepa.benchmarks.mplug_owl import VIDEO, MPlugOwlVideo
from videorepa.errors import UserError

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


def error(found: Tensor, expected: Tensor) -> float:
    return ((found.float() - expected).norm() / expected.norm()).item()


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
