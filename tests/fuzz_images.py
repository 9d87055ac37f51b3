"""Mutated image files of every kind through `difiisr upscale`, in real processes: what must not happen, counted.

    python tests/fuzz_images.py --count 5000 --seed 0

Small valid files are written by Pillow, tifffile and imagecodecs; most are then damaged (bits, cuts, splices, lengths and
counts in headers), a fifth stay whole. Folders of some hundreds go to one process each. Of each process: exit code 0 or 2 as
its summary says, one sentence per failed file and nothing else on stderr, no file over ten seconds, every input accounted for
and untouched, every result whole, nothing else left behind; and of each whole file a result of the right size.
"""
import argparse
import hashlib
import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import imagecodecs
import numpy as np
import tifffile
import torch
from flir_file import Camera, flir_jpeg
from PIL import Image

from difiisr_dwt import cli
from difiisr_dwt.batch import RECORDS
from difiisr_dwt.images import IMAGE_SUFFIXES
from difiisr_dwt.models import ModelConfig, NetworkConfig, RestorationModel, save_model
from difiisr_dwt.thermal_scenes import render_scene

LIMIT = 10.0  # seconds for one file
NAMES = ("{}{}", "with space {}{}", "ünï–{}{}", "new\nline {}{}", "-dash{}{}", "quo'te\"{}{}", "{}.tar.gz{}", "Ω 温度 {}{}", "{}{}".upper())


@dataclass(frozen=True)
class Seed:
    """A valid file, and the frame that is in it; None where it holds no single infrared frame."""

    name: str
    suffix: str
    data: bytes
    shape: tuple[int, int] | None


def _pillow(picture, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, **options)
    return buffer.getvalue()


def _tiff(array: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **options)
    return buffer.getvalue()


