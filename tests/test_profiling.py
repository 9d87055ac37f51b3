"""Benchmark and cost report: small versions of the stages, in real kernels; measurements that cannot be made."""

import json
from functools import partial

import pytest
import torch
import yaml
from safetensors.torch import load_file

from difiisr_dwt import codec_benchmark, training, training_benchmark
from difiisr_dwt.codec_benchmark import available_peers, bench_codecs, coder_job
from difiisr_dwt.codecs import CODECS
from difiisr_dwt.configuration import configure
from difiisr_dwt.costs import TwoBranchUNet, costs
from difiisr_dwt.experiments import run_experiment
from difiisr_dwt.profiling import ProfilingError, interleaved, peak_memory
from difiisr_dwt.train_config import TrainConfig
from difiisr_dwt.training_benchmark import PARTS, SELDOM, compare_settings, network_share, part_table, watch_training


def run_stage(tmp_path, stage, params):
    """Run a stage as `difiisr run` does; its folder and its metrics."""
    file = tmp_path / "e.yaml"
    file.write_text(yaml.safe_dump({"stage": stage, "params": params}))
    (result,) = run_experiment(file, root=tmp_path / "reports")
    assert result.status == "finished", result.message
    return result.run_dir, json.loads((result.run_dir / "metrics.json").read_text())


def test_bench_codecs_stage(tmp_path):
    folder, metrics = run_stage(tmp_path, "bench_codecs", {
        "batches": [1], "channels": [3], "sizes": [64], "vq_cases": [[1, 3, 64]], "vq_channels": 32, "repeats": 3, "threads": 1,
    })  # fmt: skip
    assert [row["codec"] for row in metrics["rows"]] == [*CODECS, *available_peers()]
    assert all(row["encode"] > 0 and row["both"] > 0 and row["working"] is not None for row in metrics["rows"])
    assert {t["met"] for t in metrics["targets"]} == {None} and "verdict" not in metrics
    assert (folder / "figures" / "codecs.png").stat().st_size > 10_000
    assert len(metrics["tables"][1]["rows"]) == len(metrics["rows"])


def test_one_codec_alone():
    (row,) = bench_codecs([(1, 1, 32)], ["pixel"], repeats=2, memory=False)
    assert row["to_packet"] is None and row["to_copy"] is None and row["working"] is None


def test_unknown_codec_is_named():
    with pytest.raises(ProfilingError, match="'packt' is neither"):
        bench_codecs([(1, 1, 32)], ["packt"], memory=False)


def test_missing_library_is_left_out(monkeypatch):
    monkeypatch.setattr(codec_benchmark, "find_spec", lambda name: None if name == "ptwt" else object())
    assert not any(name.startswith("ptwt") for name in available_peers())
    assert "PyWavelets packet" in available_peers() and "PyWavelets packet" not in available_peers("cuda")


@pytest.mark.parametrize("name", [n for n in available_peers() if n.endswith("packet")])
def test_packet_peers_do_the_same_work(name):
    """Their sixteen bands are ours, up to order and sign."""
    image = 2 * torch.rand(1, 1, 16, 16, dtype=torch.float32) - 1
    z = codec_benchmark.PEERS[name]("cpu")[0](image)
    if name.startswith("ptwt"):
        bands = [z[k] for k in z.get_natural_order(2)]
    elif name.startswith("PyWavelets"):
        bands = [torch.as_tensor(b) for low, high in z for b in (low, *high)]
    else:
        bands = [b for low, (high,) in z[:2] for b in (*low.unbind(1), *high.flatten(1, 2).unbind(1))]
    ours = CODECS["packet"](1).encode(image)[0]
    assert len(bands) == 16
    energies = [sorted(float(b.square().sum()) for b in some) for some in (bands, ours.unbind(1))]
    assert energies[0] == pytest.approx(energies[1], abs=1e-4)


def test_measurements_that_cannot_be_made():
    with pytest.raises(ProfilingError, match="needs candidates"):
        interleaved({})
    with pytest.raises(ProfilingError, match="'bad' could not be measured: ProfilingError"):
        peak_memory({"bad": partial(coder_job, "packt", (1, 1, 32))})


def test_memory_grows_with_the_image():
    sizes = {n: partial(coder_job, "packet", (4, 3, n)) for n in (512, 1024)}  # what is smaller finds room in the heap
    small, large = peak_memory(sizes).values()
    if small is None:
        pytest.skip("this system does not tell")
    assert 3 < large.working / small.working < 5 and large.held == pytest.approx(4 * 3 * 1024**2 * 4, rel=0.1)


def test_costs_stage(tmp_path):
    folder, metrics = run_stage(tmp_path, "costs", {
        "systems": ["original", "packet", "two_branch"], "steps": [1, 2], "size": 64, "repeats": 2, "threads": 1, "vq_channels": 32,
        "swin": {"model_channels": 32, "swin_embed_dim": 32, "num_res_blocks": [1, 1, 1, 1]},
    })  # fmt: skip
    original, packet, branches = metrics["rows"]
    for row in metrics["rows"]:
        assert row["macs 2"] == row["macs encoder"] + 2 * row["macs denoiser"] + row["macs decoder"]
        assert row["memory whole"] > 4 * row["parameters"] and row["seconds 2"] > 0
    assert original["faster 1"] == 1 and packet["faster 2"] > 1 and branches["faster 2"] is None
    assert packet["memory whole"] < original["memory whole"]
    assert metrics["claims"] == [] and "verdict" not in metrics, "a small network says nothing about the claims"
    assert (folder / "figures" / "latency.png").stat().st_size > 5_000


