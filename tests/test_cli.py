"""The command line with real processes: bad input, names of results, interruptions, exit codes."""

import dataclasses
import json
import os
import shutil
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
from scipy.ndimage import gaussian_filter

from difiisr_dwt import cli, models
from difiisr_dwt.batch import RECORDS
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


def start(*words, stdin=subprocess.DEVNULL, text=True):
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    command = [sys.executable, "-m", "difiisr_dwt.cli", *map(str, words)]
    return subprocess.Popen(
        command, env=env, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=text,
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
    """Every file below a folder, hidden ones too, but for the note of what is finished."""
    return sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if p.is_file() and p.name != RECORDS)


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


@pytest.fixture
def disk(here):
    """A function that makes a folder `disk`, of so many kB or read-only, where file systems may be mounted."""
    mounted = []

    def make(options):
        (here / "disk").mkdir(exist_ok=True)
        if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", here / "disk"], capture_output=True).returncode:
            pytest.skip("no file system can be mounted here")
        mounted.append(here / "disk")

    yield make
    for folder in mounted:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="mounts of Linux")
def test_read_only_folder(here, disk, model):
    """Of a user without rights, or of a disk; the results and the summary."""
    save(here / "a.png")
    disk("ro")
    for out in ("disk", "disk/new"):
        code, _, err = difiisr("upscale", "a.png", "--out", out, "--model", model)
        assert code == 2 and len(err) == 1 and "Read-only" in err[0] and "--out" in err[0]
    code, out, err = difiisr("upscale", "a.png", "--out", "out", "--model", model, "--json", "disk/s.json")
    assert code == 2 and len(err) == 1 and "Read-only" in err[0] and files(here / "out") == ["a.png"]


@pytest.mark.skipif(sys.platform != "linux", reason="mounts of Linux")
def test_full_disk(here, disk, model):
    """What still fits is done and whole; the others are a sentence each, and done by the same command when there is room."""
    noise = np.random.default_rng(0).integers(0, 255, (30, 40), dtype=np.uint8)
    for name in ("a", "b", "d", "e"):
        save(here / f"in/{name}.png", noise)
    save(here / "in/z.png", frame(1, 1))
    disk("size=56k")
    words = ["upscale", "in", "--out", "disk/out", "--model", model]
    code, out, err = difiisr(*words)
    done = files(here / "disk/out")
    assert code == 2 and out == f"{len(done)} done, {5 - len(done)} failed\n" and 1 <= len(done) < 5 and "z.png" in done
    assert len(err) == 5 - len(done) and all("No space left" in line for line in err), err
    assert all(read_image(here / "disk/out" / f).pixels.size for f in done)
    subprocess.run(["mount", "-o", "remount,size=9m", here / "disk"], check=True)
    code, out, _ = difiisr(*words)
    assert code == 0 and out.endswith("skipped, 0 failed\n") and len(files(here / "disk/out")) == 5


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
    (["--model", "a.png"], "a.png"), (["--sampler", "dim"], "'ddim'"), (["--temperature", "-1"], "from 0 to 2"),
    (["--tile", "9"], "at least 64"), (["--device", "abacus"], "abacus"),
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
@pytest.mark.parametrize(("number", "expected", "jobs"), [(signal.SIGINT, 130, 1), (signal.SIGTERM, 143, 1), (signal.SIGINT, 130, 2)])
def test_interrupted(here, model, number, expected, jobs):
    for i in range(300):
        save(here / f"in/{i:03d}.png", frame(60, 70, seed=i % 50))
    process = start("upscale", "in", "--out", "out", "--model", model, "--steps", "15", "--jobs", jobs)
    deadline = time.monotonic() + 60
    while len(list((here / "out").glob("[0-9]*.png"))) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == expected and "Traceback" not in err, err
    done = files(here / "out")
    counted = int(out.split()[0])  # the last may have been renamed, and not counted yet
    assert 3 <= len(done) < 300 and len(done) - jobs <= counted <= len(done) and out.endswith("done, 0 failed\n")
    for name in done:
        assert read_image(here / "out" / name).pixels.shape == (240, 280), "nothing half-written, nothing hidden left"
    shutil.rmtree(here / "in")
    for i in range(5):
        save(here / f"in/{i:03d}.png", frame(60, 70, seed=i))
    code, out, _ = difiisr("upscale", "in", "--out", "out", "--model", model, "--steps", "15", "--jobs", jobs)
    assert code == 0 and " skipped, 0 failed" in out, "the same command goes on"


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
    assert code == 0 and "256 (default: auto)" in " ".join(out.split()), "the default that the help tells"


