"""The shipped weights keep their promise on images that nothing was trained on, through the command line and PNG files."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from difiisr_dwt.datasets import read_pairs
from difiisr_dwt.images import read_image, shared_data, write_image
from difiisr_dwt.metrics import lpips_network, psnr
from difiisr_dwt.models import available_models

pytestmark = pytest.mark.skipif(shared_data() is None, reason="needs the shared infrared images (DIFIISR_SHARED)")


def upscaled(sources: list[Path], out: Path, steps: int) -> Path:
    """The folder of results that the command line wrote."""
    command = [sys.executable, "-m", "difiisr_dwt.cli", "upscale", *map(str, sources), "--out", str(out), "--steps", str(steps)]
    threads = str(os.cpu_count() or 1)
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": threads})
    return out


def judged(files: list[tuple[Path, Path]]) -> tuple[float, float]:
    """Mean PSNR in dB and mean LPIPS (alex) of (SR, HR) files: gray, all pixels, 8 bits."""
    lpips, rows = lpips_network("alex"), []
    for sr, hr in files:
        sr, hr = (torch.from_numpy(read_image(f).pixels)[None, None] for f in (sr, hr))
        with torch.inference_mode():
            rows.append((psnr(sr, hr).item(), lpips(sr, hr).item()))
    return tuple(np.mean(rows, axis=0))


def test_m3fd_test_set(tmp_path):
    """1 step ≥ 38.2 dB; 15 steps LPIPS ≤ 0.12 at ≥ 37.1 dB; Pillow's bicubic is 36.12 dB, 0.243."""
    root = shared_data("m3fd")
    names = sorted(p.name for p in (root / "HR").glob("*.png"))
    assert len(names) == 10
    for lr_file in (root / "LR_bicubic_x4").glob("*.png"):
        lr = Image.open(lr_file).convert("L")
        (tmp_path / "bicubic").mkdir(exist_ok=True)
        lr.resize((4 * lr.width, 4 * lr.height), Image.Resampling.BICUBIC).save(tmp_path / "bicubic" / lr_file.name)
    for steps in (1, 15):
        upscaled([root / "LR_bicubic_x4"], tmp_path / str(steps), steps)
    results = {key: judged([(tmp_path / key / f"{Path(n).stem}x4.png", root / "HR" / n) for n in names]) for key in ("bicubic", "1", "15")}
    print(results)
    assert results["bicubic"] == pytest.approx((36.12, 0.243), abs=0.005)
    assert results["1"][0] >= 38.2
    assert results["15"][0] >= 37.1 and results["15"][1] <= 0.12


@pytest.mark.parametrize("folder", ["hit_uav/val", "roadscene/val"])
def test_validation_folders(tmp_path, folder):
    """At least 1 dB above bicubic at 1 step, at most 0.7 of its LPIPS at 15 steps; four frames, evenly spread."""
    files = {}
    for pair in read_pairs(shared_data(folder), limit=4):
        for part, image in (("HR", pair.hr), ("LR", pair.lr)):
            (tmp_path / part).mkdir(exist_ok=True)
            write_image(tmp_path / part / f"{pair.name}.png", image)
        (tmp_path / "bicubic").mkdir(exist_ok=True)
        lr = Image.open(tmp_path / "LR" / f"{pair.name}.png")
        lr.resize((4 * lr.width, 4 * lr.height), Image.Resampling.BICUBIC).save(tmp_path / "bicubic" / f"{pair.name}.png")
        files[f"{pair.name}.png"] = tmp_path / "HR" / f"{pair.name}.png"
    for steps in (1, 15):
        upscaled([tmp_path / "LR"], tmp_path / str(steps), steps)
    results = {key: judged([(tmp_path / key / n, hr) for n, hr in files.items()]) for key in ("bicubic", "1", "15")}
    print(folder, results)
    assert results["1"][0] >= results["bicubic"][0] + 1.0
    assert results["15"][1] <= 0.7 * results["bicubic"][1]


def test_weights_are_small_and_come_with_a_card():
    """At most 15 MB each, and a model card beside that names data, kernel, steps, metrics and terms."""
    models = available_models()
    assert "compact" in models
    for path in models.values():
        assert path.stat().st_size <= 15_000_000
        card = path.with_suffix(".md").read_text()
        for word in ("Training data", "Kernel", "Steps", "PSNR", "LPIPS", "Licence"):
            assert word in card, f"{path.stem}.md lacks {word!r}"
