"""Recipes of public sets, each on a small tree of its layout; bad data and full disks, with real processes."""
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from difiisr_dwt import cli
from difiisr_dwt.datasets import DataError, read_pairs
from difiisr_dwt.deduplication import BITS, hash_words, nearest
from difiisr_dwt.images import ImageError, ThermalImage, read_image, write_image
from difiisr_dwt.planning import Planned, survey
from difiisr_dwt.preparation import prepare
from difiisr_dwt.recipes import (
    SPLITS,
    UNKNOWN,
    Deal,
    Fact,
    SourceFrame,
    deal_splits,
    find_recipe,
    read_recipe,
    recognize,
)
from difiisr_dwt.thermal_scenes import render_scene

DATA_PREP = Path(__file__).resolve().parents[1] / "data_prep"
NAMES = sorted(p.stem for p in DATA_PREP.glob("*.yaml"))
PUBLIC = [name for name in NAMES if read_recipe(DATA_PREP / f"{name}.yaml").kind == "tree"]


def pixels(number: int, size=(256, 320), deep: bool = False) -> np.ndarray:
    """A picture that no other number gives: soft blobs of heat on a slope, and grain."""
    random = np.random.default_rng(number)
    rows, columns = np.mgrid[: size[0], : size[1]]
    picture = 60 + 30 * np.add.outer(np.linspace(0, random.normal(), size[0]), np.linspace(0, random.normal(), size[1]))
    for _ in range(12):
        y, x, width = random.uniform(0, size[0]), random.uniform(0, size[1]), random.uniform(8, 60)
        picture += random.uniform(-60, 90) * np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / width**2)
    picture = (picture + random.normal(0, 2, size)).clip(0, 255)
    return (40 * picture + 7000).astype(np.uint16) if deep else picture.astype(np.uint8)