def seeds() -> list[Seed]:
    """One file of every kind that cameras and programs write."""
    scene = render_scene(4, (40, 53)).image
    gray, deep = scene, scene.astype(np.uint16) * 11 + 7000
    kelvin = (280 + scene / 10).astype(np.float32)
    masked = kelvin.copy()
    masked[3:9, 4] = np.nan
    masked[20, 20] = np.inf
    rgb, alpha = np.repeat(gray[..., None], 3, -1), np.full_like(gray, 255)
    picture = Image.fromarray(gray)
    palette = picture.convert("P")
    palette.putpalette([v for k in range(256) for v in (k, k, k)])
    coloured = picture.convert("P")
    coloured.putpalette([v for k in range(256) for v in (k, 255 - k, k // 2)])
    large = np.tile(deep, (3, 3))
    good = {
        "gray8.png": _pillow(picture, "PNG"), "gray16.png": imagecodecs.png_encode(deep), "palette.png": _pillow(palette, "PNG"),
        "alpha.png": imagecodecs.png_encode(np.dstack([gray, alpha])), "rgb.png": imagecodecs.png_encode(rgb),
        "rgba16.png": imagecodecs.png_encode(np.dstack([np.repeat(deep[..., None], 3, -1), np.full_like(deep, 65535)])),
        "interlaced.png": _interlaced(gray), "gray.jpg": _pillow(picture, "JPEG"), "progressive.jpg": _pillow(picture, "JPEG", progressive=True),
        "rgb.jpeg": _pillow(Image.fromarray(rgb), "JPEG"), "flir.jpg": flir_jpeg(Camera().counts(kelvin.astype(np.float64)), Camera(), gray),
        "gray.bmp": _pillow(picture, "BMP"),
        "rgb.bmp": _pillow(Image.fromarray(rgb), "BMP"), "gray8.tif": _tiff(gray), "gray16.tif": _tiff(deep),
        "bigendian.tif": _tiff(deep, byteorder=">"), "bigendian-lzw.tif": _tiff(deep, byteorder=">", compression="lzw", predictor=True),
        "deflate.tif": _tiff(deep, compression="zlib", predictor=True), "zstd.tif": _tiff(deep, compression="zstd"),
        "packbits.tif": _tiff(gray, compression="packbits"), "jpeg.tif": _tiff(gray, compression="jpeg"),
        "tiled.tif": _tiff(large, tile=(64, 64)), "tiled-lzw.tif": _tiff(large, tile=(64, 64), compression="lzw"),
        "tiled-deflate.tif": _tiff(large, tile=(32, 48), compression="zlib"), "strips.tif": _tiff(large, rowsperstrip=7),
        "big.tif": _tiff(deep, bigtiff=True), "planar.tif": _tiff(np.stack([deep] * 3), photometric="rgb", planarconfig="separate"),
        "white.tif": _tiff(255 - gray, photometric="miniswhite"), "pillow.tiff": _pillow(Image.fromarray(deep), "TIFF"),
        "pillow-lzw.tiff": _pillow(picture, "TIFF", compression="tiff_lzw"), "palette.tif": _pillow(palette, "TIFF"),
        "float.tif": _tiff(kelvin), "float64.tif": _tiff(kelvin.astype(np.float64), compression="zlib"), "half.tif": _tiff((scene / 255).astype(np.float16)),
        "masked.tif": _tiff(masked, compression="zlib", predictor=3), "all-nan.tif": _tiff(np.full((9, 8), np.nan, np.float32)),
        "constant.png": _pillow(Image.new("L", (30, 20), 77), "PNG"), "one.png": _pillow(Image.new("L", (1, 1), 3), "PNG"),
        "wide.png": _pillow(Image.fromarray(np.tile(gray[:1], (1, 20))), "PNG"), "tall.tif": _tiff(np.tile(deep[:, :1], (20, 1))),
    }
    bad = {
        "coloured.png": _pillow(coloured, "PNG"), "bits.png": _pillow(picture.convert("1"), "PNG"),
        "cmyk.jpg": _pillow(Image.fromarray(rgb).convert("CMYK"), "JPEG"),
        "cmyk.tif": _pillow(Image.fromarray(rgb).convert("CMYK"), "TIFF"), "frames.tif": _tiff(np.stack([deep] * 3), photometric="minisblack"),
        "eight.tif": _tiff(np.repeat(gray[..., None], 8, -1), photometric="minisblack", planarconfig="contig"), "signed.tif": _tiff(deep.astype(np.int16)),
        "complex.tif": _tiff(kelvin.astype(np.complex64)), "bits.tif": _pillow(picture.convert("1"), "TIFF", compression="group4"),
        "pgm.png": _pillow(picture, "PPM"), "webp.png": _pillow(picture, "WEBP", lossless=True), "jpeg2000.jpg": _pillow(picture, "JPEG2000"),
        "gif.bmp": _pillow(picture, "GIF"), "bomb.png": _bomb(), "text.tif": b"no image\n" * 40, "empty.png": b"",
    }
    result = [Seed(name, Path(name).suffix, data, _shape(name, data, gray.shape)) for name, data in good.items()]
    return result + [Seed(name, Path(name).suffix, data, None) for name, data in bad.items()]


def _shape(name: str, data: bytes, usual: tuple[int, int]) -> tuple[int, int]:
    if name == "planar.tif" or name == "flir.jpg":
        return usual
    if Path(name).suffix.startswith(".tif"):
        return tuple(tifffile.imread(io.BytesIO(data)).shape[:2])
    return Image.open(io.BytesIO(data)).size[::-1]


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _end(rows: bytes) -> bytes:
    return _chunk(b"IDAT", zlib.compress(rows)) + _chunk(b"IEND", b"")


def _bomb() -> bytes:
    """A PNG that declares 60,000×60,000 pixels."""
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)) + _end(bytes(9999))


def _interlaced(gray: np.ndarray) -> bytes:
    """A PNG in the seven passes of Adam7, which neither Pillow nor imagecodecs writes."""
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))  # top, left, down, right
    rows = b"".join(b"\0" + row.tobytes() for top, left, down, right in passes for row in gray[top::down, left::right])
    height, width = gray.shape
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 1)) + _end(rows)


