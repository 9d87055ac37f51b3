"""Preparing data: nothing changes the second time, a killed run ends like an uninterrupted one, bad files are all named."""
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from difiisr_dwt.configuration import ConfigurationError
from difiisr_dwt.datasets import DataError, read_pairs
from difiisr_dwt.images import ThermalImage, read_image, write_image
from difiisr_dwt.preparation import prepare
from difiisr_dwt.recipes import Recipe, read_recipe
from difiisr_dwt.thermal_scenes import render_scene

SCENES = Recipe("scenes", "scenes", "scenes", "none", min_size=64)
FOLDER = Recipe("folder", "folder", "folder", "yours", min_size=64)
SCRIPT = """
import sys
from difiisr_dwt.preparation import prepare
from difiisr_dwt.recipes import Recipe
prepare(Recipe("scenes", "scenes", "scenes", "none", min_size=64), sys.argv[1], train=40, validation=5, size=(96, 96))
"""


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def frames(folder: Path, number: int) -> None:
    """Frames as a camera writes them, of 8 and 16 bits, in sub-folders."""
    for i in range(number):
        pixels = render_scene(i, (90, 101)).image
        image = ThermalImage.from_native(pixels.astype(np.uint16) + 7000 if i % 2 else pixels)
        path = folder / ("night" if i % 3 else "day") / f"frame {i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_image(path, image)


def test_killed_and_resumed(tmp_path):
    """SIGKILL three times in the middle; the tree is that of an uninterrupted run, file by file."""
    def start(out: Path) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-c", SCRIPT, str(out)], stderr=subprocess.DEVNULL)

    assert start(tmp_path / "whole").wait() == 0
    seed = int.from_bytes(os.urandom(4), "little")
    moments, seen = random.Random(seed), []
    for _ in range(3):
        process = start(tmp_path / "killed")
        before = len(list((tmp_path / "killed").rglob("HR/*.png")))
        while process.poll() is None and len(list((tmp_path / "killed").rglob("HR/*.png"))) <= before:
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        process.wait()
        seen.append(len(list((tmp_path / "killed").rglob("HR/*.png"))))
    assert start(tmp_path / "killed").wait() == 0
    assert 0 < seen[0] < 45, f"the first kill came at {seen[0]} images, seed {seed}"
    killed = {k: v for k, v in tree(tmp_path / "killed").items() if not Path(k).name.startswith(".")}
    assert killed == tree(tmp_path / "whole"), f"seed {seed}, images at the kills {seen}"


def test_folder(tmp_path):
    """Bit depth and sub-folders are kept, sizes are cropped to a multiple of 4, splits do not meet, twice changes nothing."""
    frames(tmp_path / "in", 9)
    manifest = prepare(FOLDER, tmp_path / "out", str(tmp_path / "in"), train=0, validation=2)
    assert manifest["counts"] == {"train": 7, "val": 2}
    origins = [f["origin"] for f in manifest["files"]]
    assert len(set(origins)) == 9
    for entry in manifest["files"]:
        original = read_image(tmp_path / "in" / entry["origin"])
        hr = read_image(tmp_path / "out" / entry["split"] / "HR" / entry["name"])
        assert hr.dtype == original.dtype and hr.pixels.shape == (88, 100)
        assert np.array_equal(hr.native(), original.native()[:88, :100])
    assert len(list(read_pairs(tmp_path / "out" / "train"))) == 7
    before = tree(tmp_path / "out")
    assert prepare(FOLDER, tmp_path / "out", str(tmp_path / "in"), train=0, validation=2) == manifest
    assert tree(tmp_path / "out") == before


def test_damage_is_repaired(tmp_path):
    """A result that was changed or lost is made again, the others are left alone."""
    manifest = prepare(SCENES, tmp_path, train=3, validation=1, size=(64, 64))
    before = tree(tmp_path)
    (tmp_path / "train" / "LR" / manifest["files"][0]["name"]).write_bytes(b"damaged")
    (tmp_path / "train" / "HR" / manifest["files"][1]["name"]).unlink()
    assert prepare(SCENES, tmp_path, train=3, validation=1, size=(64, 64)) == manifest
    assert tree(tmp_path) == before