def test_run_and_report_pass_on(here, capsys):
    assert cli.main(["run", "none.yaml", "--set", "a=1", "--root", "r"]) == 2
    assert cli.main(["report", "--root", "r"]) == 2
    assert all(line.startswith("difiisr") for line in capsys.readouterr().err.splitlines())


# what a batch takes and leaves


def rows(path):
    """State by name of input in a summary."""
    return {Path(row["source"]).name: row["state"] for row in json.loads(Path(path).read_text())["files"]}


def test_standard_input_and_output(here, model):
    """Bytes in, bytes out, and nothing else; a mistake leaves standard output empty."""
    save(here / "a.png"), save(here / "k.tif", frame().astype(np.float32) / 10)
    assert difiisr("upscale", "a.png", "k.tif", "--out", "out", "--model", model)[0] == 0
    for name in ("a.png", "k.tif"):
        process = start("upscale", "-", "--out", "-", "--model", model, stdin=(here / name).open("rb"), text=False)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0 and out == (here / "out" / name).read_bytes() and not err
    for words, data in ((["-"], b"no image"), (["-", "a.png"], b""), (["-", "-"], b""), (["-", "--preview", "iron"], b"")):
        (here / "data").write_bytes(data)
        process = start("upscale", *words, "--out", "-", "--model", model, stdin=(here / "data").open("rb"), text=False)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 2 and not out and len(err.splitlines()) == 1, (words, err)


def test_reader_of_standard_output_goes_away(here, model):
    save(here / "a.png", np.random.default_rng(0).integers(0, 255, (90, 90), dtype=np.uint8))  # more than a pipe holds
    process = start("upscale", "a.png", "--out", "-", "--model", model, text=False)
    process.stdout.close()
    assert process.wait(120) == 141 and b"Traceback" not in process.stderr.read()


def test_finished_results_are_skipped(here, model, capsys):
    """Another input, other parameters, a result that changed or went, and --overwrite make it again; nothing else does."""
    for name in "abc":
        save(here / f"in/{name}.png")
    words = ["upscale", "in", "--out", "out", "--model", str(model), "--json", "s.json"]

    def made(*more):
        assert cli.main([*words, *more]) == 0
        return "".join(sorted(name[0] for name, state in rows("s.json").items() if state == "done"))

    assert made() == "abc" and made() == ""
    assert capsys.readouterr().out.splitlines()[-1] == "0 done, 3 skipped, 0 failed"
    save(here / "in/a.png", frame(seed=9))
    (here / "out/b.png").write_bytes(b"half")
    os.utime(here / "in/c.png")  # the same bytes
    assert made() == "ab" and made("--steps", "2") == "abc" and made("--steps", "2") == "" and made("--steps", "2", "--overwrite") == "abc"
    (here / "out/c.png").unlink()
    (here / "out" / RECORDS).write_bytes((here / "out" / RECORDS).read_bytes()[:-7] + b'\n[1]\n"x"\n{}\n{"resul')  # killed while it wrote
    assert made("--steps", "2") == "c" and made("--steps", "2") == ""
    (here / "out" / RECORDS).unlink()
    assert made("--steps", "2") == "abc"


def test_dry_run_writes_nothing(here, model, capsys):
    save(here / "in/a.png"), save(here / "in/line\nbreak.png")
    (here / "in/bad.png").touch()
    assert cli.main(["upscale", "in", "--out", "new/out", "--model", str(model), "--dry-run"]) == 2
    out, err = capsys.readouterr()
    assert out.splitlines() == ["in/a.png -> new/out/a.png", r"in/line\nbreak.png -> new/out/line\nbreak.png", "2 to do, 1 failed"]
    assert len(err.splitlines()) == 1 and not (here / "new").exists()