def test_two_branches_keep_their_bands_apart():
    """Without bodies that mix, and without exchange, the fine head's pixels come from the fine bands at their place."""
    network = TwoBranchUNet(Quiet(), Quiet(), image_channels=2, width=8)
    for layer in (*network.up, *network.down):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    x = torch.randn(1, 32, 8, 8)
    base = network(x, torch.zeros(1), x)
    x[:, 8:] = torch.randn(1, 24, 8, 8)
    assert torch.equal(network(x, torch.zeros(1), x)[:, :8], base[:, :8])
    assert not torch.equal(network(x, torch.zeros(1), x)[:, 8:], base[:, 8:])


class Quiet(torch.nn.Module):
    """A body that does nothing."""

    def forward(self, x, t):
        return x


def test_unknown_system_is_named():
    with pytest.raises(ProfilingError, match="'paket' is no system"):
        costs(["paket"])


TINY = {
    "train": ["scenes:2"], "validation": ["scenes:1@1000000"], "crop": 64, "batch": 2, "device": "cpu",
    "model": {"network": {"channels": [16, 24], "blocks": 1}, "schedule": {"steps": 2}},
}  # fmt: skip


def test_bench_training_stage(tmp_path):
    folder, metrics = run_stage(tmp_path, "bench_training", TINY | {
        "kernels": ["bicubic", "sensor"], "iterations": 10, "settings": ["default", "contiguous", "1 worker"], "rounds": 2, "threads": 1,
    })  # fmt: skip
    for kernel in ("bicubic", "sensor"):
        parts = [part for part in metrics["parts"] if part["kernel"] == kernel]
        assert {p["part"] for p in parts} == set(PARTS) - {*SELDOM, "gradient norms"}, "without terms there is one gradient"
        assert sum(p["wall_share"] for p in parts) == pytest.approx(1) == sum(p["cpu_share"] for p in parts)
    assert [row["setting"] for row in metrics["rows"]] == ["default", "contiguous", "1 worker"]
    assert metrics["rows"][1]["loss_difference"] < 1e-3 and metrics["rows"][2]["loss_difference"] == 0
    assert metrics["rows"][2]["cpu_ratio"] is None, "a worker's processor time is not on this clock"
    share = metrics["shares"][0]["wall"]
    assert 0 < share < 1 and metrics["verdict"]["passed"] == (share >= 0.8) and f"{share:.1%}" in metrics["conclusion"]
    assert (folder / "figures" / "training.png").stat().st_size > 10_000 and (folder / "steps.csv").is_file()


def test_every_moment_of_a_training_is_accounted_for(tmp_path):
    """Parts add up to a clock beside theirs; afterwards, nothing is watched any more; a name that is gone is an error."""
    before = training_benchmark._timed_places(training_benchmark.PartClock())
    before = [owner.__dict__.get(name) for owner, name, _ in before]
    config = configure(TrainConfig, TINY | {"iterations": 6, "log_every": 2, "terms": {"charbonnier": 0.1}, "sigma_batches": 1})
    rows = watch_training(config, tmp_path / "run", warmup=2)
    assert len(rows) == 4 and all("gradient norms" in row for row in rows[1::2])
    for row in rows:
        for clock in (0, 1):
            assert sum(row[part][clock] for part in row if part != "whole") == pytest.approx(row["whole"][clock], rel=0.02, abs=2e-3)
    assert 0 < network_share(rows) < 1 and {"forward", "backward"} <= {r["part"] for r in part_table(rows)}
    assert [owner.__dict__.get(name) for owner, name, _ in training_benchmark._timed_places(training_benchmark.PartClock())] == before
    with pytest.raises(ProfilingError, match="more than 6 iterations"):
        watch_training(config, tmp_path / "other", warmup=6)


def test_a_watched_training_learns_what_another_does(tmp_path):
    config = configure(TrainConfig, TINY | {"iterations": 3, "sigma_batches": 1})
    watch_training(config, tmp_path / "watched", warmup=0)
    training.train(config, tmp_path / "plain")
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("watched", "plain"))
    assert one == other


def test_compile_is_left_out_where_there_is_no_compiler(monkeypatch, tmp_path):
    monkeypatch.setattr(training_benchmark, "compiler_missing", lambda: "there is none")
    config = configure(TrainConfig, TINY | {"sigma_batches": 1})
    rows, left_out = compare_settings(config, tmp_path, ("default", "compile"), rounds=1, warmup=2)
    assert [row["setting"] for row in rows] == ["default"] and left_out == {"compile": "there is none"}


def test_a_run_goes_on_with_another_memory_format(tmp_path):
    """Checkpoints do not know it; what is learnt differs by rounding."""
    config = TINY | {"iterations": 6, "checkpoint_every": 3, "sigma_batches": 1, "learning_rate": 1e-3, "warmup": 1}
    for first, second in (("contiguous", "contiguous"), ("contiguous", "channels_last"), ("channels_last", "contiguous")):
        folder = tmp_path / f"{first}-{second}"
        stop = RuntimeError("here")

        def break_off(state, stop=stop):
            if state.iteration == 4:
                raise stop

        with pytest.raises(RuntimeError, match="here"):
            training.train(configure(TrainConfig, config | {"memory_format": first}), folder, break_off)
        training.train(configure(TrainConfig, config | {"memory_format": second}), folder)
    tensors = [load_file(f / "model.safetensors") for f in sorted(tmp_path.iterdir())]
    for other in tensors[1:]:
        assert other.keys() == tensors[0].keys()
        for name, value in other.items():
            torch.testing.assert_close(value, tensors[0][name], rtol=1e-3, atol=1e-4)