def save(path: Path, array: np.ndarray) -> Path:
    """As any program writes it; gray PNG, JPEG, BMP or TIFF."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **({"quality": 95} if path.suffix in (".jpg", ".jpeg") else {}))
    return path


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# Real paths of each set, as its sources show them, a few frames of each; and what must not be read.
TREES: dict[str, list[str]] = {
    "flir_adas_v1": [
        *(f"FLIR_ADAS_1_3/train/thermal_8_bit/FLIR_{n:05d}.jpeg" for n in range(1, 5)),
        *(f"FLIR_ADAS_1_3/val/thermal_8_bit/FLIR_{n:05d}.jpeg" for n in range(8863, 8865)),
        *(f"FLIR_ADAS_1_3/video/thermal_8_bit/FLIR_video_{n:05d}.jpeg" for n in range(1, 3)),
    ],
    "flir_adas_v2": [
        *(f"FLIR_ADAS_v2/images_thermal_train/data/video-2SReBn5LtAkL5HMj2-frame-{n:06d}-HTgPBFgZyPdwQnNvE.jpg" for n in range(4)),
        *(f"FLIR_ADAS_v2/images_thermal_val/data/video-zp8ed5vPKfAJ2fKWh-frame-{n:06d}-sBhdNtnTDtYk4afK5.jpg" for n in range(2)),
        *(f"FLIR_ADAS_v2/video_thermal_test/data/video-ZAtDSNuZZjkZFvMAo-frame-{n:06d}-XJvKiS6Hui5jGj3gj.jpg" for n in range(2)),
    ],
    "kaist": [f"images/set{s:02d}/V{v:03d}/lwir/I{n:05d}.jpg" for s in (0, 3, 6, 9) for v in range(2) for n in range(2)],
    "cvc14": [
        *(f"CVC-14/{day}/FIR/Train/FramesPos/2014_05_04_23_{n // 60:02d}_{n % 60:02d}_620000.tif" for day in ("Day", "Night") for n in range(120)),
        *(f"CVC-14/{day}/FIR/NewTest/FramesPos/2014_05_05_17_29_{n:02d}_323000.tif" for day in ("Day", "Night") for n in range(2)),
    ],
    "m3fd": [*(f"M3FD_Detection/Ir/{n:05d}.png" for n in (*range(0, 1200, 40), 930, 950, 975)), *(f"M3FD_Fusion/Ir/{n:05d}.png" for n in range(3))],
    "fmb": [*(f"FMB/train/Infrared/{n:05d}.png" for n in range(0, 600, 30)), *(f"FMB/test/Infrared/{n:05d}.png" for n in range(3))],
    "tno": [
        f"TNO_Image_Fusion_Dataset/{p}" for p in (
            "Athena_images/2_men_in_front_of_house/IR_meting003_g.bmp", "Athena_images/airplane_in_trees/ir.bmp",
            "Athena_images/APC_1/view_1/IR_fk_06_005.bmp", "Athena_images/APC_2/view_1/2_fk_ge_03_005.bmp",
            "DHV_images/bench/IR_37rad.bmp", "DHV_images/Fire_sequence/part_1/thermal/RAD2.bmp",
            "DHV_images/Fire_sequence/part_2/rad/RADheli0.bmp", "FEL_images/Duine_sequence/thermal/7400i.bmp",
            "Triclobs_images/barbed_wire_1/B_LWIR.tif", "Triclobs_images/Farm/Farm_IR.bmp", "Triclobs_images/Kaptein_01/IR01.bmp",
            "Triclobs_images/soldier_behind_smoke/LWIR-MarnehNew_15RGB_603.tif", "tank/LWIR.tif",
        )
    ],
    "roadscene": [f"RoadScene-master/cropinfrared/FLIR_{n:05d}.jpg" for n in range(6, 1206, 60)]
    + [f"RoadScene-master/cropinfrared/FLIR_video_{n:05d}.jpg" for n in range(15, 415, 40)],
    "hit_uav": [
        f"HIT-UAV/normal_json/{('train', 'train', 'val', 'test')[n % 4]}/{day}_{height}_30_0_{1000 * day + 10 * height + n:05d}.jpg"
        for day in (0, 1) for height in range(60, 140, 10) for n in range(2)
    ] + ["HIT-UAV/normal_json/val/0_60_40_0_00700.jpg", "HIT-UAV/normal_json/test/0_70_40_0_00800.jpg"],
    "llvip": [f"LLVIP/infrared/train/{s:02d}{n:04d}.jpg" for s in range(1, 8) for n in range(1, 3)]
    + [f"LLVIP/infrared/test/{s:02d}{n:04d}.jpg" for s in (19, 20) for n in range(1, 3)],
    "msrs": [
        f"MSRS-main/{'test' if n % 4 == 0 else 'train'}/ir/{n:05d}{day}.png" for day, first in (("D", 1), ("N", 501)) for n in range(first, first + 200, 9)
    ],
}
OTHERS: dict[str, list[str]] = {  # beside them, in colour or of another band: reading one of these would fail
    "flir_adas_v1": ["FLIR_ADAS_1_3/train/RGB/FLIR_00001.jpg", "FLIR_ADAS_1_3/train/Annotated_thermal_8_bit/FLIR_00001.jpeg"],
    "flir_adas_v2": ["FLIR_ADAS_v2/images_rgb_train/data/video-BzZspxAweF8AnKhWK-frame-000000-aaa.jpg"],
    "kaist": ["images/set00/V000/visible/I00000.jpg"],
    "cvc14": ["CVC-14/Day/Visible/Train/FramesPos/2014_05_04_23_00_00_620000.tif"],
    "m3fd": ["M3FD_Detection/Vis/00000.png", "M3FD_Fusion/Vis/00000.png"],
    "fmb": ["FMB/train/Visible/00000.png", "FMB/train/color/00000.png", "FMB/test/Label/00000.png"],
    "tno": [
        f"TNO_Image_Fusion_Dataset/{p}" for p in (
            "Athena_images/airplane_in_trees/vis.bmp", "Athena_images/APC_2/view_1/1_fk_ge_03_005.bmp", "DHV_images/bench/NIR_37dhvG.bmp",
            "DHV_images/Fire_sequence/part_1/dhv/DHV2.bmp", "FEL_images/Duine_sequence/visual/7400v.bmp", "Triclobs_images/Farm/Farm_II.bmp",
            "Triclobs_images/Kaptein_01/NIR01.bmp", "Triclobs_images/soldier_behind_smoke/RGB-MarnehNew_15RGB_603.tif", "tank/Vis.tif",
        )
    ],
    "roadscene": ["RoadScene-master/crop_LR_visible/FLIR_00006.jpg", "RoadScene-master/crop_HR_visible/FLIR_00006.jpg"],
    "hit_uav": ["HIT-UAV/normal_xml/JPEGImages/0_60_30_0_00600.jpg"],
    "llvip": ["LLVIP/visible/train/010001.jpg"],
    "msrs": ["MSRS-main/train/vi/00001D.png"],
}


def build(name: str, root: Path) -> list[str]:
    """The tree of a set, and beside its frames pictures in colour; the paths of its frames."""
    deep = {"flir_adas_v1": False}.get(name, False)
    for n, path in enumerate(TREES[name]):
        array = pixels(n, deep=deep)
        save(root / path, np.stack([array] * 3, -1) if name in ("m3fd", "llvip") and path.endswith(".png") else array)
    colour = np.stack([pixels(1000), pixels(1001), pixels(1002)], -1)
    for path in OTHERS[name]:
        save(root / path, colour)
    return TREES[name]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The trees, each made once."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            build(name, made[name])
        return made[name]

    return make


def run(*words, env=None, **options) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `difiisr` in a process of its own."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(DATA_PREP.parent)} | (env or {})
    command = [sys.executable, "-m", "difiisr_dwt.cli", "prepare", *map(str, words)]
    done = subprocess.run(command, env=env, cwd=DATA_PREP.parent, capture_output=True, text=True, timeout=120, **options)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


# What recipes say


def test_the_sets_of_the_issue_are_there():
    """Every set that was promised has a recipe and a page."""
    assert {"flir_adas_v1", "flir_adas_v2", "kaist", "cvc14", "m3fd", "fmb", "tno", "roadscene", "hit_uav", "llvip", "msrs", "folder"} <= set(NAMES)
    assert set(TREES) == set(PUBLIC) == set(OTHERS)


@pytest.mark.parametrize("name", NAMES)
def test_page(name):
    """A page beside each recipe tells where, on which terms, in which layout and splits, and how to run it."""
    page = (DATA_PREP / f"{name}.md").read_text(encoding="utf-8")
    assert f"difiisr prepare {name}" in page
    assert name in (DATA_PREP / "README.md").read_text(encoding="utf-8")
    if name in PUBLIC:
        assert all(f"**{word}**" in page for word in ("Where", "Terms", "Unpacked", "Splits")), name
        assert not read_recipe(DATA_PREP / f"{name}.yaml").deal or len(read_recipe(DATA_PREP / f"{name}.yaml").deal.why) > 20


def raw_facts(value, where=""):
    """Every place of the YAML file that tells of the world outside: mappings with `value`, and the word unknown."""
    if isinstance(value, dict):
        if "value" in value:
            yield where, value
        else:
            for k, v in value.items():
                yield from raw_facts(v, f"{where}.{k}")
    elif isinstance(value, list):
        for i, v in enumerate(value):
            yield from raw_facts(v, f"{where}[{i}]")
    elif value == UNKNOWN:
        yield where, value


@pytest.mark.parametrize("name", PUBLIC)
def test_every_fact_has_a_source_or_is_unknown(name):
    """Counts, splits, sizes, paths, licence and home: a value with its source, or the word unknown, in the file itself."""
    values = yaml.safe_load((DATA_PREP / f"{name}.yaml").read_text(encoding="utf-8"))
    found = dict(raw_facts(values))
    for where, fact in found.items():
        assert fact == UNKNOWN or len(fact["source"]) > 10, where
    for field in ("home", "licence", "published", "sizes", "bits", "sequence"):
        assert f".{field}" in found, f"{name} does not say {field}, not even that it is unknown"
    for layout in values["layouts"]:
        assert len(layout["source"]) > 10
        for part in layout["parts"]:
            assert part["frames"] == UNKNOWN or set(part["frames"]) <= {"value", "source", "note"}
    recipe = read_recipe(DATA_PREP / f"{name}.yaml")
    assert all(f == UNKNOWN or isinstance(f, Fact) for f in recipe.facts.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"licence": "free"}, "licence: write a value with its source"),
        ({"sizes": {"value": [[1, 1]], "source": " "}}, "sizes: write a value with its source"),
        ({"layouts": []}, "needs layouts"),
        ({"deal": {"pool": ["train"], "val": 0.1}}, "needs a reason"),
        ({"deal": {"pool": ["train"], "val": 0.1, "by": "frame", "why": "because"}}, "write sequence or number"),
        ({"deal": {"pool": ["train"], "val": 0.6, "test": 0.4, "why": "because"}}, "leaves no frames"),
        ({"kind": "trees"}, "kind 'trees'"),
    ],
)
def test_recipes_that_cannot_be_meant(tmp_path, change, message):
    """One sentence that names the file and the key."""
    values = yaml.safe_load((DATA_PREP / "llvip.yaml").read_text(encoding="utf-8")) | change
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(DataError, match=message) as caught:
        read_recipe(tmp_path / "r.yaml")
    assert str(tmp_path / "r.yaml") in str(caught.value)


def test_unknown_recipe():
    """The nearest name is suggested, and all are listed."""
    with pytest.raises(DataError, match="did you mean 'llvip'.*hit_uav"):
        find_recipe("lvip")


# What recipes do


@pytest.mark.parametrize("name", PUBLIC)
def test_recipe_on_a_tree_of_its_layout(name, built, tmp_path):
    """The infrared frames and nothing else, counts against the recipe, splits without a common video, the same bytes twice."""
    source, recipe = built(name), read_recipe(DATA_PREP / f"{name}.yaml")
    manifest = prepare(recipe, tmp_path / "out", source)
    taken = {f["origin"] for f in manifest["files"]} | {e["origin"] for e in manifest["excluded"]}
    assert taken == set(TREES[name])
    assert any("where the recipe says" in note for note in manifest["differences"]) or all(
        part.frames == UNKNOWN for part in recipe.layouts[0].parts)
    splits = {s: [f for f in manifest["files"] if f["split"] == s] for s in SPLITS}
    assert {s for s, files in splits.items() if files} == ({"test"} if name == "tno" else set(SPLITS))
    if recipe.deal and recipe.deal.by == "sequence":
        videos = [{f["sequence"] for f in files} for files in splits.values()]
        assert not videos[0] & videos[1] and not videos[0] & videos[2] and not videos[1] & videos[2]
        assert all(f["sequence"] for f in splits["train"])
    if recipe.deal and recipe.deal.by == "number":
        assert any("of another split" in e["excluded"] for e in manifest["excluded"]) or recipe.deal.gap <= 40
    for row in manifest["files"]:
        assert len(row["made_from"]) == len(row["HR"]) == len(row["LR"]) == 64 and row["bits"] in (8, 16)
        hr, original = read_image(tmp_path / "out" / row["file"]), read_image(source / row["origin"])
        assert hr.dtype == original.dtype and (row["height"], row["width"]) == hr.pixels.shape == (256, 320)
        assert np.array_equal(hr.native(), original.native())
    for split, files in splits.items():
        if files:
            assert len(list(read_pairs(tmp_path / "out" / split))) == len(files)
    lines = [json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]
    assert lines == [*manifest["files"], *manifest["excluded"]]
    before = tree(tmp_path / "out")
    assert prepare(recipe, tmp_path / "out", source) == manifest
    assert tree(tmp_path / "out") == before


def test_named_folder_or_the_one_around_it(built):
    """The same frames and splits from the set's own folder as from the folder around it."""
    recipe = read_recipe(DATA_PREP / "llvip.yaml")
    around, _ = recognize(recipe, built("llvip"))
    own, _ = recognize(recipe, built("llvip") / "LLVIP")
    assert [f.path for f in around] == [f.path for f in own] and len(own) == len(TREES["llvip"])
    assert [f"LLVIP/{f.origin}" for f in own] == [f.origin for f in around]


