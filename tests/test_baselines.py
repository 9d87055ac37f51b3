"""Others' methods beside ours: interpolation and sharpening exactly, networks trained, resumed, tiled, and read from foreign files."""
import sys

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from skimage.filters import unsharp_mask as skimage_unsharp_mask

from difiisr_dwt.baselines import BASELINES, enlarge, make_baseline
from difiisr_dwt.checkpoints import TrainingError
from difiisr_dwt.classical import ENLARGERS, SHARPENERS, bicubic, bicubic_cv2, high_pass, lanczos, unsharp_mask
from difiisr_dwt.configuration import configure
from difiisr_dwt.consistency import back_project
from difiisr_dwt.degradations import KERNELS, downsample_pixels, resize_matrix
from difiisr_dwt.images import ThermalImage
from difiisr_dwt.models import ModelConfig, ModelError, RestorationModel
from difiisr_dwt.pipeline import FILTERS, ClassicalResolver, SuperResolver, apply_filters
from difiisr_dwt.preflight import check_before
from difiisr_dwt.tiling import split
from difiisr_dwt.train_config import TrainConfig
from difiisr_dwt.training import train

TINY = {
    "edsr": {"features": 8, "blocks": 2},
    "rcan": {"groups": 1, "blocks": 2, "features": 8, "reduction": 4},
    "swinir": {"embed": 12, "depths": [2], "heads": [2], "window": 4},
}
ARRAYS = {
    "uint8": lambda rng: rng.integers(0, 256, (37, 53), np.uint8),
    "uint16": lambda rng: rng.integers(0, 65536, (37, 53), np.uint16),
    "float32": lambda rng: rng.normal(300, 8, (37, 53)).astype(np.float32),
    "float64": lambda rng: rng.normal(-20, 8, (37, 53)),
}


def frame(kind: str = "uint8") -> ThermalImage:
    """37×53 pixels that no window divides."""
    return ThermalImage.from_native(ARRAYS[kind](np.random.default_rng(0)))


# ---- interpolation and sharpening ----
def test_bicubic_and_lanczos_are_pillows():
    """8-bit frames bit for bit, others to its float32."""
    for method, how in ((bicubic, Image.Resampling.BICUBIC), (lanczos, Image.Resampling.LANCZOS)):
        for kind in ARRAYS:
            native = frame(kind).native()
            image = Image.fromarray(native if kind == "uint8" else native.astype(np.float32))
            expected, found = np.asarray(image.resize((212, 148), how)), method(frame(kind))
            if kind == "uint8":
                assert np.array_equal(found, expected)
            else:
                expected = np.clip(np.rint(expected), 0, 65535) if kind == "uint16" else expected
                assert np.abs(found - expected.astype(np.float64)).max() <= (1 if kind == "uint16" else 1e-3)


def test_bicubic_cv2_is_opencvs():
    """8-bit frames bit for bit but at ties, which OpenCV decides in float32; others to rounding."""
    for kind in ARRAYS:
        native = frame(kind).native()
        expected, found = cv2.resize(native, (212, 148), interpolation=cv2.INTER_CUBIC), bicubic_cv2(frame(kind))
        if kind == "uint8":
            rows, columns = (resize_matrix(n, 4 * n, "cv2-cubic") for n in native.shape)
            exact = rows @ native.astype(float) @ columns.T
            other = found != expected
            assert other.mean() < 1e-4 and (np.abs(exact[other] % 1 - 0.5) < 1e-4).all()
        else:
            assert np.abs(found.astype(float) - expected).max() <= (1 if kind == "uint16" else 1e-3)
    assert not np.array_equal(bicubic(frame()), bicubic_cv2(frame()))


@pytest.mark.parametrize("kind", ARRAYS)
def test_unsharp_mask_and_high_pass_are_their_formulas(kind):
    """Against scikit-image, and against shifted sums."""
    like, rng = frame(kind), np.random.default_rng(1)
    x = ARRAYS[kind](rng)
    smooth = x.astype(np.float64)
    rounded = (lambda y: np.clip(np.rint(y), 0, np.iinfo(x.dtype).max)) if x.dtype.kind == "u" else (lambda y: y)
    expected = skimage_unsharp_mask(smooth, radius=1.7, amount=0.8, preserve_range=True)
    found = unsharp_mask(x, like, sigma=1.7, amount=0.8)
    assert found.dtype == x.dtype and np.abs(found - rounded(expected)).max() <= (0 if x.dtype.kind == "u" else 1e-3)
    padded = np.pad(smooth, 1, mode="symmetric")
    around = sum(padded[i:i + 37, j:j + 53] for i in range(3) for j in range(3) if (i, j) != (1, 1)) / 8
    found = high_pass(x, like, amount=1.5)
    wanted = rounded(smooth + 1.5 * (smooth - around))
    assert found.dtype == x.dtype and np.abs(found - wanted).max() <= (1 if x.dtype.kind == "u" else 1e-3)


