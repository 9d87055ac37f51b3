"""Statistics: intervals that cover, tests against scipy and by hand, and a protocol beside every number of an evaluation."""
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from difiisr_dwt.experiments import run_experiment
from difiisr_dwt.statistics import METRICS, bootstrap_interval, holm, paired_rows, paired_test, result_rows


def test_the_interval_covers_the_mean():
    "Of 300 samples of 25, about 95 % of the intervals hold the true mean; the percentile bootstrap is known to be a little narrow."
    generator = np.random.default_rng(1)
    intervals = [bootstrap_interval(generator.normal(7, 2, 25), resamples=500) for _ in range(300)]
    assert 0.90 <= np.mean([i.low <= 7 <= i.high for i in intervals]) <= 0.97
    assert np.mean([i.high - i.low for i in intervals]) == pytest.approx(2 * 1.96 * 2 / 5, rel=0.08)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=30), st.floats(-50, 50), st.floats(0.1, 10))
def test_the_interval_moves_with_the_values(values, shift, factor):
    i, j = (bootstrap_interval(v, resamples=200) for v in (values, [factor * v + shift for v in values]))
    assert min(values) - 1e-9 <= i.low <= i.high <= max(values) + 1e-9
    for a, b in ((i.mean, j.mean), (i.low, j.low), (i.high, j.high)):
        assert b == pytest.approx(factor * a + shift, abs=1e-6)


def test_values_that_are_missing_or_infinite():
    assert bootstrap_interval([1.0, math.nan, 3.0]).images == 2 and bootstrap_interval([1.0, math.nan, 3.0]).mean == 2
    alone, none, infinite = bootstrap_interval([5.0]), bootstrap_interval([]), bootstrap_interval([30.0, math.inf])
    assert alone.mean == 5 and math.isnan(alone.low) and math.isnan(none.mean)
    assert infinite.mean == math.inf and math.isnan(infinite.high)
    test = paired_test([30.0, math.inf, 31.0, math.nan], [29.0, 30.0, 29.0, 1.0])
    assert test.difference.images == 2 and test.difference.mean == 1.5
    with pytest.raises(ValueError, match="the same images in both lists, not 2 and 3 values"):
        paired_test([1.0, 2.0], [1.0, 2.0, 3.0])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(6, 30), st.floats(0, 1))
def test_the_paired_test_is_antisymmetric_and_scipys(seed, count, shift):
    a, b = np.random.default_rng(seed).normal(0, 1, (2, count))
    one, other = paired_test(a + shift, b, resamples=300), paired_test(b, a + shift, resamples=300)
    assert one.difference.mean == pytest.approx(-other.difference.mean) and one.difference.low == pytest.approx(-other.difference.high)
    assert one.p_bootstrap == other.p_bootstrap and one.wins == count - other.wins
    assert one.p_wilcoxon == pytest.approx(stats.wilcoxon(a + shift, b).pvalue)


def test_pairs_find_what_means_hide():
    "A difference far smaller than that between images is sure; none is not; three images prove nothing."
    generator = np.random.default_rng(2)
    images = generator.normal(35, 4, 20)
    better = images + 0.2 + generator.normal(0, 0.1, 20)
    test = paired_test(better, images)
    assert test.difference.low > 0 and max(test.p_bootstrap, test.p_wilcoxon) < 0.001
    same = paired_test(images + generator.normal(0, 0.1, 20), images)
    assert min(same.p_bootstrap, same.p_wilcoxon) > 0.1 and same.difference.low < 0 < same.difference.high
    assert paired_test(better[:3], images[:3]).p_bootstrap == 0.25


def test_holm_by_hand():
    assert holm([0.04, 0.01, math.nan, 0.03])[:2] == [pytest.approx(0.06), pytest.approx(0.03)]
    assert math.isnan(holm([0.04, math.nan])[1]) and holm([]) == [] and holm([0.9, 0.8]) == [1, 1]
    assert holm([0.2]) == [0.2]


def test_rows_have_their_protocol():
    table = pd.DataFrame([{"set": s, "image": k, "method": m, "psnr": 30.0 + k + (m == "b"), "infrared_score": 50.0, "ssim": math.nan}
                          for s in ("x", "y") for m in ("a", "b") for k in range(6)])
    rows = result_rows(table, {"kernel": "box", "channel": "gray", "crop": "whole frames"})
    assert len(rows) == 2 * 2 * 2, "a metric without values has no row"
    assert {r["metric"]: r["shave"] for r in rows} == {"psnr": 0, "infrared_score": 4}
    assert all(r["definition"] == METRICS[r["metric"]].definition and r["kernel"] == "box" for r in rows)
    [first, _] = paired_rows(table, "a", ["psnr"])
    assert (first["data"], first["method"], first["difference"], first["larger_on"]) == ("x", "b", 1, 6)
    assert first["p_wilcoxon_holm"] == pytest.approx(2 / 2**6) and paired_rows(table, "c", ["psnr"]) == []


def test_an_evaluation_names_its_protocol_and_keeps_its_keys(tmp_path: Path):
    "The stage on two scenes: what published pages read is still there, every result carries its protocol, the control is fair."
    params = {"data": ["scenes:2@2000000"], "crop": 64, "steps": [1, 2], "pictures": False, "grain_fair_images": 1}
    file = tmp_path / "evaluate.yaml"
    file.write_text(yaml.safe_dump({"runs": [{"name": "e", "stage": "evaluate", "params": params}]}))
    [run] = run_experiment(file, tmp_path / "reports")
    assert run.status == "finished", run.message
    folder = next((tmp_path / "reports/evaluate").glob("*"))
    metrics = json.loads((folder / "metrics.json").read_text())
    assert {"stage", "title", "summary", "protocol", "settings", "rows", "grain", "tables", "sliders", "figures"} <= set(metrics)
    assert {"set", "method", "psnr", "ssim", "lpips", "sigma", "images", "kernel", "channel", "crop", "shave"} <= set(metrics["rows"][0])
    assert metrics["tables"][0]["columns"][:5] == ["method", "PSNR, dB", "SSIM", "LPIPS (alex)", "grain σ, levels"]

    results = {(r["method"], r["metric"]): r for r in metrics["results"]}
    for row in results.values():
        assert {"data", "kernel", "channel", "crop", "shave", "definition", "value", "low", "high", "images"} <= set(row)
        assert row["crop"] == "the middle 64×64" and row["definition"] == METRICS[row["metric"]].definition
    expected = {"psnr", "ssim", "lpips", "grain_fair", "gmsd", "edge_sharpness", "spectrum", "signal_spectrum", "infrared_score",
                "one_window", "consistency_max", "consistency_mean"}
    assert {metric for method, metric in results if method == "2 steps"} == expected
    assert results["1 step", "grain_fair"]["images"] == 1 and results["1 step", "psnr"]["images"] == 2

    per_image = pd.read_csv(folder / "per_image.csv")
    fair = metrics["grain_fair"]["scenes:2@2000000"]
    for method, found in fair.items():
        curve = {sigma: lpips for sigma, _, lpips in found["curve"]}
        assert len(curve) == 13 and found["lpips"] == min(curve.values()) == curve[found["sigma"]]
        column = per_image[per_image["method"] == method]["grain_fair"].dropna()
        assert len(column) == 1 and column.iloc[0] == pytest.approx(found["lpips"], rel=1e-4)
    projected = results["bicubic + back-projection", "consistency_mean"]["value"]
    assert projected < 0.1 * results["bicubic", "consistency_mean"]["value"], "back-projection restores the LR"