def test_fourteen_bit_layout(tmp_path):
    """FLIR's raw frames by their layout's name; 8-bit ones where both are there and none is named."""
    for folder, split in (("train", "train"), ("val", "val")):
        for n in range(2):
            save(tmp_path / "set" / folder / "thermal_8_bit" / f"FLIR_{split}{n}.jpeg", pixels(10 * len(split) + n))
            save(tmp_path / "set" / folder / "thermal_16_bit" / f"FLIR_{split}{n}.tiff", pixels(10 * len(split) + n, deep=True))
    recipe = read_recipe(DATA_PREP / "flir_adas_v1.yaml")
    assert {f["bits"] for f in prepare(recipe, tmp_path / "a", tmp_path / "set")["files"]} == {8}
    deep = prepare(recipe, tmp_path / "b", tmp_path / "set", layout="14 bit")
    assert {f["bits"] for f in deep["files"]} == {16} and deep["counts"] == {"train": 2, "val": 2}
    assert np.array_equal(read_image(tmp_path / "b" / deep["files"][0]["file"]).native(), pixels(50, deep=True))
    assert any(note.startswith("missing: test video/thermal_16_bit/*.tiff, 4,224 frames") for note in deep["differences"])
    with pytest.raises(DataError, match="did you mean '14 bit'"):
        prepare(recipe, tmp_path / "c", tmp_path / "set", layout="14bit")