def mutate(data: bytes, others: list[bytes], rng: np.random.Generator) -> bytes:
    """One to four kinds of damage, which the checksums of a PNG tell only half of the time."""
    data = bytearray(data)
    for _ in range(min(rng.integers(1, 5), rng.integers(1, 5))):
        if not data:
            break
        kind, head = rng.integers(9), min(len(data), 400)
        at, length = int(rng.integers(len(data))), int(rng.integers(1, 60))
        if kind == 0:  # bits, anywhere
            for position in rng.integers(len(data), size=rng.integers(1, 9)):
                data[position] ^= 1 << int(rng.integers(8))
        elif kind == 1:  # bytes of the header
            for position in rng.integers(head, size=rng.integers(1, 5)):
                data[position] = int(rng.integers(256))
        elif kind == 2:  # cut off
            del data[at:]
        elif kind == 3:  # a piece of another file, over it
            other = others[rng.integers(len(others))]
            data[at:at + length] = other[at:at + length]
        elif kind == 4:  # a piece of another file, within it
            other = others[rng.integers(len(others))]
            data[at:at] = other[:length]
        elif kind == 5:  # lengths and counts: an interesting number where one may stand
            position = int(rng.integers(head)) & ~1
            number = [0, 1, 2, 255, 256, 9999, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, len(data), 30000][rng.integers(14)]
            layout = ("<I", ">I", "<H", ">H")[rng.integers(4)]
            field_ = struct.pack(layout, number & (0xFFFF if layout[1] == "H" else 0xFFFFFFFF))
            data[position:position + len(field_)] = field_
        elif kind == 6:  # missing in the middle
            del data[at:at + length]
        elif kind == 7:  # zeros, as of a disk that was full
            data[at:at + length] = bytes(min(length, len(data) - at))
        else:  # twice
            data[at:at] = data[at:at + length]
    return mended(bytes(data)) if rng.random() < 0.5 else bytes(data)


def mended(data: bytes) -> bytes:
    """A PNG with the checksums that its chunks should have, so that damage comes to the decoder; another file as it is."""
    result, position = data[:8], 8
    if result != b"\x89PNG\r\n\x1a\n":
        return data
    while position + 12 <= len(data):
        length = int.from_bytes(data[position:position + 4], "big")
        result += _chunk(data[position + 4:position + 8], data[position + 8:position + 8 + length])
        position += 12 + length
    return result + data[position:]


@dataclass
class Folder:
    """One process's inputs: for each path the hash, the seed's name, and the shape that must come out (None: anything)."""

    path: Path
    files: dict[str, tuple[str, str, tuple[int, int] | None]] = field(default_factory=dict)


def write_folder(path: Path, count: int, kinds: list[Seed], rng: np.random.Generator) -> Folder:
    """Files to work on."""
    folder, pool = Folder(path), [s.data for s in kinds]
    for k in range(count):
        seed = kinds[rng.integers(len(kinds))]
        whole = rng.random() < 0.2
        data = seed.data if whole else mutate(seed.data, pool, rng)
        name = NAMES[rng.integers(len(NAMES))] if rng.random() < 0.3 else NAMES[0]
        file = path / ("sub" if rng.random() < 0.2 else "") / name.format(f"{k:04d}-{Path(seed.name).stem}", seed.suffix)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        folder.files[str(file)] = (hashlib.sha256(data).hexdigest(), seed.name, seed.shape if data == seed.data else None)
    return folder


