"""The command line with real processes: bad input, names of results, interruptions, exit codes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from difiisr_dwt import cli, models, pipeline
from difiisr_dwt.images import read_image
from difiisr_dwt.models import ModelConfig, NetworkConfig, RestorationModel, save_model
from difiisr_dwt.pipeline import SuperResolver


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A run folder with a model that changes the picture, as zero-initialized ends would not."""
    torch.manual_seed(0)
    model = RestorationModel(ModelConfig(network=NetworkConfig(channels=(16, 24), blocks=1)), sigma=torch.full((16,), 0.03))
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("run")
    save_model(folder / "model.safetensors", model)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The working directory, empty."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(*words):
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    command = [sys.executable, "-m", "difiisr_dwt.cli", *map(str, words)]
    return subprocess.Popen(
        command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=(lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) if os.name == "posix" else None,  # ignored in the background
    )


def difiisr(*words):
    """Exit code, stdout, lines of stderr of a process of its own."""
    process = start(*words)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err.splitlines()


def frame(height=10, width=12, seed=0):
    return (100 + 5 * np.add.outer(np.arange(height) % 7, np.arange(width) % 5) + seed).astype(np.uint8)


def save(path, array=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    array = frame() if array is None else array
    if path.suffix in (".tif", ".tiff"):
        tifffile.imwrite(path, array)
    else:
        Image.fromarray(array).save(path)
    return path


def files(folder):
    """Every file below a folder, hidden ones too."""
    return sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if p.is_file())


# bad input