def test_published_splits(built, tmp_path):
    """On request the published splits stay; the videos that they share are named, and twins leave training."""
    recipe = read_recipe(DATA_PREP / "hit_uav.yaml")
    manifest = prepare(recipe, tmp_path / "out", built("hit_uav"), splits="published")
    assert all(f["split"] == f["published"] for f in manifest["files"])
    shared = next(note for note in manifest["differences"] if note.startswith("videos with frames in several splits"))
    assert "0_60 (train, val)" in shared
    with pytest.raises(DataError, match="prepared with another splits"):
        prepare(recipe, tmp_path / "out", built("hit_uav"))


def test_sizes_are_compared(built, tmp_path):
    """Frames of another size than the recipe's are counted and reported, small ones left out."""
    source = tmp_path / "set"
    shutil.copytree(built("llvip"), source)
    save(source / "LLVIP/infrared/train/010001.jpg", pixels(1, (255, 700)))
    save(source / "LLVIP/infrared/train/010002.jpg", pixels(2, (1024, 1280)))
    manifest = prepare(read_recipe(DATA_PREP / "llvip.yaml"), tmp_path / "out", source, kernel="none")
    assert [e["excluded"] for e in manifest["excluded"]] == ["700×255, smaller than 256×256"]
    note = next(note for note in manifest["differences"] if "other sizes" in note)
    assert "320×256: 16" in note and "700×255: 1" in note and "1280" not in note.split("):")[1]
    assert not (tmp_path / "out" / "train" / "LR").exists() and all(f["LR"] == "" for f in manifest["files"])
    assert len(list(read_pairs(tmp_path / "out" / "train"))) == manifest["counts"]["train"]  # LR is made on the fly


