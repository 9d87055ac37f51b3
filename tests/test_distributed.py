"""One process and several train the same model; a killed rank, a signal, another number of processes: nothing is lost.

Several processes meet over gloo on the CPU. What needs GPUs (NCCL, float16 in earnest, FSDP at full size) is not run here.
"""
import dataclasses
import json
import os
import signal
import socket

import psutil
import pytest
import torch

from difiisr_dwt.checkpoints import TrainingError, checkpoint_files, part, read_checkpoint
from difiisr_dwt.distributed import launch_command
from difiisr_dwt.models import ModelConfig, NetworkConfig
from difiisr_dwt.train_config import TrainConfig
from difiisr_dwt.training import Preempted, train

CONFIG = TrainConfig(
    train=("scenes:6",), validation=("scenes:1@1000000",), crop=64, batch=4, iterations=50, warmup=4, checkpoint_every=25,
    validate_every=50, log_every=1, sigma_batches=4, device="cpu",
    model=ModelConfig(network=NetworkConfig(channels=(16, 24), blocks=1)),
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Each rank has one, and sums depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def losses(run_dir):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def weights(run_dir):
    return part(read_checkpoint(run_dir)[2], "model")


@pytest.fixture(scope="module")
def alone(tmp_path_factory, one_thread):
    """The run of one process."""
    run_dir = tmp_path_factory.mktemp("alone")
    train(CONFIG, run_dir)
    return run_dir


@pytest.mark.parametrize("changes", (
    {"processes": 2}, {"accumulation": 4}, {"processes": 2, "accumulation": 2, "workers": 1}, {"processes": 2, "sharded": True},
), ids=str)  # fmt: skip
def test_one_and_two_processes_train_the_same_model(alone, tmp_path, changes):
    """The losses of 50 steps agree to 1e-4, and so do the weights after them."""
    train(dataclasses.replace(CONFIG, **changes), tmp_path)
    assert len(losses(tmp_path)) == 50
    worst = max(abs(a - b) for a, b in zip(losses(alone), losses(tmp_path), strict=True))
    print(f"{changes}: largest difference of the loss {worst:.1e}")
    assert worst < 1e-4
    before = weights(alone)
    for name, value in weights(tmp_path).items():
        torch.testing.assert_close(value, before[name], rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
    assert any(not torch.equal(value, before[name]) for name, value in weights(tmp_path).items()), "another order of sums leaves a trace"


def test_adversarial_training_of_two_processes(tmp_path):
    """The discriminator's gradients are averaged too."""
    seen = []
    for processes in (1, 2):
        config = dataclasses.replace(CONFIG, terms={"adversarial": 0.1}, iterations=10, validate_every=10, processes=processes)
        train(config, tmp_path / str(processes))
        rows = [json.loads(line) for line in (tmp_path / str(processes) / "metrics.jsonl").read_text().splitlines()]
        seen.append([row["discriminator/loss"] for row in rows if "discriminator/loss" in row])
    assert seen[0] == pytest.approx(seen[1], abs=1e-4) and len(set(seen[0])) == 10


def test_a_signal_stops_all_and_another_number_of_processes_goes_on(alone, tmp_path):
    """Two processes are asked to stop, one goes on, and the run ends like one that nobody disturbed."""
    def ask(_):
        if len(losses(tmp_path) if (tmp_path / "metrics.jsonl").exists() else []) > 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Preempted, match="SIGTERM.*holds the last good state"):
        train(dataclasses.replace(CONFIG, processes=2), tmp_path, ask)
    reached = read_checkpoint(tmp_path)[1]["iteration"]
    assert 5 < reached < 50
    train(CONFIG, tmp_path)
    assert losses(tmp_path) == pytest.approx(losses(alone), abs=1e-4)


def test_a_killed_rank_ends_in_a_sentence(tmp_path):
    """One rank is killed: the other ends too, the checkpoint is whole, the run goes on from it."""
    config = dataclasses.replace(CONFIG, processes=2, iterations=3000, checkpoint_every=5, validate_every=3000)
    killed = []

    def kill(_):
        if checkpoint_files(tmp_path) and not killed:
            ranks = [p for p in psutil.Process().children(recursive=True) if "difiisr_dwt.training" in p.cmdline()
                     and "difiisr_dwt.distributed" not in p.cmdline()]
            killed.append(ranks[-1].pid)
            ranks[-1].kill()

    with pytest.raises(TrainingError, match="a process of the training died.*holds the last good state"):
        train(config, tmp_path, kill)
    assert killed and not [p for p in psutil.Process().children(recursive=True) if "difiisr_dwt.training" in p.cmdline()]
    assert read_checkpoint(tmp_path)[1]["iteration"] >= 5


def test_the_sentence_of_a_rank_reaches_the_caller(tmp_path):
    """What a rank cannot do is told by the one who started it."""
    with pytest.raises(TrainingError, match="nowhere: no such folder"):
        train(dataclasses.replace(CONFIG, train=("nowhere",), processes=2), tmp_path)


def test_several_machines_are_started_by_slurm(tmp_path, monkeypatch):
    """The command for two machines of a Slurm job; without one, a sentence. (Two machines are not at hand here.)"""
    config = dataclasses.replace(CONFIG, processes=2, nodes=2)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(TrainingError, match="started by Slurm"):
        launch_command(config, tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setattr(socket, "gethostname", lambda: "a1")
    command = launch_command(config, tmp_path)
    assert command[:3] == ["srun", "--nodes=2", "--ntasks-per-node=1"] and "--nnodes=2" in command
    assert "--rdzv-endpoint=a1:20077" in command and command[-2:] == ["difiisr_dwt.training", str(tmp_path)]


@pytest.mark.parametrize("changes", ({"compile": True}, {"activation_checkpointing": True}, {"precision": "bfloat16"}), ids=str)
def test_options_that_change_speed_and_memory_only(alone, tmp_path, changes):
    """Compiled or checkpointed networks learn the same, bfloat16 nearly the same; the files hold the same names."""
    train(dataclasses.replace(CONFIG, **changes, iterations=10, validate_every=10), tmp_path)
    train(dataclasses.replace(CONFIG, iterations=10, validate_every=10), tmp_path / "plain")
    tolerance = 0.05 if "precision" in changes else 1e-4
    assert losses(tmp_path) == pytest.approx(losses(tmp_path / "plain"), abs=tolerance)
    assert weights(tmp_path).keys() == weights(alone).keys()