def test_every_bad_file_is_named(tmp_path):
    """All offenders in one sentence, small frames in the manifest, two files of one stem told apart."""
    frames(tmp_path / "in", 6)
    (tmp_path / "in" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "in" / "empty.tif").touch()
    with pytest.raises(DataError, match=r"2 images .*") as caught:
        prepare(FOLDER, tmp_path / "out", str(tmp_path / "in"), train=0, validation=2)
    assert "broken.png" in str(caught.value) and "empty.tif" in str(caught.value)
    assert not (tmp_path / "out" / "manifest.json").exists()
    (tmp_path / "in" / "broken.png").unlink()
    (tmp_path / "in" / "empty.tif").unlink()
    write_image(tmp_path / "in" / "small.png", ThermalImage.from_native(np.full((20, 200), 9, np.uint8)))
    for seed, suffix in ((50, ".png"), (51, ".jpg")):
        write_image(tmp_path / "in" / f"twin{suffix}", ThermalImage.from_native(render_scene(seed, (64, 64)).image))
    manifest = prepare(FOLDER, tmp_path / "out", str(tmp_path / "in"), train=0, validation=2)
    assert [(e["origin"], e["excluded"]) for e in manifest["excluded"]] == [("small.png", "200×20, smaller than 64×64")]
    assert {"twin.png.png", "twin.jpg.png"} <= {f["name"] for f in manifest["files"]}


def test_source_that_changes(tmp_path):
    """A frame that is new, changed or gone: the folders hold what the manifest says, so no frame is in both splits."""
    source, out = tmp_path / "in", tmp_path / "out"
    frames(source, 9)
    before = prepare(FOLDER, out, str(source), train=0, validation=3)
    frames(source, 12)
    gone, changed = source / before["files"][-1]["origin"], source / before["files"][-2]["origin"]
    gone.unlink()
    write_image(changed, ThermalImage.from_native(render_scene(77, (64, 64)).image))
    manifest = prepare(FOLDER, out, str(source), train=0, validation=3)
    prepare(FOLDER, tmp_path / "afresh", str(source), train=0, validation=3)
    assert tree(out) == tree(tmp_path / "afresh")
    assert len({f["origin"] for f in manifest["files"]}) == 11
    written = [p.relative_to(out / split / "HR") for split in ("train", "val") for p in (out / split / "HR").rglob("*.png")]
    assert len(written) == len(set(written)) == 11


def test_killed_while_it_writes(tmp_path):
    """SIGKILL just before a file is renamed, at every tenth rename: half-written files are cleared, the result is the same."""
    script = """
import os, signal, sys
replace, count = os.replace, 0
def counting(*paths):
    global count
    count += 1
    if count == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*paths)
os.replace = counting
""" + SCRIPT.replace("train=40", "train=8")
    assert subprocess.run([sys.executable, "-c", script, tmp_path / "whole", "0"], capture_output=True).returncode == 0
    for at in (10, 10, 8):
        run = subprocess.run([sys.executable, "-c", script, tmp_path / "killed", str(at)], capture_output=True)
        assert run.returncode == -signal.SIGKILL and not (tmp_path / "killed" / "manifest.json").exists()
        assert [p for p in (tmp_path / "killed").rglob(".*")], "the kill left no half-written file"
    assert subprocess.run([sys.executable, "-c", script, tmp_path / "killed", "0"], capture_output=True).returncode == 0
    assert tree(tmp_path / "killed") == tree(tmp_path / "whole")