def test_duplicates_leave_training(built, tmp_path):
    """A copy, a re-encoded copy and a noisy one of test frames are not trained on; neighbours within a split stay."""
    source = tmp_path / "set"
    shutil.copytree(built("fmb"), source)
    first, second, third = (source / f"FMB/test/Infrared/{n:05d}.png" for n in range(3))
    train = source / "FMB/train/Infrared"
    shutil.copy(first, train / "00001.png")
    save(train / "00002.png", (pixels(21) + np.random.default_rng(0).normal(0, 2, (256, 320))).clip(0, 255).astype(np.uint8))
    save(train / "00003.png", np.roll(pixels(5), 1, axis=1))  # of 00150, also in training
    shutil.copy(train / "00030.png", train / "00031.png")
    manifest = prepare(read_recipe(DATA_PREP / "fmb.yaml"), tmp_path / "out", source)
    gone = {Path(e["origin"]).stem: e["excluded"] for e in manifest["excluded"] if "of another split" not in e["excluded"]}
    assert gone["00001"] == "same bytes as test frame FMB/test/Infrared/00000.png"
    assert gone["00002"].startswith("looks like test frame FMB/test/Infrared/00001.png")
    assert gone["00031"] == "same bytes as train frame FMB/train/Infrared/00030.png" and set(gone) == {"00001", "00002", "00031"}
    with pytest.raises(DataError, match="3 images cannot be used") as caught:
        prepare(read_recipe(DATA_PREP / "fmb.yaml"), tmp_path / "strict", source, strict=True)
    assert all(f"{n}.png" in str(caught.value) for n in ("00001", "00002", "00031")) and not (tmp_path / "strict" / "train").exists()


def test_dealing_by_number_keeps_its_gap():
    """No frame of another split nearer than the gap, whatever the numbers; time stamps count one each."""
    random = np.random.default_rng(0)
    for _ in range(20):
        numbers = np.sort(random.choice(2000, 200, replace=False))
        frames = [SourceFrame(Path(), f"{n:05d}", "train", "train", "", int(n)) for n in numbers]
        dealt, gone = deal_splits(frames, Deal(("train",), 0.1, 0.1, "number", 25, "why"))
        by = {s: [f.number for f in dealt if f.split == s] for s in SPLITS}
        assert len(dealt) + len(gone) == 200 and len(by["test"]) == 20
        assert min(by["val"]) - max(by["train"]) >= 25 and min(by["test"]) - max(by["val"]) >= 25
    stamps = [SourceFrame(Path(), f"{n}", "train", "train", "", f"2014_05_04_23_{n // 60:02d}_{n % 60:02d}") for n in range(100)]
    dealt, gone = deal_splits(stamps, Deal(("train",), 0.2, 0.0, "number", 10, "why"))
    assert [f.split for f in dealt].count("val") == 20 and len(gone) == 9
    with pytest.raises(DataError, match="too few to deal"):
        deal_splits(stamps[:3], Deal(("train",), 0.1, 0.1, "number", 10, "why"))


def test_frames_that_others_test_with(built):
    """M3FD's ten frames go into the test set, their neighbours nowhere."""
    recipe = read_recipe(DATA_PREP / "m3fd.yaml")
    frames, _ = recognize(recipe, built("m3fd"))
    dealt, gone = deal_splits(frames, recipe.deal)
    split = {f.path.stem: f.split for f in dealt if f.published == "train"}
    assert split["00950"] == "test" and split["00975"] == split["00920"] == "train"
    assert {Path(o).stem for o in gone} >= {"00930", "00960"} and "20 from M3FD_Detection/Ir/00950.png" in gone["M3FD_Detection/Ir/00930.png"]


def test_neighbours_of_95000_frames():
    """The size of KAIST in seconds, and every planted neighbour found."""
    random = np.random.default_rng(0)
    train, test = (random.integers(0, 2**64, (n, 4), dtype=np.uint64) for n in (12_000, 8_000))
    train[::100] = test[:120] ^ np.uint64(1 << 63)
    start = time.process_time()
    distance, index = nearest(train, test)
    seconds = time.process_time() - start
    assert (distance[::100] == 4).all() and (index[::100] == np.arange(120)).all() and (np.delete(distance, np.s_[::100]) > BITS).all()
    assert seconds * (50_187 * 45_141) / (12_000 * 8_000) < 120, f"KAIST would take {seconds * 23.6:.0f} s"
    same = np.repeat(hash_words(["f" * 64]), 5000, axis=0)  # a camera that stands still, looking at nothing
    start = time.process_time()
    distance, index = nearest(same, same)
    assert (distance == 0).all() and (index == 0).all() and time.process_time() - start < 20