def test_jobs_change_nothing_but_time(here, model, capsys):
    """Same names, same bytes, same order of precedence, whatever is done at once."""
    for k in range(7):
        save(here / f"in/{k}.png", frame(40 - 5 * k, 30, seed=k))
    save(here / "in/3.jpg"), save(here / "in/k.tif", frame().astype(np.float32) / 7)
    (here / "in/4.tif").write_bytes(b"no image")
    for jobs in ("1", "2", "5"):
        assert cli.main(["upscale", "in", "--out", f"out{jobs}", "--model", str(model), "--jobs", jobs, "--threads", "1", "--json", f"{jobs}.json"]) == 2
        assert rows(f"{jobs}.json") == rows("1.json")
        assert files(here / f"out{jobs}") == files(here / "out1")
        assert all((here / f"out{jobs}" / f).read_bytes() == (here / "out1" / f).read_bytes() for f in files(here / "out1"))


def test_preview_beside_results(here, model):
    """16 bits stay, and beside them are 8 in colours; another palette does not up-scale again."""
    save(here / "a.tif", frame().astype(np.uint16) * 3 + 7000), save(here / "a.preview.png")
    words = ["upscale", "a.tif", "a.preview.png", "--out", "out", "--model", str(model)]
    assert cli.main([*words, "--preview", "iron"]) == 0
    assert files(here / "out") == ["a.preview-2.png", "a.preview-2.preview.png", "a.preview.png", "a.tif"], "no result is lost to a preview"
    first = read_image(here / "out/a.tif").native()
    with Image.open(here / "out/a.preview.png") as picture:
        assert first.dtype == np.uint16 and picture.mode == "RGB" and picture.size == (48, 40)
        iron = picture.tobytes()
    before = (here / "out/a.tif").stat().st_mtime_ns
    assert cli.main([*words, "--preview", "black-hot"]) == 0 and (here / "out/a.tif").stat().st_mtime_ns == before
    with Image.open(here / "out/a.preview.png") as picture:
        assert picture.mode == "L" and picture.tobytes() != iron


def test_single_file_out(here, model):
    save(here / "a.png"), save(here / "b.png")
    assert cli.main(["upscale", "a.png", "--out", "new/sharp.png", "--model", str(model)]) == 0 and files(here / "new") == ["sharp.png"]
    assert cli.main(["upscale", "a.png", "b.png", "--out", "sharp.png", "--model", str(model)]) == 2
    assert cli.main(["upscale", "a.png", "--out", "a.png", "--model", str(model)]) == 2 and read_image(here / "a.png").pixels.shape == (10, 12)


def test_scale_of_the_model(here, model, capsys):
    save(here / "a.png")
    assert cli.main(["upscale", "a.png", "--out", "out", "--model", str(model), "--scale", "4"]) == 0
    assert cli.main(["upscale", "a.png", "--out", "out2", "--model", str(model), "--scale", "3"]) == 2
    assert "enlarges 4 times" in capsys.readouterr().err and not files(here / "out2")


@pytest.mark.skipif(os.name != "posix", reason="links, and names that Windows refuses")
def test_odd_names_links_and_shapes(here, model, capsys):
    """Each is done, or costs its sentence on one line."""
    odd = ["space here.png", "new\nline.png", "ünï 温度.png", "-x.png", "bell\a.png", os.fsdecode(b"latin\xe9.png"), "[1]*.png"]
    for name in odd:
        save(here / "in" / name)
    save(here / "in/one.png", frame(1, 1)), save(here / "in/long.png", np.tile(frame(1, 10), (1, 1000)))
    save(here / "in/flat.png", np.full((9, 9), 7, np.uint8))
    (here / "in/broken.png").symlink_to("nowhere.png")
    (here / "in/loop.png").symlink_to("loop.png")
    (here / "in/link.png").symlink_to("one.png")
    assert cli.main(["upscale", "in", "in/broken.png", "in/loop.png", "--out", "out", "--model", str(model)]) == 2
    out, err = capsys.readouterr()
    assert out == f"{len(odd) + 4} done, 2 failed\n" and len(err.splitlines()) == 2
    assert files(here / "out") == sorted([*odd, "one.png", "long.png", "flat.png", "link.png"])
    assert read_image(here / "out/long.png").pixels.shape == (4, 40000) and np.median(read_image(here / "out/flat.png").native()) == 7


def test_files_that_vanish(here, model, monkeypatch, capsys):
    for name in "abcd":
        save(here / f"in/{name}.png")
    whole = SuperResolver.upscale_image

    def and_gone(self, image, **options):
        (here / "in/c.png").unlink(missing_ok=True)
        return whole(self, image, **options)

    monkeypatch.setattr(SuperResolver, "upscale_image", and_gone)
    assert cli.main(["upscale", "in", "--out", "out", "--model", str(model)]) == 2
    out, err = capsys.readouterr()
    assert out == "3 done, 1 failed\n" and files(here / "out") == ["a.png", "b.png", "d.png"] and "c.png: there is no such file" in err