def test_integers_are_clipped_to_their_bits():
    """14-bit counts stay below 2¹⁴ however much is added."""
    rng = np.random.default_rng(0)
    like = ThermalImage.from_native(rng.choice(np.array([0, 16383], np.uint16), (20, 20)), {"bits": 14})
    for name, method in ENLARGERS.items():
        sr = method(like)
        assert sr.max() <= 16383, name
        for sharpener in SHARPENERS.values():
            assert sharpener(sr, like, amount=3.0).max() <= 16383


@pytest.mark.parametrize("kind", ARRAYS)
def test_classical_resolver(kind):
    """Names are chains; every dtype comes back; masks stay; a frame mapped to few counts scores as well."""
    native = frame(kind).native()
    for name in (*ENLARGERS, *FILTERS, "lanczos + back-projection + high-pass"):
        sr = ClassicalResolver(name).upscale(native)
        assert sr.shape == (148, 212) and sr.dtype == native.dtype
        spread = np.ptp(native.astype(float))
        assert np.abs(sr.astype(float).mean() - native.astype(float).mean()) < 0.02 * spread, name
    tolerance = 0 if native.dtype.kind == "u" else 1e-3
    assert np.abs(ClassicalResolver("bicubic-cv2").upscale(native).astype(float) - bicubic_cv2(frame(kind))).max() <= tolerance
    chain = apply_filters(bicubic(frame(kind)), frame(kind), ["unsharp mask"])
    assert np.abs(ClassicalResolver("unsharp mask").upscale(native).astype(float) - chain).max() <= tolerance
    if native.dtype.kind == "f":
        native = native.copy()
        native[5:8, 9] = np.nan
        for name in (*ENLARGERS, *FILTERS):
            sr = ClassicalResolver(name).upscale(native)
            assert np.isnan(sr).sum() == 3 * 16 and np.isnan(sr[20:32, 36:40]).all(), name


def test_back_projection_brings_the_lr_back():
    """By each kernel that is known, and by no other."""
    for kernel in KERNELS:
        sr = ClassicalResolver("back-projection", kernel).upscale(frame("float64").native())
        before, after = (np.abs(downsample_pixels(x, kernel) - frame("float64").native()).mean() for x in (bicubic(frame("float64")), sr))
        assert after < 0.5 * before, kernel
    pixels = torch.from_numpy(frame().pixels)[None, None]
    start = torch.from_numpy(bicubic(frame()) / np.float32(255))[None, None]
    expected = np.clip(np.rint(back_project(start, pixels, "box")[0, 0].double().numpy() * 255), 0, 255)
    assert np.array_equal(ClassicalResolver("bicubic + back-projection", "box").upscale(frame().native()), expected)
    for name, kernel, word in (("bicubik", "bicubic", "did you mean 'bicubic'"), ("bicubic + sharp", "bicubic", "filter"),
                               ("back-projection", "unknown", "kernel")):
        with pytest.raises(ModelError, match=word):
            ClassicalResolver(name, kernel).upscale(frame().native())


# ---- networks ----
def test_sizes():
    """Parameters with one channel, written down where they are quoted."""
    counts = {name: sum(p.numel() for p in make_baseline(name)[0].parameters()) for name in BASELINES}
    assert counts == {"edsr": 1_515_265 + 0, "rcan": 1_339_564, "swinir": 911_236}


@pytest.mark.parametrize("name", TINY)
def test_any_size_and_untouched_input(name):
    """One pixel, odd sides, sides below a window; the LR is not written to, and what was not padded is not changed by padding."""
    torch.manual_seed(0)
    network, multiple = make_baseline(name, TINY[name])
    network.eval()
    with torch.no_grad():
        for height, width in ((1, 1), (3, 2), (37, 53)):
            lr = torch.rand(2, 1, height, width)
            kept = lr.clone()
            sr = enlarge(network, lr, multiple)
            assert sr.shape == (2, 1, 4 * height, 4 * width) and sr.isfinite().all() and torch.equal(lr, kept)
        lr = torch.rand(1, 1, 8, 16)
        assert torch.equal(enlarge(network, lr, multiple), network(lr.clone()))


def config(name: str, **changes) -> TrainConfig:
    """A training of seconds."""
    return configure(TrainConfig, {
        "train": ["scenes:3"], "validation": ["scenes:1@1000000"], "validation_images": 1, "crop": 64, "batch": 2, "iterations": 12,
        "warmup": 2, "checkpoint_every": 4, "validate_every": 12, "log_every": 4, "sigma_batches": 2,
        "model": {"architecture": name, "codec": "pixel", "baseline": TINY[name]}} | changes)