# Bad data, in real processes


def test_wrong_layout(tmp_path, built, capsys):
    """What is missing is named for each layout; nothing is made."""
    def here(*words) -> tuple[int, str]:
        code = cli.main(["prepare", *map(str, words), "--out", str(tmp_path / "out")])
        return code, capsys.readouterr().err

    code, out, err = run("m3fd", "--source", built("llvip"), "--out", tmp_path / "out")
    assert code == 2 and not (tmp_path / "out").exists() and not out
    assert "layout 'both archives': M3FD_Detection/Ir/*.png, M3FD_Fusion/Ir/*.png" in err and "layout 'detection': Ir/*.png" in err
    code, err = here("m3fd", "--source", tmp_path / "nowhere")
    assert code == 2 and "is no folder" in err and len(err.splitlines()) == 1
    code, err = here("lvip", "--source", tmp_path)
    assert code == 2 and "did you mean 'llvip'" in err
    code, err = here("llvip", "--source", built("llvip"), "--train", 3)
    assert code == 2 and "takes no train" in err and not (tmp_path / "out").exists()


def test_missing_split_is_an_error_and_missing_part_is_named(tmp_path, built):
    """KAIST without its test sets is refused; without one of its training sets it says which."""
    source = tmp_path / "kaist"
    shutil.copytree(built("kaist"), source)
    shutil.rmtree(source / "images/set06")
    recipe = read_recipe(DATA_PREP / "kaist.yaml")
    notes = prepare(recipe, tmp_path / "a", source)["differences"]
    assert "missing: test images/set06/V*/lwir/*.jpg, 12,988 frames" in notes
    shutil.rmtree(source / "images/set09")
    with pytest.raises(DataError, match=r"layout 'images': images/set06/V\*/lwir/\*.jpg, images/set07"):
        prepare(recipe, tmp_path / "b", source)