def test_more_than_memory_holds(here, model, capsys):
    """A small file of many pixels is refused in time, rather than ended by the system."""
    (here / "bomb.png").write_bytes(zeros_png(9000, 9900))
    save(here / "a.png")
    import psutil

    if psutil.virtual_memory().available > 28 * 16 * 9000 * 9900:
        pytest.skip("memory enough")
    assert cli.main(["upscale", "bomb.png", "a.png", "--out", "out", "--model", str(model)]) == 2
    assert "GB of memory" in capsys.readouterr().err and files(here / "out") == ["a.png"]


def zeros_png(width, height):
    """A PNG of nothing, compressed a thousand times."""
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(1)
    rows = b"".join(packer.compress(bytes(width + 1)) for _ in range(height)) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_completion_knows_the_words(capsys):
    for shell in ("bash", "zsh", "tcsh"):
        assert cli.main(["completion", shell]) == 0
        script = capsys.readouterr().out
        assert "--preview" in script and "doctor" in script
        if shell == "bash" and shutil.which("bash"):
            ask = "COMP_WORDS=(difiisr upscale --preview ir); COMP_CWORD=3; _shtab_difiisr; echo ${COMPREPLY[@]}"
            assert subprocess.run(["bash", "-c", script + ask], capture_output=True, text=True).stdout.split() == ["iron"]


# films


@pytest.fixture
def film(here):
    """A film of nine frames at 30000/1001 per second, 16 bits, and one that players know, with sound."""
    if not shutil.which("ffmpeg"):
        pytest.skip("no ffmpeg")
    scene = np.add.outer(np.arange(32) * 3, np.arange(96))
    frames = [np.ascontiguousarray(scene[:, 3 * k:3 * k + 48]) for k in range(9)]
    for name, layout, dtype, more in (("y16.mkv", "gray16le", "<u2", ["-c:v", "ffv1"]), ("walk.mp4", "gray", "u1", ["-pix_fmt", "yuv420p", "-c:a", "aac"])):
        data = b"".join((f + (7000 if dtype == "<u2" else 20)).astype(dtype).tobytes() for f in frames)
        sound = ["-f", "lavfi", "-i", "sine=duration=0.3"] if name == "walk.mp4" else []
        subprocess.run(["ffmpeg", "-v", "error", "-f", "rawvideo", "-pix_fmt", layout, "-s", "48x32", "-r", "30000/1001", "-i", "-", *sound, *more, name],
                       input=data, check=True)  # fmt: skip
    return frames


def test_films(here, model, film, capsys):
    """Every frame, the rate, the counts; the frames share a range, so that what stands still does not flicker."""
    from difiisr_dwt.video import probe_video, read_frames, video_range

    assert cli.main(["upscale", "*.m[kp]*", "--out", "out", "--model", str(model)]) == 0
    assert files(here / "out") == ["walk.mp4", "y16.mkv"]
    resolver = SuperResolver.from_pretrained(model, device="cpu")
    for name in ("walk.mp4", "y16.mkv"):
        source, result = probe_video(name), probe_video(here / "out" / name)
        assert (result.width, result.height, result.rate) == (192, 128, source.rate)
        low = list(read_frames(source))
        high, shared = list(read_frames(result)), video_range(source)[0]
        expected = [resolver.upscale(f, value_range=shared) for f in low]
        assert len(low) == len(high) == 9
        difference = np.abs(np.stack(high).astype(int) - np.stack(expected))
        assert (difference.max() <= 1) if name == "y16.mkv" else (difference.mean() < 2)
    sound = subprocess.run(["ffprobe", "-v", "error", "-select_streams", "a", "-show_entries", "stream=codec_name", "-of", "csv=p=0", "out/walk.mp4"],
                           capture_output=True, text=True).stdout  # fmt: skip
    assert sound.strip() == "aac"
    assert cli.main(["upscale", "y16.mkv", "--out", "out", "--model", str(model)]) == 0 and "1 skipped" in capsys.readouterr().out


