"""The loader against real processes and bad data: caches, workers, resumption, shares, and a list of every offender."""
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import papermill
import pytest
import torch

from difiisr_dwt.cache import CacheError, FrameFile, cache_folder, cached_frames
from difiisr_dwt.configuration import configure
from difiisr_dwt.datasets import CONTEXT, DEGRADATIONS, MARGIN, PairDataset, batches
from difiisr_dwt.degradations import KERNELS, downsample
from difiisr_dwt.images import ThermalImage, find_images, read_image, shared_data, write_image, write_json
from difiisr_dwt.pairs import CHAINS, Chain, DataError, degrade, find_frames, read_pairs
from difiisr_dwt.thermal_scenes import render_scene
from difiisr_dwt.train_config import TrainConfig
from difiisr_dwt.training_step import initial_model, start_state, training_step

STAGE = Path(__file__).resolve().parents[1] / "nbs" / "stages" / "data_report.ipynb"


def frame(seed: int, size: tuple[int, int] = (64, 80), dtype: str = "uint8") -> ThermalImage:
    """A scene in 8 bits, in counts of a 14-bit camera, or in kelvin."""
    scene = render_scene(seed, size)
    return ThermalImage.from_native({"uint8": scene.image, "uint16": scene.counts, "float32": scene.temperature}[dtype])


def folder_of(root: Path, seeds: range, dtype: str = "uint8", lr: str = "", size: tuple[int, int] = (64, 80)) -> Path:
    """A folder of frames, with LR by a kernel if one is named."""
    suffix = "tif" if dtype == "float32" else "png"
    for seed in seeds:
        hr, low = degrade(frame(seed, size, dtype), lr or "bicubic")
        write_image(root / ("HR" if lr else "") / f"{seed}.{suffix}", hr)
        if lr:
            write_image(root / "LR" / f"{seed}.{suffix}", low)
    return root


def same(a: PairDataset, b: PairDataset, numbers: range = range(12)) -> bool:
    """Whether two data sets give equal samples."""
    return all(torch.equal(a[i][k], b[i][k]) for i in numbers for k in ("hr", "lr", "kernel"))


# ---- the cache

BUILD = """
import sys, time
from pathlib import Path
from difiisr_dwt.datasets import PairDataset
while not Path(sys.argv[2]).exists():
    time.sleep(0.01)
d = PairDataset([sys.argv[1]], crop=32, cache=sys.argv[3])
print(float(sum(d[i]["hr"].double().sum() for i in range(8))))
"""