def test_names_that_would_collide(tmp_path):
    """a.png, a.jpg, a.jpg.png and A.PNG become four results, the same ones in every order and split."""
    for number, name in enumerate(("a.png", "a.jpg", "a.jpg.png", "A.PNG", "b.tif", "d/a.png")):
        write_image(tmp_path / "in" / name, ThermalImage.from_native(render_scene(number, (64, 64)).image))
    manifest = prepare(FOLDER, tmp_path / "out", str(tmp_path / "in"), train=0, validation=2)
    names = {f["origin"]: f["name"] for f in manifest["files"]}
    assert len({name.lower() for name in names.values()}) == len(list((tmp_path / "in").rglob("*.*")))
    assert names["d/a.png"] == "d/a.png" and names["b.tif"] == "b.tif" and names["a.jpg.png"] != names["a.jpg"]
    other = prepare(FOLDER, tmp_path / "other", str(tmp_path / "in"), train=0, validation=2, seed=5)
    assert {f["origin"]: f["name"] for f in other["files"]} == names


def test_folders_that_cannot_serve(tmp_path):
    """A result inside its source, and one that holds other files, are refused; those files stay."""
    frames(tmp_path / "in", 3)
    with pytest.raises(DataError, match="lies inside the source"):
        prepare(FOLDER, tmp_path / "in" / "out", str(tmp_path / "in"), train=0, validation=1)
    assert not (tmp_path / "in" / "out").exists()
    stranger = tmp_path / "out" / "train" / "HR" / "mine.png"
    write_image(stranger, ThermalImage.from_native(render_scene(0, (64, 64)).image))
    with pytest.raises(DataError, match="no preparation wrote, first .*mine.png"):
        prepare(FOLDER, tmp_path / "out", str(tmp_path / "in"), train=0, validation=1)
    assert list(tree(tmp_path / "out")) == ["train/HR/mine.png"]


def test_float_frames(tmp_path):
    """Kelvin stay kelvin in HR and LR; frames with masked pixels are named, not spread."""
    for number in range(3):
        kelvin = render_scene(number, (64, 64)).temperature
        write_image(tmp_path / "in" / f"{number}.tif", ThermalImage.from_native(kelvin))
    manifest = prepare(FOLDER, tmp_path / "out", str(tmp_path / "in"), train=0, validation=1)
    assert {f["bits"] for f in manifest["files"]} == {32}
    for pair in read_pairs(tmp_path / "out" / "train"):
        assert abs(pair.lr.native().mean() - pair.hr.native().mean()) < 1 and pair.hr.native().min() > 200
    kelvin[5, 5] = np.nan
    write_image(tmp_path / "in" / "1.tif", ThermalImage.from_native(kelvin))
    with pytest.raises(DataError, match="1.tif has 1 masked"):
        prepare(FOLDER, tmp_path / "out", str(tmp_path / "in"), train=0, validation=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel": "cubic"}, "kernel 'cubic'"), ({"train": 0}, "at least one scene"), ({"source": "here"}, "leave source empty"),
        ({"seed": 999_999}, "seeds below"),
    ],
)
def test_requests_without_meaning(tmp_path, change, message):
    """One sentence, and nothing is written."""
    with pytest.raises(DataError, match=message):
        prepare(SCENES, tmp_path / "out", **{"train": 2, "validation": 1} | change)
    assert not (tmp_path / "out").exists()


def test_recipes(tmp_path):
    """Those of the repository can be read; a misspelt key or kind is an error that says so."""
    root = Path(__file__).resolve().parents[1] / "data_prep"
    for path in root.glob("*.yaml"):
        assert read_recipe(path).name == path.stem
    (tmp_path / "r.yaml").write_text(json.dumps({"name": "r", "kind": "folders", "title": "", "licence": ""}))
    with pytest.raises(DataError, match="kind 'folders'"):
        read_recipe(tmp_path / "r.yaml")
    (tmp_path / "r.yaml").write_text(json.dumps({"name": "r", "kind": "folder", "title": "", "license": ""}))
    with pytest.raises(ConfigurationError, match="did you mean 'licence'"):
        read_recipe(tmp_path / "r.yaml")