@pytest.mark.parametrize("likely, found", [([0.0, 0.0], None), ([3.0, 0.0], "bicubic")])
def test_the_kernel_is_looked_for_once(here, film, monkeypatch, likely, found):
    """In the first frame of a film or a sequence, and once for all samples, also where it stays unclear: frames differ by nothing else."""
    unclear = RestorationModel(ModelConfig(network=NetworkConfig(channels=(16, 24), blocks=1), kernels=("bicubic", "sensor"), find_kernel=True),
                               sigma=torch.full((16,), 0.03))
    unclear.finder.last.weight.data.zero_()
    unclear.finder.last.bias.data = torch.tensor(likely)
    save_model("finds.safetensors", unclear)
    looks, heard = [], []
    look, restore = RestorationModel.find_kernel, RestorationModel.restore
    monkeypatch.setattr(RestorationModel, "find_kernel", lambda *given: looks.append(1) or look(*given))
    monkeypatch.setattr(RestorationModel, "restore", lambda *given, **named: heard.append(named["kernel"]) or restore(*given, **named))
    for i in range(3):
        save(here / f"in/{i}.png", frame(seed=i))
    asked = {"y16.mkv": 1, "in --sequence": 1, "in": 3, "in/0.png --steps 2 --samples 3": 1, "in --kernel unclear": 0, "in --kernel bicubic": 0}
    for words, times in asked.items():
        looks.clear(), heard.clear()
        assert cli.main(["upscale", *words.split(), "--model", "finds.safetensors", "--out", f"out{len(words)}", "--json", "told.json"]) == 0
        rows = json.loads(Path("told.json").read_text())["files"]
        said = words.rpartition("--kernel ")[2] if "--kernel" in words else found or "unclear"
        assert len(looks) == times and set(heard) == {said}, words
        assert {row.get("kernel_found") for row in rows} == {None if "--kernel" in words else found}, words