def run(folder: Folder, out: Path, model: Path, jobs: int) -> tuple[int, str, list[dict], float]:
    """Exit code, stderr, rows of the summary, seconds."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    summary, start = out.with_suffix(".json"), time.monotonic()
    words = [sys.executable, "-m", "difiisr_dwt.cli", "upscale", str(folder.path), "--out", str(out), "--model", str(model),
             "--json", str(summary), "--jobs", str(jobs), "--threads", "1"]  # fmt: skip
    process = subprocess.Popen(words, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace")
    try:
        _, err = process.communicate(timeout=60 + LIMIT * len(folder.files))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        return -9, "it did not end", [], time.monotonic() - start
    rows = json.loads(summary.read_text())["files"] if summary.exists() else []
    return process.returncode, err, rows, time.monotonic() - start


def _size(path: Path) -> tuple[int, int]:
    """Pixels of a result, by a reader that must read all of it."""
    if path.suffix in (".tif", ".tiff"):
        return tifffile.imread(path).shape
    with Image.open(path) as picture:
        picture.load()
        return picture.size[::-1]


def judge(folder: Folder, out: Path, code: int, err: str, rows: list[dict]) -> tuple[Counter, list[str]]:
    """What came out, and every sentence about what should not have happened."""
    wrong, counts = [], Counter()
    by_source = {row["source"]: row for row in rows}
    failed = [row for row in rows if row["state"] == "failed"]
    if code != (2 if failed else 0):
        wrong.append(f"exit code {code} with {len(failed)} failed: {err[-2000:]}")
    if "Traceback" in err:
        wrong.append(f"traceback: {err[err.index('Traceback') - 400:][:3000]}")
    lines = err.splitlines()
    if len(lines) != len(failed) or not all(line.startswith("difiisr: cannot ") for line in lines):
        wrong.append(f"{len(lines)} lines of stderr for {len(failed)} failed files: {[line for line in lines if not line.startswith('difiisr: cannot ')][:5]}")
    if sorted(by_source) != sorted(folder.files) or len(rows) != len(folder.files):
        wrong.append(f"{len(rows)} of {len(folder.files)} files in the summary")
    results = {row["result"] for row in rows if row["state"] == "done"}
    present = {str(p) for p in out.rglob("*") if p.is_file() and p.name != RECORDS}
    if present != results or len(results) != sum(row["state"] == "done" for row in rows):
        wrong.append(f"left behind: {sorted(present - results)[:5]}, lost: {sorted(results - present)[:5]}")
    for name, (digest, kind, shape) in folder.files.items():
        row = by_source.get(name, {"state": "lost", "seconds": 0.0})
        counts[row["state"]] += 1
        counts["whole"] += shape is not None
        if not Path(name).exists() or hashlib.sha256(Path(name).read_bytes()).hexdigest() != digest:
            wrong.append(f"{name} was touched")
        if row["seconds"] > LIMIT:
            wrong.append(f"{name} ({kind}) took {row['seconds']:.1f} s: {row}")
        if shape and row["state"] != "done":
            wrong.append(f"{name} ({kind}) is whole and was not done: {row}")
        if row["state"] == "done":
            try:
                size = _size(Path(row["result"]))
            except Exception as error:
                wrong.append(f"{row['result']} is half-written: {error}")
                continue
            if size[0] % 4 or size[1] % 4 or (shape and tuple(size) != (4 * shape[0], 4 * shape[1])):
                wrong.append(f"{row['result']} ({kind}) has {size} pixels, from {shape}")
            counts["whole done"] += shape is not None
    return counts, wrong


def tiny_model(path: Path) -> Path:
    """A network of a few channels, that changes the picture."""
    torch.manual_seed(0)
    model = RestorationModel(ModelConfig(network=NetworkConfig(channels=(8, 8), blocks=1, groups=4, embedding_channels=16)), sigma=torch.full((16,), 0.03))
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    save_model(path, model)
    return path


def fuzz(count: int, seed: int, per_folder: int = 250, keep: Path | None = None) -> tuple[dict, list[str]]:
    """Run all of it: numbers, and what went wrong."""
    rng, kinds, total, wrong, slowest = np.random.default_rng(seed), seeds(), Counter(), [], (0.0, "")
    assert {s.suffix for s in kinds} <= set(IMAGE_SUFFIXES)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        model, start = tiny_model(root / "tiny.safetensors"), time.monotonic()
        for number in range(-(-count // per_folder)):
            folder = write_folder(root / f"in{number}", min(per_folder, count - number * per_folder), kinds, rng)
            code, err, rows, _ = run(folder, root / f"out{number}", model, jobs=1 + number % 2)
            counts, problems = judge(folder, root / f"out{number}", code, err, rows)
            if problems and keep:
                shutil.copytree(folder.path, keep / f"seed{seed}-{number}", dirs_exist_ok=True)
            total, wrong = total + counts, wrong + [f"folder {number}: {p}" for p in problems]
            slowest = max([slowest, *((row["seconds"], row["source"]) for row in rows)])
            print(f"folder {number}: {dict(counts)}, {len(problems)} wrong", file=sys.stderr, flush=True)
            for path in root.glob(f"*{number}"):
                shutil.rmtree(path)
    return {**total, "wrong": len(wrong), "slowest": slowest[0], "slowest file": Path(slowest[1]).name, "seconds": time.monotonic() - start}, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="where to copy folders in which something went wrong")
    arguments = parser.parse_args()
    numbers, wrong = fuzz(arguments.count, arguments.seed, keep=arguments.keep)
    print(json.dumps(numbers, indent=2))
    for sentence in wrong:
        print(sentence)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