def test_bad_files_cost_a_sentence_each(here, model):
    good = [save(here / "in/good.png"), save(here / "in/sub/odd.png", frame(7, 5)), save(here / "in/one.png", frame(1, 1))]
    noise = np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)
    data = {suffix: save(here / f"whole{suffix}", noise).read_bytes() for suffix in (".png", ".jpg", ".tif")}
    for suffix, whole in data.items():
        (here / f"in/truncated{suffix}").write_bytes(whole[: len(whole) // 2])
    (here / "in/text.png").write_text("no image")
    (here / "in/empty.tif").touch()
    (here / "in/zero.png").write_bytes(data[".png"][:16] + bytes(8) + data[".png"][24:])
    save(here / "in/colour.png", np.stack([frame(), frame(seed=40), frame(seed=80)], -1))
    save(here / "in/blocked.png")
    (here / "out/in/blocked.png").mkdir(parents=True)
    (here / "nothing").mkdir()
    save(here / "in/taken/a.png")
    (here / "out/in/taken").touch()
    bad = ["truncated.png", "truncated.jpg", "truncated.tif", "text.png", "empty.tif", "zero.png", "colour.png",
           "blocked.png", "out/in/taken", "nothing", "missing.png"]  # fmt: skip
    code, out, err = difiisr("upscale", "missing.png", "in", "nothing", "--out", "out", "--model", model)
    assert code == 2 and out.splitlines()[-1] == f"{len(good)} done, {len(bad)} failed", err
    assert len(err) == len(bad) and all(line.startswith("difiisr: cannot ") and "; " in line for line in err), err
    for name in bad:
        assert sum(name in line for line in err) == 1, (name, err)
    assert files(here / "out/in") == ["good.png", "one.png", "sub/odd.png", "taken"]


@pytest.mark.parametrize("out", ["file", "file/below", pytest.param("/proc/nothing", marks=pytest.mark.skipif(
    not Path("/proc/self").exists(), reason="no /proc"))])  # fmt: skip
def test_unwritable_folder(here, out):
    save(here / "a.png")
    (here / "file").touch()
    code, stdout, err = difiisr("upscale", "a.png", "--out", out)
    assert code == 2 and len(err) == 1 and out in err[0] and "--out" in err[0] and not stdout


def test_read_only_folder(here):
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    save(here / "a.png")
    (here / "out").mkdir(mode=0o500)
    code, _, err = difiisr("upscale", "a.png", "--out", "out")
    assert code == 2 and len(err) == 1 and "out" in err[0]


def test_nothing_to_do(here):
    (here / "empty").mkdir()
    code, out, err = difiisr("upscale", "empty", "none.png", "--out", "out")
    assert code == 2 and out == "0 done, 2 failed\n" and len(err) == 2 and not (here / "out").exists()


@pytest.mark.parametrize(("words", "said"), [
    (["upscale", "a.png"], "--out"), (["upscale", "a.png", "--out", "o", "--steps", "0"], "--steps"),
    (["upscale", "a.png", "--out", "o", "--seed", "-1"], "--seed"), (["upscale", "a.png", "--out", "o", "--step"], "--step"),
    (["sharpen"], "upscale"), ([], "COMMAND"), (["upscale", "--out", "o"], "IN"),
])  # fmt: skip
def test_usage(words, said):
    code, out, err = difiisr(*words)
    assert code == 2 and not out and len(err) == 1 and said in err[0]


@pytest.mark.parametrize(("words", "said"), [
    (["--steps", "16"], "1 to 15"), (["--model", "compakt"], "did you mean 'compact'"), (["--model", "x.safetensors"], "x.safetensors"),
    (["--model", "a.png"], "a.png"), (["--sampler", "dim"], "'ddim'"), (["--tile", "9"], "at least 64"), (["--device", "abacus"], "abacus"),
])  # fmt: skip
def test_impossible_requests(here, model, monkeypatch, capsys, words, said):
    monkeypatch.setattr(models, "available_models", lambda: {"compact": model / "model.safetensors"})
    save(here / "a.png")
    assert cli.main(["upscale", "a.png", "--out", "out", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("difiisr: ") and said in line and not files(here / "out")


def test_faults(here, model, monkeypatch, capsys):
    """A fault of ours is 1 and shows where; too little memory is the user's to cure. The others are done."""
    for name in "abc":
        save(here / f"in/{name}.png")
    whole, failures = SuperResolver.upscale_image, [RuntimeError("surprise"), MemoryError()]

    def sometimes(self, image, **options):
        if failures:
            raise failures.pop(0)
        return whole(self, image, **options)

    monkeypatch.setattr(SuperResolver, "upscale_image", sometimes)
    assert cli.main(["upscale", "in", "--out", "out", "--model", str(model)]) == 1
    out, err = capsys.readouterr()
    assert out == "1 done, 2 failed\n" and files(here / "out") == ["c.png"]
    assert "surprise" in err and "Traceback" in err and "b.png: it does not fit into memory" in err
    failures.append(MemoryError())
    assert cli.main(["upscale", "in", "--out", "out", "--model", str(model)]) == 2


# results


def test_formats_and_names(here, model):
    counts = frame().astype(np.uint16) * 3 + 7000
    kelvin = frame().astype(np.float32) / 10 + 280
    kelvin[2, 3] = np.nan
    for name, array in {"a.png": None, "a.jpg": None, "b.jpg": None, "c.bmp": None, "d.tif": None, "day/a.png": frame(5, 9),
                        "e.png": counts, "f.tiff": counts, "g.tif": kelvin, "h.001.png": None, "h.002.png": None}.items():
        save(here / "in" / name, array)
    before = {name: (here / "in" / name).read_bytes() for name in files(here / "in")}
    code, out, err = difiisr("upscale", "in", "--out", "out/new", "--model", model, "--steps", "2", "--seed", "7")
    assert code == 0 and out == "11 done, 0 failed\n" and not err
    assert files(here / "out/new") == ["a.jpg.png", "a.png", "b.png", "c.png", "d.png", "day/a.png", "e.png", "f.tiff", "g.tif",
                                       "h.001.png", "h.002.png"]  # fmt: skip
    assert before == {name: (here / "in" / name).read_bytes() for name in files(here / "in")}
    resolver = SuperResolver.from_pretrained(model, device="cpu")
    for name in ("a.png", "day/a.png", "e.png", "f.tiff", "g.tif"):
        source, result = read_image(here / "in" / name), read_image(here / "out/new" / name)
        expected = resolver.upscale(source.native(), steps=2, seed=7)
        assert result.dtype == source.dtype and result.native().shape == tuple(4 * n for n in source.pixels.shape)
        np.testing.assert_allclose(result.native().astype(float), expected, atol=1, equal_nan=True)


def test_counts_score_as_grey_levels(here, model):
    lr = frame(30, 40)
    save(here / "eight.png", lr)
    save(here / "sixteen.png", lr.astype(np.uint16) + 7000)
    assert cli.main(["upscale", "eight.png", "sixteen.png", "--out", "out", "--model", str(model)]) == 0
    eight, sixteen = (read_image(here / "out" / name).native().astype(int) for name in ("eight.png", "sixteen.png"))
    hr = lr.repeat(4, 0).repeat(4, 1)
    values = [10 * np.log10(255**2 / np.mean((sr - hr) ** 2.0)) for sr in (eight, sixteen - 7000)]
    assert abs(values[0] - values[1]) < 0.1


def test_every_input_has_a_result_of_its_own(here, model):
    sources = {"x/a.png": 0, "x/a-2.png": 10, "y/a.png": 20, "y/A.jpeg": 30, "y/a.jpg": 40, "y/a.jpg.png": 50}
    for name, seed in sources.items():
        save(here / name, frame(seed=seed))
    assert cli.main(["upscale", *sources, "x/a.png", "--out", "out", "--model", str(model)]) == 0
    written = files(here / "out")
    assert len(written) == len(sources)
    levels = sorted(round(read_image(here / "out" / name).native().mean() / 10) for name in written)
    assert levels == sorted({round(frame(seed=s).mean() / 10) for s in sources.values()}), "none is another's"


def test_several_folders_keep_their_names(here, model, capsys):
    save(here / "day/1.png"), save(here / "night/1.png")
    assert cli.main(["upscale", "day", "night/", "--out", "out", "--model", str(model)]) == 0
    assert files(here / "out") == ["day/1.png", "night/1.png"]


def test_earlier_results_are_replaced_and_not_read(here, model):
    save(here / "1.png"), save(here / "sub/2.png")
    for steps in ("1", "2"):
        assert cli.main(["upscale", ".", "--out", "sharp", "--model", str(model), "--steps", steps]) == 0
        assert files(here / "sharp") == ["1.png", "sub/2.png"]
    expected = SuperResolver.from_pretrained(model, device="cpu").upscale(frame(), steps=2)
    assert np.array_equal(read_image(here / "sharp/1.png").native(), expected)


def test_never_over_an_input(here, model, capsys):
    save(here / "in/a.png"), save(here / "in/b.jpg")
    before = (here / "in/a.png").read_bytes()
    assert cli.main(["upscale", "in", "--out", "in", "--model", str(model)]) == 2
    assert files(here / "in") == ["a.png", "b.jpg", "b.png"] and (here / "in/a.png").read_bytes() == before
    assert "it is an input" in capsys.readouterr().err


# interruptions


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted(here, model, number, expected):
    for i in range(300):
        save(here / f"in/{i:03d}.png", frame(60, 70, seed=i % 50))
    process = start("upscale", "in", "--out", "out", "--model", model, "--steps", "15")
    deadline = time.monotonic() + 60
    while len(list((here / "out").glob("[0-9]*.png"))) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == expected and "Traceback" not in err, err
    done = files(here / "out")
    counted = int(out.split()[0])  # the last may have been renamed, and not counted yet
    assert 3 <= len(done) < 300 and len(done) - 1 <= counted <= len(done) and out.endswith("done, 0 failed\n")
    for name in done:
        assert read_image(here / "out" / name).pixels.shape == (240, 280), "nothing half-written, nothing hidden left"


# the rest


def test_help_does_not_wait_for_torch():
    code = ("import sys; from difiisr_dwt.cli import main\ntry: main(['--help'])\n"
            "finally: sys.exit(bool({'torch', 'numpy', 'papermill'} & set(sys.modules)))")
    env = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[1])}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert run.returncode == 0 and all(name in run.stdout for name in cli.COMMANDS)


def test_version_and_help():
    assert difiisr("--version")[1] == f"difiisr {cli.difiisr_dwt.__version__}\n"
    code, out, _ = difiisr("upscale", "--help")
    assert code == 0 and f"(default: {pipeline.TILE})" in " ".join(out.split()), "the default that the help tells"


def test_run_and_report_pass_on(here, capsys):
    assert cli.main(["run", "none.yaml", "--set", "a=1", "--root", "r"]) == 2
    assert cli.main(["report", "--root", "r"]) == 2
    assert all(line.startswith("difiisr") for line in capsys.readouterr().err.splitlines())
