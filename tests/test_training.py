"""A training survives what happens to real processes: SIGKILL at any moment, a loss that is not finite, other data."""
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from difiisr_dwt.checkpoints import TrainingError, checkpoint_files, read_checkpoint
from difiisr_dwt.configuration import configure
from difiisr_dwt.datasets import DataError, batches, degrade
from difiisr_dwt.images import ThermalImage, write_image
from difiisr_dwt.models import load_model, save_model
from difiisr_dwt.thermal_scenes import render_scene
from difiisr_dwt.train_config import TrainConfig
from difiisr_dwt.training import train, training_data
from difiisr_dwt.training_step import initial_model, start_state, training_step

CONFIG = {
    "train": ["scenes:3"], "validation": ["scenes:1@1000000"], "crop": 64, "batch": 2, "iterations": 60, "warmup": 5,
    "checkpoint_every": 7, "validate_every": 25, "log_every": 5, "sigma_batches": 2,
    "model": {"network": {"channels": [16, 24], "blocks": 1}, "schedule": {"steps": 4}},
}
SCRIPT = """
import json, sys, time
import torch
torch.set_num_threads(1)
from difiisr_dwt.configuration import configure
from difiisr_dwt.train_config import TrainConfig
from difiisr_dwt.training import train
train(configure(TrainConfig, json.loads(sys.argv[1])), sys.argv[2], lambda state: time.sleep(0.02))
"""