class Enough(Exception):
    """Raised to end a training early."""


@pytest.mark.parametrize("name", TINY)
def test_trained_resumed_saved_and_run_in_tiles(name, tmp_path):
    """The trainer that trains ours: interrupted and resumed is the same; its file upscales, also in tiles."""
    def interrupt(state):
        if state.iteration == 6:
            raise Enough

    train(config(name), tmp_path / "whole")
    with pytest.raises(Enough):
        train(config(name), tmp_path / "parts", interrupt)
    train(config(name), tmp_path / "parts")
    one, two = (load_file(tmp_path / folder / "model.safetensors") for folder in ("whole", "parts"))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)

    resolver = SuperResolver.from_pretrained(tmp_path / "whole", device="cpu")
    assert resolver.max_steps == 1 and resolver.model.config.architecture == name
    for kind in ARRAYS:
        sr = resolver.upscale(frame(kind).native())
        assert sr.shape == (148, 212) and sr.dtype == np.dtype(kind)
    rng = np.random.default_rng(0)
    large = cv2.GaussianBlur(rng.normal(300, 40, (83, 101)).astype(np.float32), (0, 0), 1.5)
    whole, tiled = (resolver.upscale(large, tile=tile) for tile in (0, 64))
    difference = np.abs(whole - tiled)
    alone = np.zeros(whole.shape, bool)  # what one tile alone covers: its borders lie an overlap of 16 LR pixels away
    for part in split(83, 101, 64, 16, 4 if name == "swinir" else 1, 4):
        inside = (part.row_weights == 1)[:, None] & (part.column_weights == 1)
        alone[part.top * 4:, part.left * 4:][:part.height * 4, :part.width * 4] |= inside
    assert 0.2 < alone.mean() < 0.9 and difference.max() < 0.5 * large.std()
    # each tile has its own means, by which RCAN weighs its channels
    assert difference[alone].max() < (1e-2 if name == "rcan" else 1e-4) * large.std()
    with pytest.raises(ModelError, match="steps must be 1 for this model"):
        resolver.upscale(large, steps=2)


def test_it_learns():
    """The loss of a tiny EDSR falls, with and without the up-sampled LR added."""
    from difiisr_dwt.datasets import batches
    from difiisr_dwt.training import training_data
    from difiisr_dwt.training_step import initial_model, start_state, training_step

    for skip in (False, True):
        chosen = config("edsr", iterations=80, model={"architecture": "edsr", "codec": "pixel", "baseline": TINY["edsr"] | {"skip": skip}})
        data = training_data(chosen)
        state = start_state(initial_model(chosen, data), chosen)
        losses = [training_step(state, batch, chosen)["loss"] for batch in batches(data, chosen.batch, 0, chosen.iterations)]
        assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:5]), losses


@pytest.mark.parametrize("name", TINY)
def test_preflight(name, tmp_path):
    """Every layer is reached by the loss, and by a term on the image."""
    report = check_before(config(name, terms={"charbonnier": 0.1}), tmp_path)
    assert len(report.findings) > 6 and all(f.fine for f in report.findings), report.findings


def test_contradictions_are_told():
    """What only a chain has is refused, not ignored."""
    for changes, word in (({"condition": "packet"}, "'condition'"), ({"details": {"kind": "cnn"}}, "'details'"), ({"schedule": {"steps": 4}}, "'schedule'"),
                          ({"max_steps": 4}, "'max_steps'"), ({"baseline": {"block": 1}}, "did you mean 'blocks'"), ({"swin": {"depth": 1}}, "'swin'")):
        with pytest.raises(ValueError, match=word):
            RestorationModel(configure(ModelConfig, {"architecture": "edsr", "codec": "pixel"} | changes))
    with pytest.raises(ValueError, match="leave it out for architecture compact"):
        RestorationModel(ModelConfig(baseline={"blocks": 1}))
    for changes in ({"mse_steps": "first"}, {"t": "last"}, {"terms": {"edges": {"steps": "first"}}}, {"distillation": {"teacher": "compact"}}):
        with pytest.raises(TrainingError, match="architecture edsr has no chain"):
            train(config("edsr", **changes), "unused")
    with pytest.raises(TrainingError, match="knows no blocks of architecture rcan"):
        train(config("rcan", activation_checkpointing=True), "unused")
    model = RestorationModel(configure(ModelConfig, {"architecture": "edsr", "codec": "pixel", "baseline": TINY["edsr"]}))
    with pytest.raises(ValueError, match="pass lr"):
        model.restore(torch.zeros(1, 1, 16, 16))
    with pytest.raises(ModelError, match="guidance steers a chain"):
        model.restore(torch.zeros(1, 1, 16, 16), lr=torch.zeros(1, 1, 4, 4), guidance=lambda *_: None)


