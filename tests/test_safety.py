"""What a long run has to survive, each with the sentence that it says: a full disk, a dead worker, other data, other code.

A killed rank and another number of processes are in test_distributed, kills at any moment in test_kills.
"""
import json
import os
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from difiisr_dwt.checkpoints import TrainingError, checkpoint_files, part, read_checkpoint, read_log
from difiisr_dwt.configuration import configure
from difiisr_dwt.images import ThermalImage, write_image
from difiisr_dwt.thermal_scenes import render_scene
from difiisr_dwt.train_config import TrainConfig
from difiisr_dwt.training import _told, train

CONFIG = {
    "train": ["scenes:3"], "validation": ["scenes:1@1000000"], "validation_images": 1, "crop": 64, "batch": 2, "iterations": 12,
    "warmup": 2, "checkpoint_every": 4, "validate_every": 12, "log_every": 2, "sigma_batches": 2, "device": "cpu",
    "model": {"network": {"channels": [16, 24], "blocks": 1}, "schedule": {"steps": 4}},
}


def configuration(**changes) -> TrainConfig:
    """The run of these tests, but for some keys."""
    return configure(TrainConfig, CONFIG | changes)


class Stopped(Exception):
    """What a callback raises to interrupt a run."""


def stop_at(iteration):
    """A callback that interrupts a run."""
    def callback(state):
        if state.iteration == iteration:
            raise Stopped
    return callback