def start(run_dir: Path) -> subprocess.Popen:
    """A training in a process of its own."""
    return subprocess.Popen([sys.executable, "-c", SCRIPT, json.dumps(CONFIG), str(run_dir)],
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def iteration_of(run_dir: Path) -> int:
    """That of the last checkpoint, which must always be readable."""
    for file in checkpoint_files(run_dir):
        load_file(file)
    return read_checkpoint(run_dir)[1]["iteration"]


def test_killed_and_resumed_is_bit_identical(tmp_path):
    """Killed five times at random moments, the run ends with the same bytes as the uninterrupted one."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole).wait() == 0
    seed = int.from_bytes(os.urandom(4), "little")
    print("moments from seed", seed)
    moments, reached = random.Random(seed), []
    for _ in range(5):
        process = start(killed)
        log = killed / "metrics.jsonl"
        size = log.stat().st_size if log.exists() else 0
        while process.poll() is None and not (log.exists() and log.stat().st_size > size):  # it is at work
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if checkpoint_files(killed):
            reached.append(iteration_of(killed))
    assert start(killed).wait() == 0
    assert reached, f"no kill came after a checkpoint (seed {seed})"
    for name in ("checkpoints/00000060.safetensors", "model.safetensors"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes(), f"{name} differs, seed {seed}, kills after {reached}"
    assert iteration_of(killed) == 60
    logged = [[json.loads(line)["iteration"] for line in (d / "metrics.jsonl").read_text().splitlines()] for d in (whole, killed)]
    assert logged[0] == logged[1]


def test_loss_that_is_not_finite_stops_before_the_update(tmp_path):
    """A learning rate that explodes ends in a sentence with the iteration; the checkpoint holds finite numbers."""
    config = configure(TrainConfig, CONFIG | {"learning_rate": 1e12, "clip": 1e12, "validate_every": 60, "checkpoint_every": 1})
    with pytest.raises(TrainingError, match=r"iteration \d+: loss .*last good state"):
        train(config, tmp_path)
    tensors = read_checkpoint(tmp_path)[2]
    assert all(v.isfinite().all() for k, v in tensors.items() if k.startswith(("model.", "average.")))


def test_sixteen_bit_frames_train_like_eight_bit_ones(tmp_path):
    """Counts 7000–7255 of a 16-bit camera give nearly the losses of the same pairs in 8 bits."""
    losses = []
    for name, offset in (("8", 0), ("16", 7000)):
        for seed in range(2):
            # one LR for both: made here, it would differ by what Pillow's 8-bit path rounds between its two passes
            for part, image in zip(("HR", "LR"), degrade(ThermalImage.from_native(render_scene(seed).image)), strict=True):
                pixels = image.native()
                image = ThermalImage.from_native(pixels if not offset else (pixels.astype("uint16") + offset))
                (tmp_path / name / part).mkdir(parents=True, exist_ok=True)
                write_image(tmp_path / name / part / f"{seed}.png", image)
        config = configure(TrainConfig, CONFIG | {"train": [str(tmp_path / name)], "iterations": 10, "validate_every": 10, "log_every": 10})
        train(config, tmp_path / f"run{name}")
        losses.append(json.loads((tmp_path / f"run{name}" / "metrics.jsonl").read_text().splitlines()[0])["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": ["nowhere"]}, "nowhere: no such folder"),
        ({"train": ["scenes:none"]}, "scenes:N"),
        ({"train": ["scenes:1"], "crop": 512}, "at least 512×512"),
        ({"crop": 66}, "not a multiple of the scale"),
        ({"kernel": "cubic"}, "kernel 'cubic' does not exist"),
    ],
)
def test_data_that_cannot_be_used(tmp_path, change, message):
    """One sentence, before anything is trained."""
    with pytest.raises(DataError, match=message):
        train(configure(TrainConfig, CONFIG | change), tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_activations_lie_channels_innermost(tmp_path):
    """On a CPU, the compact network's activations are laid out as `memory_format` says; weights and results stay as they are."""
    seen, states = {}, {}
    for layout in ("auto", "contiguous"):
        config = configure(TrainConfig, CONFIG | {"memory_format": layout, "device": "cpu"})
        state = start_state(initial_model(config, training_data(config)), config)
        layers = [m for m in state.model.network.modules() if isinstance(m, torch.nn.Conv2d)]
        layers[1].register_forward_hook(lambda _, inputs, __, layout=layout: seen.update({layout: inputs[0].stride()}))
        x = torch.ones(2, 16, 16, 16)
        states[layout] = state.model.network(x, torch.zeros(2, dtype=torch.int64), x)
        assert all(p.is_contiguous() for p in state.model.parameters())
    assert seen["auto"][1] == 1 and seen["contiguous"][-1] == 1, seen
    torch.testing.assert_close(states["auto"], states["contiguous"])


def test_a_told_kernel_is_learnt(tmp_path):
    """The vectors of the kernels that were met move apart, that of 'unknown' too; one never met stays zero; resume takes all up."""
    model = CONFIG["model"] | {"kernels": ["bicubic", "box", "matlab"]}
    config = configure(TrainConfig, CONFIG | {"model": model, "kernel": ["bicubic", "box"], "kernel_unknown": 0.4, "iterations": 12})
    train(config, tmp_path)
    learnt = load_file(tmp_path / "model.safetensors")["network.kernel.weight"]
    unknown, bicubic, box, matlab = learnt
    assert len({row.sum().item() for row in learnt}) == 4 and not matlab.any()
    assert unknown.any() and bicubic.any() and box.any()
    plain = configure(TrainConfig, CONFIG | {"iterations": 1, "validate_every": 1})
    train(plain, tmp_path / "plain")
    taken = configure(TrainConfig, CONFIG | {"model": model, "initial": str(tmp_path / "plain" / "model.safetensors")})
    assert not initial_model(taken, training_data(taken)).network.kernel.weight.any()


def test_a_mean_is_taken_over_and_grows(tmp_path):
    """The stateless network that stands beside a chain goes on alone, bit by bit the same, with blocks more too; with fewer it is refused."""
    mean = CONFIG["model"]["network"] | {"stateless": True, "more": 1}
    config = configure(TrainConfig, CONFIG | {"model": CONFIG["model"] | {"mean": mean}, "iterations": 3, "validate_every": 3})
    train(config, tmp_path)
    learnt = load_model(tmp_path / "model.safetensors")[0].mean
    up = torch.rand((1, 1, 32, 32), generator=torch.Generator().manual_seed(0)) * 2 - 1

    def taken(more):
        model = CONFIG["model"] | {"network": mean | {"more": more}, "max_steps": 1}
        alone = configure(TrainConfig, CONFIG | {"model": model, "initial": str(tmp_path / "model.safetensors"), "t": "last"})
        return initial_model(alone, training_data(alone))

    condition = taken(1).condition(up)

    def guess(network):
        return network(torch.zeros_like(condition), torch.zeros(1, dtype=torch.int64), condition)

    assert torch.equal(guess(taken(1).network), guess(learnt)) and torch.equal(guess(taken(3).network), guess(learnt))
    assert len(taken(3).network.up[0]) == len(learnt.up[0]) + 2
    with pytest.raises(TrainingError, match="model.safetensors: its network of a single step differs .*'more': 1.* may be larger"):
        taken(0)
    save_model(tmp_path / "model.safetensors", taken(1), {})  # one without a chain
    assert torch.equal(guess(taken(3).network), guess(learnt))
    with pytest.raises(TrainingError, match="its network of a single step differs .*'more': 1.* may be larger"):
        taken(0)


@pytest.mark.parametrize("share, expected", [(0.0, {1, 2}), (1.0, {0})])
def test_kernels_are_withheld_as_often_as_said(monkeypatch, share, expected):
    """Told always, or never."""
    config = configure(TrainConfig, CONFIG | {"model": CONFIG["model"] | {"kernels": ["bicubic", "box"]}, "kernel": ["bicubic", "box"],
                                              "kernel_unknown": share, "batch": 8})
    dataset = training_data(config)
    state = start_state(initial_model(config, dataset), config)
    seen = []
    state.model.network.kernel.register_forward_hook(lambda module, inputs, output: seen.extend(inputs[0].tolist()))
    batch = next(iter(batches(dataset, config.batch, 0, 1)))
    training_step(state, batch, config)
    assert set(seen) == expected and len(seen) == 8


def test_a_finder_learns_alone_and_beside(tmp_path):
    """Frozen, the network stays and the finder learns, from a model without one; else both learn, and a finder is taken over as it is."""
    told = CONFIG["model"] | {"kernels": ["bicubic", "box"]}
    common = CONFIG | {"kernel": ["bicubic", "box"], "kernel_unknown": 0.0, "iterations": 4, "validate_every": 4}
    train(configure(TrainConfig, common | {"model": told}), tmp_path / "plain")
    finds = common | {"model": told | {"find_kernel": True}, "initial": str(tmp_path / "plain" / "model.safetensors"), "best": "psnr_unknown"}
    metrics = train(configure(TrainConfig, finds | {"frozen": True}), tmp_path / "alone")
    assert {"psnr_unknown", "lpips_unknown"} <= metrics.keys()
    plain, alone = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "alone"))
    assert all(torch.equal(alone[name], value) for name, value in plain.items()), "all but the finder is what it was"
    torch.manual_seed(0)
    config = configure(TrainConfig, finds | {"initial": str(tmp_path / "alone" / "model.safetensors")})
    model = initial_model(config, training_data(config))
    assert torch.equal(model.finder.last.weight, alone["finder.last.weight"])
    both = train(config, tmp_path / "both") and load_file(tmp_path / "both" / "model.safetensors")
    assert not torch.equal(both["finder.last.weight"], alone["finder.last.weight"])
    assert not torch.equal(both["network.first.weight"], alone["network.first.weight"])
    for wrong, word in (({"frozen": True, "model": told}, "find_kernel"), ({"best": "psnr_unknown", "model": told}, "find_kernel")):
        with pytest.raises(TrainingError, match=word):
            train(configure(TrainConfig, common | {"initial": finds["initial"]} | wrong), tmp_path / "wrong")