# ---- foreign files ----
def esrgan() -> torch.nn.Module:
    """What Real-ESRGAN's x4plus is, small."""
    from spandrel.architectures.ESRGAN import ESRGAN

    torch.manual_seed(0)
    network = ESRGAN(in_nc=3, out_nc=3, num_filters=16, num_blocks=1, scale=4)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(2)  # a fresh one is nearly black
        list(network.parameters())[-1].fill_(0.5)
    return network


def foreign(name: str, scale: int = 4) -> torch.nn.Module:
    """Freshly initialised networks that others publish files of."""
    torch.manual_seed(0)
    return esrgan() if name == "esrgan" else make_baseline(name, TINY[name], scale)[0]


@pytest.mark.parametrize(("name", "known", "suffix"), [("esrgan", "ESRGAN", "pth"), ("rcan", "RCAN", "safetensors"), ("swinir", "SwinIR", "pth")])
def test_a_foreign_file_is_recognized(name, known, suffix, tmp_path):
    """Gray is copied to its channels, its channels averaged; an 8-bit frame is seen as [0, 1]; any size, tiles, masks."""
    network, path = foreign(name).eval(), tmp_path / f"x4.{suffix}"
    if suffix == "pth":
        torch.save({"params_ema": network.state_dict()}, path)
    else:
        save_file(network.state_dict(), path)
    resolver = SuperResolver.from_pretrained(path, device="cpu")
    assert resolver.info["spandrel"] == known and (resolver.scale, resolver.max_steps) == (4, 1)
    even = frame().native()[:32, :48]
    channels = 3 if name == "esrgan" else 1
    with torch.no_grad():
        seen = torch.from_numpy(even / np.float32(255)).expand(1, channels, 32, 48)
        expected = np.clip(np.rint(network(seen.clone()).mean(1)[0].double().numpy() * 255), 0, 255)
    assert expected.std() > 0 and np.abs(resolver.upscale(even).astype(int) - expected).max() <= 1
    calls = []
    for kind in ARRAYS:
        sr = resolver.upscale(frame(kind).native(), callback=lambda *numbers: calls.append(numbers))
        assert sr.shape == (148, 212) and sr.dtype == np.dtype(kind)
    assert calls[:2] == [(0, 1), (1, 1)]
    hot = frame("float32").native().copy()
    hot[3, 4] = np.nan
    hot[20, 20] = 900  # far above what is mapped to 1, and not clipped to it
    sr = resolver.upscale(hot)
    assert np.isnan(sr).sum() == 16 and np.isfinite(resolver.upscale(hot[:3, :2])).all()
    assert resolver.upscale(np.zeros((70, 90), np.uint8), tile=64).shape == (280, 360)
    with pytest.raises(ModelError, match="steps must be 1"):
        resolver.upscale(even, steps=2)


def test_files_that_cannot_be_used_say_why(tmp_path, monkeypatch):
    """One sentence: ×2, nothing known, code in a pickle, another purpose, no spandrel."""
    def told(state) -> str:
        torch.save(state, tmp_path / "x.pth")
        with pytest.raises(ModelError) as error:
            SuperResolver.from_pretrained(tmp_path / "x.pth", device="cpu")
        assert "\n" not in str(error.value) and "x.pth" in str(error.value)
        return str(error.value)

    assert "RCAN enlarges 2 times; give a network for ×4" in told(foreign("rcan", 2).state_dict())
    assert "SwinIR enlarges 2 times" in told(foreign("swinir", 2).state_dict())
    assert "none of the architectures that spandrel recognizes" in told({"layer.weight": torch.ones(3, 3)})
    assert "holds more than tensors" in told({"params": foreign("rcan").state_dict(), "code": ModelError("x")})
    assert "no tensors" in told({"iteration": 3})
    broken = foreign("rcan").state_dict()
    broken["tail.1.weight"] = torch.ones(2, 2)
    assert "x.pth" in told(broken)
    save_file({"layer.weight": torch.ones(3, 3)}, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match="none of the architectures"):
        SuperResolver.from_pretrained(tmp_path / "x.safetensors", device="cpu")
    with pytest.raises(ModelError, match="guidance"):
        torch.save(foreign("rcan").state_dict(), tmp_path / "y.pth")
        SuperResolver.from_pretrained(tmp_path / "y.pth", device="cpu").upscale(frame().native(), guide=lambda lr: lambda *_: None)
    monkeypatch.setitem(sys.modules, "spandrel", None)
    assert "pip install 'spandrel>=0.4,<0.5'" in told(foreign_state)
    with pytest.raises(ValueError, match="pip install"):
        make_baseline("rcan")
    make_baseline("edsr")


foreign_state = {"layer.weight": torch.ones(3, 3)}