def test_films_that_cannot_be(here, model, film, monkeypatch, capsys):
    """Cut off, in colour, 16 bits into H.264, no ffmpeg: a sentence, and nothing written."""
    whole = (here / "y16.mkv").read_bytes()
    (here / "cut.mkv").write_bytes(whole[: len(whole) // 2])
    (here / "empty.mp4").touch()
    subprocess.run("ffmpeg -v error -f lavfi -i testsrc=duration=1:size=64x48:rate=5 -pix_fmt yuv420p colour.mp4".split(), check=True)
    for name, out, said in (("cut.mkv", "out", "copy or export it again"), ("empty.mp4", "out", "no video"), ("colour.mp4", "out", "coloured"),
                            ("y16.mkv", "a.mp4", ".mkv"), ("walk.mp4", "-", "a file"), ("none.mp4", "out", "no such file")):  # fmt: skip
        assert cli.main(["upscale", name, "--out", out, "--model", str(model)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line and not files(here / "out") and not (here / "a.mp4").exists(), line
    monkeypatch.setenv("PATH", str(here))
    assert cli.main(["upscale", "walk.mp4", "--out", "out", "--model", str(model)]) == 2
    assert "install ffmpeg" in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_interrupted_film(here, model, film):
    data = b"".join(np.full((64, 64), k % 256, np.uint8).tobytes() for k in range(3000))
    subprocess.run("ffmpeg -v error -f rawvideo -pix_fmt gray -s 64x64 -r 30 -i - -c:v ffv1 long.mkv".split(), input=data, check=True)
    process = start("upscale", "long.mkv", "--out", "out", "--model", model, "--steps", "3")
    until = time.monotonic() + 60
    while not files(here / "out") and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err and not files(here / "out")


# fuzz


def test_fuzz():
    """300 damaged and whole files; tests/fuzz_images.py has thousands."""
    from fuzz_images import fuzz

    numbers, wrong = fuzz(300, seed=int(os.environ.get("DIFIISR_FUZZ_SEED", 7)), per_folder=150)
    assert not wrong, "\n".join(wrong)
    assert numbers["whole done"] == numbers["whole"] > 30 and numbers["failed"] > 100


def test_samples_their_mean_and_how_they_differ(here, model):
    """The mean of the samples that their seeds give alone; the deviation in native units, masks kept; made again when it is gone."""
    kelvin = (300 + 10 * np.random.default_rng(0).random((12, 16))).astype(np.float32)
    kelvin[3, 4] = np.nan
    save(here / "in/a.tif", kelvin)
    words = ("upscale", here / "in", "--out", here / "out", "--model", model, "--steps", 4, "--samples", 3, "--seed", 5)
    code, out, err = difiisr(*words)
    assert (code, out, err) == (0, "1 done, 0 failed\n", []) and files(here / "out") == ["a.deviation.tif", "a.tif"]
    resolver = SuperResolver.from_pretrained(model)
    alone = np.stack([resolver.upscale(kelvin, 4, seed) for seed in (5, 6, 7)]).astype(np.float64)
    mean, deviation = (read_image(here / "out" / name).native() for name in ("a.tif", "a.deviation.tif"))
    np.testing.assert_allclose(mean, alone.mean(0), atol=1e-3)
    variance, known = alone.var(0, ddof=1), np.isfinite(alone[0])  # neighbours help few samples; the masked give nothing
    near = [gaussian_filter(np.where(known, x, 0.0), 1.0) for x in (variance, np.ones_like(variance))]
    np.testing.assert_allclose(deviation[known], np.sqrt(near[0] / near[1])[known], atol=1e-3)
    assert np.isnan(deviation).sum() == 16 and np.nanmax(deviation) > 0.01
    resolver.model.config = dataclasses.replace(resolver.model.config, deviation=2.5)  # a model that knows how much samples miss
    again, larger = resolver.upscale_samples(read_image(here / "in/a.tif"), 3, 4, 5)
    np.testing.assert_allclose(larger, 2.5 * deviation, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(again.native(), mean, atol=1e-3)
    (here / "out/a.deviation.tif").unlink()
    assert difiisr(*words)[1] == "1 done, 0 failed\n" and difiisr(*words)[1] == "0 done, 1 skipped, 0 failed\n"


@pytest.mark.parametrize("words, said", [
    (["--steps", "1"], "samples of one step hardly differ; give --steps too, such as --steps 15"),
    (["--steps", "4", "--out", "-"], "several samples need a folder for their deviation; name one with --out, or leave --samples out"),
])
def test_samples_that_cannot_be(here, model, words, said):
    save(here / "a.png")
    code, out, err = difiisr("upscale", "a.png", "--out", "out", "--model", model, "--samples", 2, *words)
    assert (code, out, err) == (2, "", [f"difiisr: {said}"]) and not (here / "out").exists()


def test_export_and_its_file(here, model):
    """The file does what the model does, through tiles and 16 bits; another suffix, number of steps or guidance is refused."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    array = np.random.default_rng(0).integers(7000, 7255, (70, 81), dtype=np.uint16)
    save(here / "a.tif", array)
    code, out, err = difiisr("export", model, "--out", "small.onnx", "--steps", 4)
    assert (code, err) == (0, []) and out == "small.onnx: lr [1, 1, h, w] in [-1, 1], normal noise [4, 16, h, w], to sr\n"
    results = []
    for name in (model, "small.onnx"):
        assert difiisr("upscale", "a.tif", "--out", f"out{len(results)}", "--model", name, "--steps", 4, "--tile", 64)[0] == 0
        results.append(read_image(here / f"out{len(results)}" / "a.tif").native().astype(int))
    assert results[0].shape == (280, 324) and np.abs(results[0] - results[1]).max() <= 1
    for words, said in (
        (("export", model, "--out", "small.pt"), "difiisr: --out small.pt: name a file that ends in .onnx"),
        (("export", model, "--out", "b.onnx", "--steps", 16), "difiisr: steps must be 1 to 15 for this model, not 16"),
        (("upscale", "a.tif", "--out", "c", "--model", "small.onnx"),
         "difiisr: this ONNX file was exported for --steps 4 and sampler ancestral, not for 1 and ancestral; export it again"),
    ):
        assert difiisr(*words)[::2] == (2, [said])
    assert not (here / "b.onnx").exists()
    with pytest.raises(models.ModelError, match="guidance steers"):
        SuperResolver.from_pretrained("small.onnx").upscale(array, 4, guide=lambda lr: None)


def test_bench_upscale(here, model):
    code, out, _ = difiisr("bench", "upscale", "--model", model, "--size", 70, 66, "--steps", 1, 2, "--tiles", 0, 64, "--repeats", 1)
    lines = out.splitlines()
    assert code == 0 and lines[0].endswith("ratio to the first row") and len(lines) in (6, 10) and lines[2].split()[:5:2] == ["torch", "whole", "1"]