def build(*arguments: object) -> subprocess.Popen:
    """A process that builds a cache."""
    return subprocess.Popen([sys.executable, "-c", BUILD, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_build_one_cache(tmp_path):
    """Started at the same moment, both see the same frames, and one whole file is left."""
    source, go, cache = folder_of(tmp_path / "data", range(6)), tmp_path / "go", tmp_path / "cache"
    processes = [build(source, go, cache) for _ in range(2)]
    go.touch()
    results = [p.communicate() for p in processes]
    assert all(p.returncode == 0 for p in processes), results
    assert results[0][0] == results[1][0] != ""
    assert [f.name.startswith(".") for f in cache.iterdir()] == [False, False]
    assert same(PairDataset([source], crop=32, cache=cache), PairDataset([source], crop=32))


def test_killed_while_building(tmp_path):
    """What a killed process leaves is never taken for a cache, and the next one builds it."""
    cache = tmp_path / "cache"
    process = build("scenes:2000", tmp_path, cache)
    while process.poll() is None and not any(f.stat().st_size for f in cache.glob(".*")):
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not list(cache.glob("[!.]*"))
    leftovers = list(cache.iterdir())
    assert leftovers
    for file in leftovers:
        os.utime(file, (0, 0))  # days later
    assert len(PairDataset(["scenes:3"], cache=cache).items[0]["hr"]) == 3
    assert not list(cache.glob(".*"))  # swept


def test_cache_follows_the_data(tmp_path):
    """A changed, added or removed file, another kernel, another scale: other frames, never the old ones."""
    source, cache = folder_of(tmp_path / "data", range(3)), tmp_path / "cache"

    def check(**options: object) -> None:
        assert same(PairDataset([source], crop=32, cache=cache, **options), PairDataset([source], crop=32, **options))

    def files() -> int:
        return len(list(cache.iterdir()))

    check()
    check()
    assert files() == 2  # HR and LR
    for change in (
        lambda: write_image(source / "1.png", frame(77)),
        lambda: write_image(source / "9.png", frame(9)),
        lambda: (source / "0.png").unlink(),
    ):
        before = files()
        change()
        check()
        assert files() == before + 2
    for options, more in (({"kernel": "box"}, 1), ({"scale": 2}, 1), ({"kernel": ["box", "matlab", "sensor"]}, 2), ({"kernel": "sensor"}, 0)):
        before = files()
        check(**options)
        assert files() == before + more  # frames are stored once, whatever is made of them


def test_damaged_cache_is_built_again(tmp_path):
    """Truncated or of another kind: read again from the source, not from there."""
    PairDataset(["scenes:2"], cache=tmp_path)
    for file, damage in ((f, d) for f in list(tmp_path.iterdir()) for d in (f.read_bytes()[:-5], b"", b"anything at all that is no cache")):
        file.write_bytes(damage)
        with pytest.raises(CacheError, match="remove it"):
            FrameFile(file)
        assert same(PairDataset(["scenes:2"], cache=tmp_path), PairDataset(["scenes:2"]))


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on file sizes")
def test_full_disk(tmp_path):
    """No room for the cache: one sentence, nothing left."""
    script = """
import resource, sys
from difiisr_dwt.datasets import PairDataset
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
try:
    PairDataset(["scenes:20"], cache=sys.argv[1])
except ValueError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert "cannot write the cache" in run.stdout and "''" in run.stdout, run
    assert not list(tmp_path.iterdir())


def test_where_caches_lie(tmp_path, monkeypatch):
    """The option in words."""
    assert cache_folder("") is None
    assert cache_folder(tmp_path / "x") == tmp_path / "x"
    monkeypatch.setenv("DIFIISR_CACHE", str(tmp_path / "mine"))
    assert cache_folder("auto") == tmp_path / "mine"
    (tmp_path / "file").touch()
    monkeypatch.setenv("DIFIISR_CACHE", str(tmp_path / "file" / "below"))
    assert cache_folder("auto") is None


def test_old_caches_go(tmp_path):
    """What nobody opened for a month is removed when another is written; what is used stays."""
    for key in (1, 2):
        cached_frames(tmp_path, {"hr": key}, lambda kinds: [{"hr": (np.zeros(3), {})}])
    old, used = sorted(tmp_path.iterdir())
    os.utime(old, (0, time.time() - 32 * 86400))
    os.utime(used, (0, time.time() - 20 * 86400))
    cached_frames(tmp_path, {"hr": 3}, lambda kinds: [{"hr": (np.zeros(3), {})}])
    assert not old.exists() and used.exists() and len(list(tmp_path.iterdir())) == 2


# ---- samples

def test_workers_give_the_same_batches(tmp_path):
    """Two processes over one mapped file: the batches of the main process, also from the middle on."""
    data = PairDataset(["scenes:5"], ["bicubic", "box"], crop=32, cache=tmp_path, brightness=0.1, contrast=0.1)
    whole = list(batches(data, 4, 0, 6))
    for a, b in zip(whole[2:], batches(data, 4, 2, 6, workers=2), strict=True):
        assert all(torch.equal(a[k], b[k]) for k in ("hr", "lr", "kernel"))


def test_shares_are_exact_and_each_epoch_complete():
    """Weights 6 : 3 : 1 over sets of 2, 3 and 5 frames: exact counts at every moment, every frame equally often."""
    data = PairDataset(["scenes:2", "scenes:3@10", "scenes:5@20"], crop=64, weights=(6, 3, 1))
    drawn = [data.frame_of(i) for i in range(3000)]
    for n in (10, 77, 1000, 3000):
        counts = Counter(source for source, _ in drawn[:n])
        assert all(abs(counts[k] - n * w / 10) <= k + 1 for k, w in enumerate((6, 3, 1))), (n, counts)
    assert all(Counter(s for s, _ in drawn[8 * b : 8 * b + 8])[0] in (4, 5) for b in range(300))
    for source, size in enumerate((2, 3, 5)):
        frames = Counter(f for s, f in drawn if s == source)
        assert len(frames) == size and max(frames.values()) - min(frames.values()) <= 1
    # in the middle, by a data set that has seen nothing before
    fresh = PairDataset(["scenes:2", "scenes:3@10", "scenes:5@20"], crop=64, weights=(6, 3, 1))
    assert [fresh.frame_of(i) for i in range(1234, 1300)] == drawn[1234:1300]
    assert data.with_seed(5).frame_of(0)[0] == data.frame_of(0)[0]
    assert [data.with_seed(5).frame_of(i) for i in range(50)] != drawn[:50]


def test_without_weights_all_frames_are_one_set():
    """Every frame of every source once per epoch."""
    data = PairDataset(["scenes:2", "scenes:5@10"], crop=64)
    assert len({data.frame_of(i) for i in range(7)}) == len({data.frame_of(i) for i in range(7, 14)}) == 7


def test_kernels_are_drawn_evenly_and_told():
    """A mixture: each sample says what made it, and is what that kernel alone gives."""
    names = ["box", "bicubic", "cv2-cubic", "matlab"]
    mixed, alone = PairDataset(["scenes:4"], names, crop=64), {n: PairDataset(["scenes:4"], n, crop=64) for n in names}
    told = [DEGRADATIONS[int(mixed[i]["kernel"])] for i in range(400)]
    assert all(70 <= told.count(name) <= 130 for name in names)
    for i in range(40):
        assert all(torch.equal(alone[told[i]][i][k], mixed[i][k]) for k in ("hr", "lr", "kernel"))
    twice = PairDataset(["scenes:4"], ["box", "box", "bicubic"], crop=64)
    assert 230 <= [int(twice[i]["kernel"]) for i in range(400)].count(DEGRADATIONS.index("box")) <= 300
    assert list(DEGRADATIONS[: len(KERNELS)]) == list(KERNELS)


def test_a_chain_sees_the_crop_with_its_surroundings(monkeypatch):
    """With the box kernel as a chain, LR is that of the whole frame, margin included, inside the frame and at its edge."""
    seeds = []

    def box_chain(hr: torch.Tensor, given: list[int], scale: int) -> torch.Tensor:
        seeds.extend(given)
        assert hr.shape[-1] == 64 + 2 * scale * (MARGIN + CONTEXT) and 0 <= hr.min() and hr.max() <= 1
        return downsample(hr, "box", scale)

    monkeypatch.setitem(CHAINS, "sensor", Chain(box_chain, CHAINS["real-esrgan"].seen))
    chain, kernel = (PairDataset(["scenes:3"], name, crop=64) for name in ("sensor", "box"))
    for i in range(20):
        a, b = chain[i], kernel[i]  # in the ranges of a bicubic and of a box LR
        matrix = torch.stack([a["hr"].flatten(), torch.ones(64 * 64)], 1)
        gain, shift = torch.linalg.lstsq(matrix, b["hr"].flatten()[:, None]).solution
        inner = slice(MARGIN, -MARGIN)
        off = (a["lr"] * gain + shift - b["lr"])[0, inner, inner].abs()
        assert off.max() < 0.02 and (off < 1e-4).float().mean() > 0.9  # but for halves, rounded up or down
    assert len(set(seeds)) == 20


def _best_shift(lr: torch.Tensor, hr: torch.Tensor, reach: int = 2) -> tuple[int, int]:
    """By how many pixels an image [h, w] must be moved to resemble another most."""
    h, w = (n - 2 * reach for n in hr.shape)
    middle = hr[reach : reach + h, reach : reach + w].flatten()
    shifts = [(y, x) for y in range(-reach, reach + 1) for x in range(-reach, reach + 1)]
    parts = [lr[reach + y : reach + y + h, reach + x : reach + x + w].flatten() for y, x in shifts]
    return shifts[int(torch.stack([torch.corrcoef(torch.stack([middle, part]))[0, 1] for part in parts]).argmax())]


@pytest.mark.parametrize("name", list(CHAINS))
def test_chains_are_drawn_anew_and_always_the_same(name):
    """Another LR for each sample and seed; the same for the same, whoever asks; aligned with HR; on the grid of the file's type."""
    data, other = (PairDataset(["scenes:3"], name, crop=64, seed=s) for s in (0, 1))
    first = [data[i] for i in range(12)]
    fresh = PairDataset(["scenes:3"], name, crop=64)
    for i in (11, 3):
        assert all(torch.equal(fresh[i][k], first[i][k]) for k in ("hr", "lr", "kernel"))
    assert not torch.equal(other[3]["lr"], first[3]["lr"]) and DEGRADATIONS[int(first[0]["kernel"])] == name
    related = []
    for item in first:
        inner = item["lr"][..., MARGIN:-MARGIN, MARGIN:-MARGIN]
        related.append(_best_shift(inner[0], torch.nn.functional.avg_pool2d(item["hr"], 4)[0]))
        levels = item["lr"].unique().diff()
        steps = levels / levels.min()
        assert (steps - steps.round()).abs().max() < 0.02 * steps.max()  # whole grey levels apart
    # LR lies where HR does: of all shifts by up to two pixels, none fits best in most of the samples
    assert sum(shift == (0, 0) for shift in related) >= len(related) / 2, related
    repeated = PairDataset(["scenes:1"], name, crop=256, augment=False)  # one frame, one crop: only the chain differs
    assert torch.equal(repeated[0]["hr"], repeated[1]["hr"]) and not torch.equal(repeated[0]["lr"], repeated[1]["lr"])
    pair, again = (next(read_pairs("scenes:1", name)) for _ in range(2))
    assert pair.kernel == name and np.array_equal(pair.lr.pixels, again.lr.pixels)
    assert np.array_equal(ThermalImage.from_native(pair.lr.native()).pixels, pair.lr.pixels)  # as a file would hold it


def test_the_sensor_knows_kelvin():
    """A radiometric frame gets its noise in kelvin, in either unit; one that no camera of the chain can see is refused."""
    kelvin = np.full((128, 128), 300.0, np.float32) + np.linspace(0, 40, 128, dtype=np.float32)
    seen = {}
    for unit, lacks in (("kelvin", 0), ("celsius", 273.15)):
        image = ThermalImage.from_native((kelvin - np.float32(lacks)), {"unit": unit})
        hr, lr = degrade(image, "sensor", seed=5)
        seen[unit] = lr.native() + lacks
        clean = degrade(image, "box")[1].native() + lacks
        assert 0.02 < np.std(seen[unit] - clean) < 1.5  # K: some tenths of drift, stripes and noise
    assert np.allclose(seen["kelvin"], seen["celsius"], atol=0.05)
    with pytest.raises(DataError, match="outside the sensor's"):
        degrade(ThermalImage.from_native(kelvin + 900, {"unit": "kelvin"}), "sensor")


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_pairs_of_any_type_share_one_range(tmp_path, dtype):
    """8-bit, 14-bit counts, kelvin: a folder's own LR gives the samples of LR made on the fly, in one value range."""
    own, made = folder_of(tmp_path / "own", range(3), dtype, "bicubic"), folder_of(tmp_path / "made", range(3), dtype)
    for pair in read_pairs(own):
        assert pair.hr.value_range == pair.lr.value_range and pair.hr.dtype == pair.lr.dtype == np.dtype(dtype)
    a, b = (PairDataset([source], crop=32, cache=tmp_path / "cache") for source in (own, made))
    for i in range(12):
        assert torch.allclose(a[i]["hr"], b[i]["hr"], atol=1e-4) and torch.allclose(a[i]["lr"], b[i]["lr"], atol=1e-4)
    seen = torch.stack([a[i]["hr"] for i in range(12)])  # frames fill the network's range, but for what is hottest and coldest
    assert -2 < seen.quantile(0.02) < 0 < seen.quantile(0.98) < 2 and seen.std() > 0.1


@pytest.mark.parametrize("whole", [0.0, 1.0])
@pytest.mark.parametrize("option", ["cameras", "enlarged"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_other_cameras_of_any_type(tmp_path, dtype, option, whole):
    """HR is another picture on the grid of its type, LR is made of that picture, a chain's as well; LR that is given cannot be.
    Where the picture ends with the crop, LR is right to its borders."""
    folder = folder_of(tmp_path / "made", range(3), dtype, size=(120, 150))
    own, other = (PairDataset([folder], ["matlab"] + ["sensor"] * (not whole), crop=64, whole=whole, **{option: share}) for share in (0.0, 1.0))
    for i in range(16):
        pair, kind = other[i], DEGRADATIONS[int(other[i]["kernel"])]
        assert all(torch.equal(pair[k], other[i][k]) for k in pair) and not torch.equal(pair["hr"], own[i]["hr"])
        array, (low, high) = other.items[0]["hr"][other.frame_of(i)[1]][0], other.items[0][kind][other.frame_of(i)[1]][1]["range"]
        hr, lr = ((x.double() + 1) / 2 * (high - low) + low for x in (pair["hr"], pair["lr"]))
        spread = float(np.ptp(array))
        assert array.min() - 0.2 * spread <= hr.min() and hr.max() <= array.max() + 0.2 * spread
        edge = 0 if whole else 2  # LR pixels that see beyond the crop
        inner = lr[..., MARGIN + edge : -MARGIN - edge, MARGIN + edge : -MARGIN - edge]
        if dtype != "float32":
            assert (hr - hr.round()).abs().max() < 0.02 and (lr - lr.round()).abs().max() < 0.02
        if kind == "matlab":
            top = 1 if dtype == "float32" else np.iinfo(dtype).max
            made = top * downsample((hr if top == 1 else hr.round())[None] / top, "matlab", levels=None if top == 1 else top)[0]
            made = made[..., edge : made.shape[-2] - edge, edge : made.shape[-1] - edge]
            assert (made - inner).abs().max() <= (1e-3 * spread if top == 1 else 0.02)
        else:
            assert torch.corrcoef(torch.stack([inner.flatten(), torch.nn.functional.avg_pool2d(hr, 4)[..., 2:-2, 2:-2].flatten()]))[0, 1] > 0.5
    with pytest.raises(DataError, match="set cameras, enlarged and whole to 0"):
        PairDataset([folder_of(tmp_path / "own", range(2), dtype, "bicubic")], crop=32, **({"whole": 0.5} if whole else {option: 0.5}))


# ---- prepared folders

def test_prepared_folder(tmp_path):
    """Its LR is used for the kernel of its manifest; for any other, for a mixture and for a scale, LR is made from HR."""
    root = tmp_path / "set"
    folder_of(root / "train", range(3), lr="box")
    write_json(root / "manifest.json", {"request": {"kernel": "box", "scale": 4}})
    made = [ThermalImage.from_native(p.hr.native()) for p in read_pairs(root / "train")]
    assert all(f.lr for f in find_frames(root / "train", "box"))
    for options in ({"kernel": "bicubic"}, {"kernel": ["box", "bicubic"]}, {"kernel": "box", "scale": 2}):
        assert not any(f.lr for f in find_frames(root / "train", **options))
    for pair, hr in zip(read_pairs(root / "train", "bicubic"), made, strict=True):
        assert np.array_equal(pair.lr.pixels, degrade(hr, "bicubic")[1].pixels)
    with pytest.raises(DataError, match="several splits.*train"):
        find_frames(root)
    (root / "manifest.json").rename(root / "manifest.partial.jsonl")
    with pytest.raises(DataError, match="did not finish"):
        find_frames(root / "train")


# ---- bad data

def test_every_offender_is_named_at_once(tmp_path):
    """Truncated, missing LR, LR of another size or type, masked, no such folder: one error with every path."""
    own, plain = folder_of(tmp_path / "own", range(5), lr="bicubic"), folder_of(tmp_path / "plain", range(3))
    floats = folder_of(tmp_path / "floats", range(2), "float32")
    (own / "HR" / "0.png").write_bytes((own / "HR" / "0.png").read_bytes()[:200])
    write_image(own / "LR" / "1.png", frame(1, (16, 16)))
    write_image(own / "LR" / "2.png", degrade(frame(2, dtype="uint16"))[1])
    (plain / "1.png").write_text("no image")
    masked = frame(0, dtype="float32")
    masked.pixels[5:9, 5:9] = np.nan
    write_image(floats / "1.tif", masked)
    for cache in ("", tmp_path / "cache"):
        with pytest.raises(DataError) as error:
            PairDataset([own, plain, floats, tmp_path / "nowhere"], crop=32, cache=cache)
        bad = [own / "HR" / "0.png", own / "HR" / "1.png", own / "HR" / "2.png", plain / "1.png", floats / "1.tif", tmp_path / "nowhere"]
        assert len(error.value.offenders) == len(bad) and "6 faults" in str(error.value)
        assert all(str(path) in offender for path, offender in zip(bad, error.value.offenders, strict=True))
    assert not list((tmp_path / "cache").glob("*"))  # nothing half-written
    for name in ("3", "4"):
        (own / "LR" / f"{name}.png").unlink()
    with pytest.raises(DataError) as error:
        PairDataset([own], crop=32)
    assert len(error.value.offenders) == 2 and all(str(own / "HR" / f"{n}.png") in str(error.value) for n in "34")


@pytest.mark.parametrize(("options", "message"), [
    ({"weights": (1, 2)}, "one positive number for each of the 1"),
    ({"weights": (0,)}, "positive"),
    ({"weights": (float("nan"),)}, "positive"),
    ({"kernel": []}, "does not exist"),
    ({"kernel": ["box", "bix"]}, "'bix' does not exist"),
    ({"contrast": 1.0}, "below 1"),
    ({"brightness": -0.1}, "at least 0"),
    ({"cameras": 1.5}, "shares from 0 to 1"),
    ({"cameras": 0.6, "enlarged": 0.6}, "together too"),
    ({"whole": 1.1}, "whole must be a share"),
    ({"whole": 0.5, "kernel": ["box", "sensor"]}, "set whole to 0 or leave it out"),
    ({"crop": 1000}, "at least 1000×1000"),
])
def test_wrong_options(options, message):
    """One sentence each."""
    with pytest.raises(DataError, match=message):
        PairDataset(["scenes:1"], **options)


def test_data_report_finds_what_is_wrong(tmp_path):
    """A torn file, a leak under another gain, LR of an unsuspected kernel, frames below the crop: all in the report, no path of this machine."""
    train = folder_of(tmp_path / "set" / "train", range(6), lr="box", size=(128, 144))
    val = folder_of(tmp_path / "set" / "val", range(20, 23), size=(128, 128))
    write_image(val / "leak.png", ThermalImage.from_native((30 + frame(3, (128, 144)).native() * 0.6).astype(np.uint8)))
    write_image(val / "small.png", frame(40, (64, 64)))
    (val / "torn.png").write_bytes((val / "20.png").read_bytes()[:500])
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    parameters = {"run_dir": str(run_dir), "train": [str(train)], "validation": [str(val)], "crop": 96, "pictures": ["set/"]}
    papermill.execute_notebook(STAGE, run_dir / "notebook.ipynb", parameters, kernel_name="python3", progress_bar=False, log_output=False)
    metrics = json.loads((run_dir / "metrics.json").read_text())
    tables = {t["title"]: t["rows"] for t in metrics["tables"]}
    assert not metrics["verdict"]["passed"] and "cannot be used: 1 of the frames; in two splits: 1" in metrics["verdict"]["text"]
    assert [row[:5:2] for row in tables["Sources"]] == [["set/train", 6, "uint8, 8 bits used"], ["set/val", 5, "uint8, 8 bits used"]]
    assert metrics["summary"]["below 96×96"] == 1
    [[source, *differences]] = tables["Given LR: grey levels (RMS) from each kernel's"]
    assert source == "set/train" and differences[list(KERNELS).index("box")] == 0 < min(d for d in differences if d)
    [[a, leak, b, other, bits]] = tables["In two splits"]
    assert (a, leak, b, other) == ("set/val", "leak", "set/train", "3") and bits <= 24
    [[source, why]] = tables["Cannot be used"]
    assert source == "set/val" and "torn.png" in why and str(tmp_path) not in (run_dir / "metrics.json").read_text()
    assert {f["file"] for f in metrics["figures"]} == {f"figures/{p.name}" for p in (run_dir / "figures").iterdir()}
    assert len(metrics["figures"]) == 5


# ---- costs

def test_loading_costs_little_beside_a_training_step():
    """A batch of 8 crops of 128² with a bicubic kernel takes at most 5 % of the compact network's step, on one thread each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        config = configure(TrainConfig, {"sigma_batches": 1, "device": "cpu"})
        sets = {name: PairDataset(["scenes:16"], name, brightness=0.1, contrast=0.1) for name in ("bicubic", *CHAINS)}
        data = sets["bicubic"]
        state = start_state(initial_model(config, data), config)
        loading, steps = {name: [] for name in sets}, []
        for i in range(4):
            for name, data in sets.items():
                started = time.perf_counter()
                [batch] = batches(data, 8, i, i + 1)
                loading[name].append(time.perf_counter() - started)
            started = time.perf_counter()
            training_step(state, batch, config)
            steps.append(time.perf_counter() - started)
    finally:
        torch.set_num_threads(threads)
    for name, times in loading.items():
        print(f"{name}: {np.median(times) * 1e3:.1f} ms per batch, step {np.median(steps) * 1e3:.0f} ms: {np.median(times) / np.median(steps):.2%}")
    assert np.median(loading["bicubic"]) < 0.05 * np.median(steps)


def test_real_frames_bit_exact():
    """M3FD's published LR is what the loader makes of its HR."""
    shared = shared_data("m3fd")
    if shared is None:
        pytest.skip("the shared images are not on this machine")
    lr = {f.stem.removesuffix("x4"): read_image(f) for f in find_images([shared / "LR_bicubic_x4"])}
    data = PairDataset([shared / "HR"], "bicubic", crop=128)
    assert len(data.items[0]["hr"]) == len(lr)
    for (_, info), (made, _) in zip(data.items[0]["hr"], data.items[0]["bicubic"], strict=True):
        assert np.array_equal(made, lr[info["name"]].native())
