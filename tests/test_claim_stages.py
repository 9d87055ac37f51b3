"""The stages whose published runs the page of claims quotes, small and on procedural scenes."""
import csv
import json

import numpy as np
import pytest
import yaml

from difiisr_dwt.degradations import crop_to_multiple, downsample_pixels
from difiisr_dwt.experiments import run_experiment
from difiisr_dwt.images import ThermalImage, find_images, read_image, shared_data
from difiisr_dwt.pipeline import SuperResolver


def run(stage: str, params: dict, root) -> dict:
    """metrics.json of a stage that ran."""
    file = root / "x.yaml"
    file.write_text(yaml.safe_dump({"stage": stage, "params": params}))
    (result,) = run_experiment(file, root=root / "reports")
    assert result.status == "finished", result
    folder = next((root / "reports" / stage).iterdir())
    metrics = json.loads((folder / "metrics.json").read_text())
    assert all((folder / f["file"]).stat().st_size > 1000 for f in metrics["figures"])
    return metrics


def test_grain(tmp_path):
    """White noise takes the one-step output nearer to the truth in LPIPS, and no measure of structure improves by it; the sentence says the numbers."""
    m = run("grain", {"data": ["scenes:2@2000000"], "steps": 2, "shown": 1}, tmp_path)
    (by_method,) = m["fair"].values()
    rows = {(r["method"], r["sigma"]): r for r in m["rows"]}
    for label, fair in by_method.items():
        assert fair["lpips"] < fair["plain"] and fair["sigma"] > 0
        assert fair["lpips"] == pytest.approx(rows[label, fair["sigma"]]["lpips"], abs=1e-6)
        assert rows[label, fair["sigma"]]["psnr"] < rows[label, 0.0]["psnr"]
        assert rows[label, fair["sigma"]]["gmsd"] > 0.975 * rows[label, 0.0]["gmsd"]
    one = by_method["1 step"]
    assert f"LPIPS {one['plain']:.3f} to {one['lpips']:.3f}" in m["conclusion"] and "2 steps" in m["conclusion"]
    assert bool(m["misled"]) == (one["lpips"] < by_method["2 steps"]["plain"])


def test_latents(tmp_path):
    """Two levels of Haar are four times the mean of each block, so about a quarter of the range lies in [−1, 1] of a frame that fills it."""
    m = run("latents", {"data": ["scenes:3@2000000"]}, tmp_path)
    ranges = {(r["wavelet"], r["levels"]): r for r in m["ranges"]}
    for level in (1, 2, 3):
        assert -(2**level) <= ranges["haar", level]["low"] < ranges["haar", level]["high"] <= 2**level
        assert ranges["haar", level]["mean"] == pytest.approx(2 ** (level - 2) * ranges["haar", 2]["mean"], rel=1e-3)
    bands = m["bands"]
    assert bands["HR"][0] == max(bands["HR"]) and m["spread"] == max(bands["HR"]) / min(bands["HR"]) > 10
    assert max(bands["HR − up-sampled LR"]) < 0.3 * bands["HR"][0], "the LR knows most of LL"


def test_calibration(tmp_path):
    """Samples differ at edges, where their mean is wrong; the correlation is that of the images, and the sentence has it."""
    source = "scenes:2@2000000"
    m = run("calibration", {"data": [source], "samples": 3, "steps": 3, "crop": 96, "pictures": [source]}, tmp_path)
    (row,) = m["rows"]
    assert row["set"] == source and row["images"] == 2 and 0.1 < row["worst image"] <= row["Spearman"] < 1
    assert row["error where least sure, over where surest"] > 1.5
    assert f"correlate by {row['all pixels of the set']:.2f}" in m["conclusion"] and f"within an image by {row['Spearman']:.2f}" in m["conclusion"]
    assert 0.1 < row["all pixels of the set"] < 1 and len(m["figures"]) == 2


@pytest.mark.skipif(shared_data() is None, reason="needs the shared infrared images (DIFIISR_SHARED)")
def test_consistency(tmp_path):
    """Every result is within half a count, no plain one is, and the network that is asked once says what it says when asked again."""
    name, kernel = "roadscene/val", "bicubic"
    m = run("consistency", {"folders": [name], "frames": 1, "kernels": [kernel], "tiles": [0, 64]}, tmp_path)
    assert m["verdict"]["passed"] and not m["beyond"] and len(m["rows"]) == 6 and m["settings"]["frames"] == {name: 1}
    with open(next((tmp_path / "reports").rglob("consistency.csv"))) as file:
        rows = {(row["mapping"], int(row["tile"])): {k: float(v) for k, v in row.items() if " " in k} for row in csv.DictReader(file)}
    assert len(rows) == 6 and all(row["consistent deviation"] <= 0.5 < row["plain deviation"] for row in rows.values())
    hr = crop_to_multiple(read_image(find_images([shared_data(name)])[0]).native().astype(np.float64))
    resolver = SuperResolver.from_pretrained("compact", device="cpu")
    for (mapping, tile), dtype, gain, offset in ((("uint16", 64), np.uint16, 257, 0), (("counts", 0), np.uint16, 1, 7000)):
        low = np.rint(65535 * downsample_pixels((gain * hr + offset) / 65535, kernel, levels=65535))
        image = ThermalImage.from_native(low.astype(dtype))
        for key, consistent in (("plain psnr", False), ("consistent psnr", True)):
            sr = resolver.upscale_image(image, tile=tile, kernel=kernel, consistent=consistent).native().astype(np.float64)
            error = np.square(np.clip((sr - offset) / gain, 0, 255) - hr).mean()
            assert rows[mapping, tile][key] == pytest.approx(10 * np.log10(255**2 / error), abs=1e-3)