def same_bytes(a: Path, b: Path) -> bool:
    """Whether two runs end with the same files."""
    return all((a / n).read_bytes() == (b / n).read_bytes() for n in ("checkpoints/00000012.safetensors", "model.safetensors"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nobody disturbs."""
    run_dir = tmp_path_factory.mktemp("whole")
    train(configuration(), run_dir)
    return run_dir


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 24 MB, or a limit on the size of files where one may not be mounted: a function that says when it is full."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = not subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "small", folder], capture_output=True).returncode
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(room: int) -> None:
        if mounted:
            free = shutil.disk_usage(folder).free
            (folder / "other").write_bytes(b"x" * max(0, free - room))
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))

    def empty() -> None:
        (folder / "other").unlink(missing_ok=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    yield folder, fill, empty
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    if mounted:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.skipif(os.name != "posix", reason="no way to fill a disk here")
def test_disk_full_in_a_checkpoint(whole, small_disk):
    """The disk is full in the middle of a checkpoint: the sentence names the last good one, and with room again the run ends as if nothing had been."""
    disk, fill, empty = small_disk
    run_dir = disk / "run"

    def callback(state):
        if state.iteration == 5:
            fill(checkpoint_files(run_dir)[-1].stat().st_size // 2)

    with pytest.raises(TrainingError, match=r"00000008\.safetensors: the checkpoint cannot be written .*00000004\.safetensors holds the last good state"):
        train(configuration(), run_dir, callback)
    assert [f.name for f in (run_dir / "checkpoints").iterdir()] == ["00000004.safetensors"], "nothing half-written is left"
    assert read_checkpoint(run_dir)[1]["iteration"] == 4
    empty()
    train(configuration(), run_dir)
    assert same_bytes(whole, run_dir)
    assert [e["iteration"] for e in read_log(run_dir)] == [e["iteration"] for e in read_log(whole)]


@pytest.mark.skipif(os.name != "posix", reason="no way to fill a disk here")
def test_disk_full_beside_a_checkpoint(small_disk):
    """Not a byte is left, so that the log cannot be written: the same sentence."""
    disk, fill, empty = small_disk
    run_dir = disk / "run"

    def callback(state):
        if state.iteration == 41:
            fill(0)
            if not (disk / "other").exists():
                pytest.skip("no file system can be mounted here")

    config = configuration(iterations=120, checkpoint_every=40, validate_every=120, log_every=1)
    with pytest.raises(TrainingError, match=r"run: the run cannot be written \(No space left.*00000040\.safetensors holds the last good state"):
        train(config, run_dir, callback)
    empty()
    train(config, run_dir)
    assert [e["iteration"] for e in read_log(run_dir)] == [*range(1, 121), 120], "no entry twice, none half"


def test_a_loader_worker_is_killed(tmp_path):
    """The process that prepares samples dies: a sentence, a checkpoint, and the run goes on from there."""
    def kill(state):
        if state.iteration == 5:
            workers = [p for p in psutil.Process().children(recursive=True) if "spawn_main" in " ".join(p.cmdline())]
            assert workers
            workers[0].kill()

    # enough batches that the worker is still needed: it prepares two ahead
    config = configuration(workers=1, iterations=400, validate_every=400)
    with pytest.raises(TrainingError, match=r"a process that prepares samples died .*lower 'workers'.*holds the last good state"):
        train(config, tmp_path, kill)
    reached = read_checkpoint(tmp_path)[1]["iteration"]
    with pytest.raises(Stopped):
        train(configuration(iterations=400, validate_every=400), tmp_path, stop_at(reached + 2))


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_a_pipe_closes_before_its_process_is_dead(tmp_path, monkeypatch):
    """torch's handler, which speaks up to seconds later, speaks within the sentence, not amid what follows; without it there is a sentence, too."""
    def handler(*_):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    previous = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(TrainingError, match=r"died \(DataLoader worker \(pid 7\) is killed"), _told(tmp_path, 1):
            raise EOFError
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    with pytest.raises(TrainingError, match=r"died \(EOFError\); lower 'workers'"), _told(tmp_path, 1):
        raise EOFError


def test_other_data(tmp_path):
    """Images that changed between a run and its continuation are refused, and so are more of them; the old ones are taken."""
    data = tmp_path / "data"
    for seed in range(3):
        write_image(data / f"{seed}.png", ThermalImage.from_native(render_scene(seed).image))
    config, run_dir = configuration(train=[str(data)]), tmp_path / "run"
    with pytest.raises(Stopped):
        train(config, run_dir, stop_at(6))
    first = (data / "0.png").read_bytes()
    write_image(data / "0.png", ThermalImage.from_native(render_scene(77).image))
    sentence = r"00000004\.safetensors: the images in .*data are not those of its start; put them back, or use a new folder"
    with pytest.raises(TrainingError, match=sentence):
        train(config, run_dir)
    (data / "0.png").write_bytes(first)
    write_image(data / "9.png", ThermalImage.from_native(render_scene(9).image))
    with pytest.raises(TrainingError, match=sentence):
        train(config, run_dir)
    (data / "9.png").unlink()
    train(config, run_dir)
    assert read_checkpoint(run_dir)[1]["iteration"] == 12


def test_another_configuration(whole):
    """What decides the result may not change, what does not may."""
    with pytest.raises(TrainingError, match=r"00000012\.safetensors: the run was started with another 'ema' \(0\.999\); use a new folder"):
        train(configuration(ema=0.9), whole)
    before = (whole / "model.safetensors").read_bytes()
    train(configuration(log_every=5, checkpoints_kept=1), whole)
    assert (whole / "model.safetensors").read_bytes() == before


def test_another_version_of_the_code(tmp_path, monkeypatch):
    """A run goes on under other code with a warning in its log, said once."""
    config = configuration(log_every=100)
    with monkeypatch.context() as patch:
        patch.setattr("difiisr_dwt.training.code_version", lambda: "0.0.9+0123456789ab, torch 2.0")
        with pytest.raises(Stopped):
            train(config, tmp_path, stop_at(6))
    for iteration in (6, 10):  # killed before another checkpoint, then after one
        with pytest.raises(Stopped):
            train(config, tmp_path, stop_at(iteration))
    train(config, tmp_path)
    warnings = [e for e in read_log(tmp_path) if "warning" in e]
    assert [w["iteration"] for w in warnings] == [4], warnings
    assert "00000004.safetensors was written by 0.0.9+0123456789ab" in warnings[0]["warning"]


def test_what_a_checkpoint_holds(whole):
    """Weights, average, moments, scaler, iteration, configuration, code and data; what is a function of the iteration is not kept."""
    _, header, tensors = read_checkpoint(whole)
    names = set(part(tensors, "model"))
    trained = set(part(tensors, "average"))
    assert trained and trained <= names
    for moment in ("exp_avg", "exp_avg_sq", "step"):
        assert set(part(tensors, f"optimizer.{moment}")) == trained
    assert set(header) == {"iteration", "best", "config", "data", "code", "scaler", "cpu_seconds"}
    assert header["iteration"] == 12 and header["config"]["iterations"] == 12 and len(header["data"]) == 16
    assert header["code"].startswith("0.") and "torch" in header["code"]


def test_the_last_and_the_best_are_kept(tmp_path, monkeypatch):
    """The last K checkpoints; and the best by the stated metric, with the moving average of its own iteration."""
    scores = iter([(30.0, 0.5), (31.0, 0.6), (29.0, 0.2), (28.0, 0.3)])  # psnr_1, lpips_all

    def validate(*_, **__):
        psnr, lpips = next(scores)
        return {"psnr_1": psnr, "psnr_all": psnr, "lpips_1": lpips, "lpips_all": lpips}

    averages = {}

    def callback(state):
        averages[state.iteration] = {k: v.clone() for k, v in state.average.items()}

    monkeypatch.setattr("difiisr_dwt.training.validate", lambda *a, **k: (Path(a[4]).write_bytes(PICTURE), validate())[1])
    config = configuration(best="lpips_all", validate_every=3, checkpoint_every=2, checkpoints_kept=3)
    kept = train(config, tmp_path, callback)
    assert [f.stem[-2:] for f in checkpoint_files(tmp_path)] == ["08", "10", "12"]
    best = json.loads((tmp_path / "best.json").read_text())
    assert best["iteration"] == 9 and best["best"] == "lpips_all" and kept["lpips_all"] == 0.2
    weights = load_file(tmp_path / "model.safetensors")
    assert averages[9].keys() <= weights.keys() and all(weights[k].equal(v) for k, v in averages[9].items())
    assert not all(weights[k].equal(v) for k, v in averages[12].items())
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["difiisr_dwt"])["info"]["best"] == "lpips_all"


def _picture() -> bytes:
    """A small PNG."""
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    return buffer.getvalue()


PICTURE = _picture()


def test_warnings_are_said_once(tmp_path):
    """A term that drowns the MSE is named once, interrupted or not."""
    config = configuration(terms={"charbonnier": 1000.0}, log_every=2)
    train(config, tmp_path / "whole")
    with pytest.raises(Stopped):
        train(config, tmp_path / "stopped", stop_at(7))
    train(config, tmp_path / "stopped")
    logs = [[(e["iteration"], e.get("warning")) for e in read_log(tmp_path / name)] for name in ("whole", "stopped")]
    assert logs[0] == logs[1] and sum(w is not None for _, w in logs[0]) == 1


def test_tensorboard_shows_the_run(whole):
    """The event files hold the loss, the validation metrics and the strips of the run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(whole / "tensorboard"))
    board.Reload()
    losses = {e.step: e.value for e in board.Scalars("loss")}
    logged = {e["iteration"]: e["loss"] for e in read_log(whole) if "loss" in e}
    assert losses == pytest.approx(logged, rel=1e-6) and set(losses) == {2, 4, 6, 8, 10, 12}
    assert [e.step for e in board.Scalars("psnr_1")] == [12] and [e.step for e in board.Images("validation")] == [12]


def test_signals_and_kills_leave_no_half_written_files(tmp_path):
    """What a killed process had begun to write goes when the run goes on; files of others stay."""
    (tmp_path / "checkpoints").mkdir()
    half = [tmp_path / "checkpoints" / ".00000004-123-0123abcd.safetensors", tmp_path / ".model-123-0123abcd.safetensors"]
    other = tmp_path / ".my-own-notes.txt"
    for file in [*half, other]:
        file.write_text("x")
    with pytest.raises(Stopped):
        train(configuration(), tmp_path, stop_at(1))
    assert not any(f.exists() for f in half) and other.exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "handlers are put back"
