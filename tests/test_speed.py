"""What makes a training fast changes no result, and how fast it is stands in its log."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from videorepa.artifacts.run import Run
from videorepa.errors import UserError
from videorepa.prepare import prepare
from videorepa.recipe import Recipe
from videorepa.system.device import PEAK_TFLOPS, peak_rate
from videorepa.train import train
from videorepa.training.cost import predict

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def log_of(run: Run) -> list[dict]:
    return [json.loads(line) for line in run.log_path.read_text().splitlines()]


@pytest.fixture
def prepared(recipe: Recipe) -> Recipe:
    prepare(recipe)
    return recipe.override("optim.steps=3")


def test_the_log_has_each_steps_seconds_and_the_share_of_a_known_peak(
    prepared: Recipe, tmp_path: Path
) -> None:
    """On a CPU nobody knows the peak, so that nothing is said of it."""
    plain = log_of(train(prepared, tmp_path / "plain", device="cpu"))
    assert all(row["step_seconds"] > 0 and "mfu" not in row for row in plain)
    told = prepared.override("speed.peak_tflops=0.5", "memory.gradient_checkpointing=true")
    rows = log_of(train(told, tmp_path / "told", device="cpu"))
    # What checkpointing computes again is no use of the device.
    needed = predict(prepared, CPU).operations
    assert needed < predict(told, CPU).operations
    for row in rows:
        assert row["mfu"] == pytest.approx(needed / row["step_seconds"] / 0.5e12)


def test_the_peak_is_the_data_sheets_or_unknown(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 PCIe")
    assert peak_rate(CUDA, torch.bfloat16) == 756e12
    assert peak_rate(CUDA, torch.float32) is peak_rate(CPU, torch.bfloat16) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 PCIe MIG 1g")
    assert peak_rate(CUDA, torch.bfloat16) is None
    assert all(50 < peak < 5000 for peak in PEAK_TFLOPS.values())


def test_a_profile_is_one_whole_file_in_the_run(prepared: Recipe, tmp_path: Path) -> None:
    run = train(prepared, tmp_path / "run", device="cpu", profile=2)
    assert [path.name for path in run.path.glob("*profile*")] == ["profile-2-3.json.gz"]
    events = json.loads(gzip.decompress((run.path / "profile-2-3.json.gz").read_bytes()))
    names = [event.get("name", "") for event in events["traceEvents"]]
    assert sum(name.startswith("ProfilerStep#") for name in set(names)) == 2
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in names
    with pytest.raises(UserError, match="--profile 3 .* has 3 left. Profile from 1 to 2"):
        train(prepared, tmp_path / "refused", device="cpu", profile=3)