def test_every_offender_is_named(tmp_path, built):
    """Cut off, empty, in colours, no image at all: the list of all of them, exit code 2, nothing written."""
    source = tmp_path / "set"
    shutil.copytree(built("fmb"), source)
    train = source / "FMB/train/Infrared"
    good = (train / "00030.png").read_bytes()
    (train / "00000.png").write_bytes(good[: len(good) // 2])
    (train / "00060.png").write_bytes(b"")
    (train / "00090.png").write_text("a page that says: not found")
    save(train / "00120.png", np.stack([pixels(1), pixels(2), pixels(3)], -1))
    save(train / "00150.png", np.stack([255 - pixels(4)] * 3, -1))  # gray in three channels is fine
    code, out, err = run("fmb", "--source", source, "--out", tmp_path / "out")
    assert code == 2 and not (tmp_path / "out").exists()
    assert "4 images cannot be used" in err
    for n in ("00000", "00060", "00090", "00120"):
        assert str(train / f"{n}.png") in err
    assert "00030" not in err and "00150" not in err


def iron(levels: np.ndarray) -> np.ndarray:
    """Gray levels in the colours of an iron palette, black over violet and orange to white."""
    stops, colours = [0, 64, 128, 192, 255], np.array([[0, 0, 0], [80, 0, 140], [220, 60, 40], [255, 180, 0], [255, 255, 255]])
    return np.stack([np.interp(levels, stops, colours[:, k]) for k in range(3)], -1).astype(np.uint8)


def test_colour_mapped_frames_are_refused(tmp_path, built):
    """An iron picture, as PNG and as JPEG, is named with the reason."""
    source = tmp_path / "set"
    shutil.copytree(built("llvip"), source)
    for name in ("010001.jpg", "020002.jpg"):
        save(source / "LLVIP/infrared/train" / name, iron(pixels(3)))
    with pytest.raises(DataError, match="2 images cannot be used") as caught:
        prepare(read_recipe(DATA_PREP / "llvip.yaml"), tmp_path / "out", source)
    assert "010001.jpg" in str(caught.value) and "020002.jpg" in str(caught.value) and "colour" in str(caught.value)
    with pytest.raises(ImageError):
        read_image(source / "LLVIP/infrared/train/010001.jpg")


def test_any_image_error_is_collected(tmp_path, built):
    """Whatever the reader refuses, and for whatever reason, is in the list."""
    def reading(path: Path) -> ThermalImage:
        if path.name in ("010001.jpg", "200001.jpg"):
            raise ImageError(f"cannot read {path}: it is rainbow")
        return read_image(path)

    files = sorted(built("llvip").rglob("infrared/*/*.jpg"))
    plan = [Planned("train", f"{i}.png", f"{i}", partial(reading, path), path) for i, path in enumerate(files)]
    with pytest.raises(DataError, match="2 images cannot be used") as caught:
        survey(plan, tmp_path / "out", {}, 4)
    assert str(caught.value).count("it is rainbow") == 2 and not (tmp_path / "out").exists()


def test_own_low_resolution(tmp_path):
    """HR and LR of a source are taken as they are; missing LR and sizes that do not fit are all named."""
    for n in range(5):
        save(tmp_path / "in/HR" / f"{n}.png", pixels(n))
        save(tmp_path / "in/LR" / f"{n}.png", pixels(n)[::4, ::4])
    recipe = read_recipe(DATA_PREP / "folder.yaml")
    manifest = prepare(recipe, tmp_path / "out", tmp_path / "in", validation=2, kernel="box")
    for row in manifest["files"]:
        n = int(Path(row["name"]).stem)
        assert np.array_equal(read_image(tmp_path / "out" / row["split"] / "LR" / row["name"]).native(), pixels(n)[::4, ::4])
    save(tmp_path / "in/LR/1.png", pixels(1)[::2, ::2])
    save(tmp_path / "in/LR/3.png", pixels(3, deep=True)[::4, ::4])
    with pytest.raises(DataError, match="2 images cannot be used") as caught:
        prepare(recipe, tmp_path / "bad", tmp_path / "in", validation=2)
    assert "HR/1.png is 320×256, not 4 times its LR" in str(caught.value) and "160×128" in str(caught.value)
    assert "HR/3.png is uint8, its LR" in str(caught.value)
    (tmp_path / "in/LR/0.png").unlink()
    (tmp_path / "in/LR/4.png").unlink()
    code, _, err = run("folder", "--source", tmp_path / "in", "--out", tmp_path / "bad", "--validation", 2)
    assert code == 2 and "0.png has no low-resolution image" in err and "4.png has no low-resolution image" in err
    assert not (tmp_path / "bad").exists()


def test_temperatures_go_into_tiff(tmp_path, monkeypatch):
    """A file that a reader turns into kelvin, such as a radiometric JPEG, does not end in a PNG."""
    for n in range(3):
        save(tmp_path / "in" / f"{n}.jpg", pixels(n))

    def radiometric(path: Path) -> ThermalImage:
        return ThermalImage.from_native(read_image(path).native().astype(np.float32) / 4 + 280)

    monkeypatch.setattr("difiisr_dwt.planning.read_image", radiometric)
    recipe = read_recipe(DATA_PREP / "folder.yaml")
    manifest = prepare(recipe, tmp_path / "out", tmp_path / "in", validation=1)
    assert {Path(f["name"]).suffix for f in manifest["files"]} == {".tif"} and {f["dtype"] for f in manifest["files"]} == {"float32"}
    first = manifest["files"][0]
    kelvin = radiometric(tmp_path / "in" / first["origin"]).native()
    assert np.array_equal(read_image(tmp_path / "out" / first["file"]).native(), kelvin)
    assert prepare(recipe, tmp_path / "out", tmp_path / "in", validation=1) == manifest


def halves(folder: Path) -> list[str]:
    """Files that are no whole image or JSON, and what a kill or a full disk leaves."""
    bad = [str(p) for p in folder.rglob(".*")]
    for path in folder.rglob("*.png"):
        try:
            read_image(path)
        except ImageError:
            bad.append(str(path))
    return bad


def test_full_disk(tmp_path, built):
    """Files may not grow beyond 30 kB: one sentence, no half file; with room, the run goes on to the same bytes."""
    source, words = built("fmb"), ("fmb", "--source", built("fmb"), "--out")
    code, out, err = run(*words, tmp_path / "out", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000)))
    assert code == 2 and len(err.strip().splitlines()) == 1 and "File too large" in err and "run again" in err
    assert not halves(tmp_path / "out") and not list((tmp_path / "out").glob("manifest.json*"))
    assert run(*words, tmp_path / "out")[0] == 0
    prepare(read_recipe(DATA_PREP / "fmb.yaml"), tmp_path / "whole", source)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_really_full_disk(tmp_path, built):
    """The same on a file system of 700 kB, where one can be mounted."""
    out = tmp_path / "small"
    out.mkdir()
    words = f"{sys.executable} -m difiisr_dwt.cli prepare fmb --source {built('fmb')} --out {out}/out"
    look = f"find {out} -name '.*' -type f; find {out} -name 'manifest.json'; ls {out}/out"
    script = f"mount -t tmpfs -o size=700k tmpfs {out} || exit 77; {words}; echo code $?; {look}"
    env = os.environ | {"PYTHONPATH": str(DATA_PREP.parent), "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(["unshare", "-rm", "sh", "-c", script], cwd=DATA_PREP.parent, env=env, capture_output=True, text=True)
    except OSError:
        pytest.skip("no unshare here")
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("file systems cannot be mounted here")
    lines = done.stdout.splitlines()
    assert lines[0] == "code 2" and "No space left on device" in done.stderr and "run again" in done.stderr, done
    assert [line for line in lines[1:] if "/" in line] == [], "a half file or a manifest was left"


def test_killed_at_any_moment(tmp_path, built):
    """SIGKILL while looking, while writing, while finishing; the result is that of one run, byte by byte."""
    script = """
import os, signal, sys
import pathlib
count = [0]
def tick():
    count[0] += 1
    if count[0] == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
replace, opened = os.replace, pathlib.Path.open
def replacing(*a): tick(); replace(*a)
def opening(self, mode='r', *a, **k):
    if mode == 'a': tick()
    return opened(self, mode, *a, **k)
os.replace, pathlib.Path.open = replacing, opening
from difiisr_dwt.preparation import prepare
from difiisr_dwt.recipes import find_recipe, read_recipe
prepare(read_recipe(find_recipe('fmb')), sys.argv[1], sys.argv[2])
"""
    env = os.environ | {"PYTHONPATH": str(DATA_PREP.parent), "OMP_NUM_THREADS": "1"}

    def go(out: Path, at: int) -> int:
        words = [sys.executable, "-c", script, out, built("fmb"), str(at)]
        return subprocess.run(words, env=env, cwd=DATA_PREP.parent, capture_output=True).returncode

    assert go(tmp_path / "whole", -1) == 0
    n = len(TREES["fmb"])
    looked = []
    for at in (n // 2, n + 10, 31):
        if go(tmp_path / "killed", at) == -signal.SIGKILL:
            looked.append(len(list((tmp_path / "killed").rglob("*.png"))))
    assert len(looked) == 3 and looked[-1] > looked[0], looked
    assert go(tmp_path / "killed", -1) == 0
    assert tree(tmp_path / "killed") == tree(tmp_path / "whole")


def test_command_line(tmp_path, built, capsys):
    """The report tells counts, what differs and what was left out; the second run says the same and touches nothing."""
    words = ("roadscene", "--source", built("roadscene"), "--out", tmp_path / "out", "--kernel", "box")
    code, out, err = run(*words)
    assert code == 0 and not err
    assert "30 frames, where the recipe says 221" in out and "manifest.json" in out.splitlines()[-1]
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    assert run(*words) == (code, out, err)
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    words = ["prepare", "scenes", "--out", str(tmp_path / "scenes"), "--train", "2", "--validation", "1", "--size", "64", "96"]
    assert cli.main(words) == 0 and "2 train, 1 val" in capsys.readouterr().out
    assert cli.main(["prepare", "scenes", "--out", str(tmp_path / "scenes"), "--train", "3"]) == 2


def test_stage(tmp_path, built):
    """The papermill stage carries out a public recipe, a folder and procedural scenes from an experiment file."""
    for n in range(4):
        write_image(tmp_path / "frames" / f"{n}.png", ThermalImage.from_native(render_scene(n, (256, 256)).image))
    (tmp_path / "e.yaml").write_text(yaml.safe_dump({"runs": [
        {"name": "public", "stage": "prepare", "params": {"recipe": "llvip", "source": str(built("llvip")), "kernel": "none"}},
        {"name": "own", "stage": "prepare", "params": {"recipe": "folder", "source": str(tmp_path / "frames"), "train": 0, "validation": 1}},
        {"name": "scenes", "stage": "prepare", "params": {"recipe": "scenes", "train": 2, "validation": 1, "size": [64, 64]}},
    ]}))
    words = [sys.executable, "-m", "difiisr_dwt.cli", "run", str(tmp_path / "e.yaml"), "--root", str(tmp_path / "reports")]
    env = os.environ | {"PYTHONPATH": str(DATA_PREP.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=env, cwd=DATA_PREP.parent, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = [json.loads(p.read_text()) for p in sorted((tmp_path / "reports").rglob("metrics.json"))]
    assert len(metrics) == 3 and all(m["summary"]["training pairs"] > 1 for m in metrics)
    public = next(m for m in metrics if "LLVIP" in m["title"])
    table = next(t for t in public["tables"] if t["title"].startswith("What the recipe says"))
    assert any("12025" in str(row) for row in table["rows"]) and public["protocol"].startswith("HR only")
