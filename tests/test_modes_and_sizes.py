"""Check grey and 16-bit images (data.mode) and images that are not square (data.image_size=[height,width])."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from making_data import CPU, make_image_folder
from marking import slow_but_for
from PIL import Image
from reading_runs import assert_equal_state, assert_same_run, last
from running_commands import TINY
from torchvision.transforms import v2

from sasa_train import train
from sasa_train.config.compose import compose_config
from sasa_train.config.identity import default_run_name
from sasa_train.config.saved import load_config
from sasa_train.data.datasets import read_image
from sasa_train.data.decoding import Decoding, decode
from sasa_train.data.loader import build_loaders
from sasa_train.data.policies import Policy
from sasa_train.data.randomness import POLICY, sample_draws
from sasa_train.data.transforms import fit, val_shape
from sasa_train.export.description import timm_data_config
from sasa_train.models import AttentionStem, LocalSelfAttention2d, build_model
from sasa_train.refusal import ConfigError
from sasa_train.trained import load_trained
from sasa_train.visualize.geometry import default_pixels, window_at

OURS = ("model.stem=conv_small", "model.width=0.125", "model.num_heads=2", "model.kernel_size=3")
SHORT = ("trainer.global_batch_size=4", "trainer.epochs=2", "trainer.log_every_steps=1", "data.num_workers=0")
# One of our nets on small images, which are resident, and one of timm's on larger ones, which are streamed.
RUNS = {
    "ours": ("data.mode=grey16", "data.image_size=[12,20]", "augment.erasing_prob=0.5", *OURS),
    "timm": ("data.mode=grey", "data.image_size=[64,96]", "model=timm", "model.name=test_vit", "augment.cutmix=1"),
}


def make_deep_images(root: Path) -> Path:
    """Create 16-bit images of 20 x 14 pixels in two classes, whose upper bytes are alike, as PNG and TIFF."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 9), ("val", 4)):
        for high, name in enumerate(("low", "high")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = (0x1200 + 128 * high + rng.integers(0, 100, (14, 20))).astype(np.uint16)
                Image.fromarray(pixels).save(folder / f"{number}.{'png' if number % 2 else 'tif'}")
    return root


@pytest.fixture
def deep(tmp_path: Path) -> Path:
    return make_deep_images(tmp_path / "deep")


@pytest.fixture(scope="module")
def our_run(tmp_path_factory) -> Path:
    """Return a run of our net with an attention stem on 16-bit images that are not square; do not change it."""
    folder = tmp_path_factory.mktemp("deep")
    line = ("data=image_folder", f"data.root={make_deep_images(folder / 'deep')}", *SHORT, *RUNS["ours"])
    own = ("model.stem=attention_small", "trainer.epochs=1", f"output_dir={folder}", "run_name=run")
    assert train.run_command([*line, *own]) == 0
    return folder / "run"


def test_two_equal_sides_are_one_number(in_process, tmp_path):
    """A run with [8,8] must be the run with 8, in its name, its config and its weights."""
    square, listed = (["data.image_size=8"], ["data.image_size=[8,8]"])
    assert compose_config(listed).data.image_size == 8
    assert default_run_name(compose_config(listed)) == default_run_name(compose_config(square))
    for name, size in (("square", square), ("listed", listed)):
        in_process("train", *TINY, "trainer.epochs=1", *size, f"run_name={name}")
    assert_same_run(tmp_path / "out/square", tmp_path / "out/listed")
    kept = [
        line
        for line in (tmp_path / "out/listed/config.yaml").read_text().splitlines()
        if line.startswith("  image_size")
    ]
    assert kept == ["  image_size: 8"]


def test_the_defaults_leave_no_trace_in_the_name():
    plain = default_run_name(compose_config([]))
    assert plain == default_run_name(compose_config(["data.mode=rgb", "model.in_chans=null", "data.image_size=null"]))
    others = ("data.mode=grey", "data.mode=grey16", "data.image_size=[8,12]", "data.image_size=[12,8]")
    assert len({plain, *(default_run_name(compose_config([other])) for other in others)}) == 5


@pytest.mark.parametrize("kind", slow_but_for(["ours"], RUNS))
def test_such_a_run_goes_through_every_command(in_process, deep, tmp_path, kind):
    """The images' upper bytes are alike, so only grey16 could tell the classes apart; grey must still run."""
    line = ("data=image_folder", f"data.root={deep}", *SHORT, *RUNS[kind], "output_dir=out")
    said = in_process("train", *line, "run_name=whole").stdout
    size = (12, 20) if kind == "ours" else (64, 96)
    assert (
        f"8 val images of {size[0]} x {size[1]} pixels in {'grey16' if kind == 'ours' else 'grey'}, 2 classes" in said
    )
    in_process("train", *line, "run_name=parted", "trainer.max_hours=1e-9", expect=75)
    in_process("train", *line, "run_name=parted")
    assert_same_run(tmp_path / "out/whole", tmp_path / "out/parted")

    val = json.loads((tmp_path / "out/whole/metrics.jsonl").read_text().splitlines()[-1])
    assert f"top1   {val['top1']:.2f}" in in_process("evaluate", "out/whole").stdout
    path = str(deep / "val/high/1.png")
    [row] = in_process("predict", "out/whole", path, "--format", "jsonl").stdout.splitlines()
    trained = load_trained(tmp_path / "out/whole")
    assert trained.input_size == (1, *size) and trained.image_size == list(size)
    with torch.no_grad():
        shares = trained.model(trained.transform(Image.open(path))[None]).softmax(1)[0]
    found = json.loads(row)["predictions"]
    assert {one["class"]: one["probability"] for one in found} == pytest.approx(
        dict(zip(trained.classes, shares.tolist(), strict=True)), abs=1e-5
    )
    assert f"{size[0]} x {size[1]} pixels" in in_process("summary", *line).stdout
    in_process("report", "out/whole")
    assert f"at {size[0]} x {size[1]} pixels" in (tmp_path / "out/whole/report/report.html").read_text()


def check_hub(folder: Path, size: list[int]) -> None:
    """Check that timm builds the model of an exported folder and takes its preprocessing from there."""
    described = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    assert described["input_size"] == size and len(described["mean"]) == len(described["std"]) == 1
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert model(torch.zeros(2, *size)).shape == (2, 2)


def test_an_export_of_our_net_takes_the_same_shape(in_process, our_run, tmp_path):
    in_process("export", str(our_run), "--formats", "safetensors", "hub", "--out", "made")
    check_hub(tmp_path / "made/hub", [1, 12, 20])
    assert "16-bit grey, which timm's transform does not scale" in (tmp_path / "made/hub/README.md").read_text()


@pytest.mark.slow
def test_all_exports_of_timms_net_take_the_same_shape(in_process, deep, tmp_path):
    line = ("data=image_folder", f"data.root={deep}", *SHORT, "trainer.epochs=1", *RUNS["timm"], "output_dir=out")
    in_process("train", *line, "run_name=run")
    said = in_process("export", "out/run").stdout
    made = {"model.safetensors", "hub", "model.onnx", "model.pt2"}
    assert "files in out/run/export\n" in said and all(f"  {name}\n" in said for name in made)
    check_hub(tmp_path / "out/run/export/hub", [1, 64, 96])


def test_figures_of_such_a_run(in_process, our_run, tmp_path):
    names = ("attention_maps", "attention_distance", "augmented_samples", "mistakes")
    in_process("visualize", str(our_run), *names, "--pixels", "11,19", "--out", "figures")
    assert all((tmp_path / f"figures/{name}.png").exists() for name in names)
    refused = in_process("visualize", str(our_run), "attention_maps", "--pixels", "12,0", expect=2)
    assert "--pixels 12,0 must lie in the image as the model sees it, 0,0 to 11,19" in refused.stderr


def test_the_page_of_a_demo_is_told_both_sides(our_run):
    from sasa_train.demo.answers import Demo

    demo, image = Demo(load_trained(our_run), 2), (our_run.parent / "deep/val/high/1.png").read_bytes()
    assert (demo.about()["height"], demo.about()["width"]) == (12, 20)
    answer = demo.look(image, (11, 19))
    assert answer["pixel"] == [11, 19] and answer["image"].startswith("data:image/png;base64,")
    with pytest.raises(ConfigError, match="0,0 to 11,19"):
        demo.look(image, (12, 0))


def val_pixels(*overrides: str) -> torch.Tensor:
    """Return all val images as the model receives them, with mean 0 and standard deviation 1."""
    config = compose_config(["data=image_folder", *SHORT, "data.mean=[0]", "data.std=[1]", *overrides])
    loaders = build_loaders(config, CPU)
    found = torch.cat([images for images, _ in loaders.val.eval_batches()])
    loaders.close()
    return found


@pytest.mark.parametrize("size", [(14, 20), (70, 100)], ids=["resident", "streamed"])
def test_16_bits_reach_the_model_exactly(tmp_path, size):
    """Each of the 65,536 values would be lost below its upper byte if it went through Pillow's RGB."""
    root = make_image_folder(tmp_path / "images", size=size[::-1])
    values = np.random.default_rng(0).integers(0, 65536, size).astype(np.uint16)
    values.flat[:4] = (0, 1, 256, 65535)
    for path in sorted(root.rglob("val/*/*.png")):
        Image.fromarray(values).save(path)
    pixels = val_pixels(
        f"data.root={root}", "data.mode=grey16", f"data.image_size=[{size[0]},{size[1]}]", "data.val_crop=1"
    )
    assert pixels.shape == (8, 1, *size)
    expected = torch.from_numpy(values.astype(np.float32)) / 65535
    assert torch.equal(pixels, expected.expand(8, 1, -1, -1))


def test_other_kinds_of_pixels_in_16_bits(tmp_path):
    """White is 65,535 whatever the file's bits, transparent pixels show the background, and lost bits are refused."""
    as_16, levels = Decoding(mode="grey16"), np.array([[0, 100, 255]], dtype=np.uint8)
    assert np.array_equal(np.asarray(decode(Image.fromarray(levels), as_16)), levels.astype(np.float32) * 257)
    colour = Image.new("RGB", (1, 1), (10, 200, 30))
    assert np.asarray(decode(colour, as_16)).item() == 257 * colour.convert("L").getpixel((0, 0))
    deep = Image.fromarray(np.array([[0x1234, 0xFFFF, 7]], dtype=np.uint16))
    for kind in ("tif", "png"):
        deep.save(tmp_path / f"deep.{kind}", **({"transparency": 7} if kind == "png" else {}))
    with Image.open(tmp_path / "deep.tif") as image:
        assert np.asarray(decode(image, as_16)).tolist() == [[0x1234, 0xFFFF, 7]]
    with Image.open(tmp_path / "deep.png") as image:
        assert np.asarray(decode(image, Decoding("black", mode="grey16"))).tolist() == [[0x1234, 0xFFFF, 0]]
    floats = Image.fromarray(np.array([[0.25, 1.0]], dtype=np.float32))
    of_range = Decoding(value_range=(0.0, 1.0), mode="grey16")
    assert np.asarray(decode(floats, of_range)).tolist() == [[16384, 65535]]
    write_rgb48(tmp_path / "lost.png")
    (tmp_path / "lost.ppm").write_bytes(b"P6 1 1 65535\n\1\2\3\4\5\6")
    for lost in ("lost.png", "lost.ppm"):
        with (tmp_path / lost).open("rb") as file, pytest.raises(ValueError, match="keeps only the upper 8 bits"):
            read_image(file, lambda image: decode(image, as_16))


def write_rgb48(path: Path) -> None:
    """Write a PNG of one pixel with 16 bits per channel, which Pillow cannot write."""
    import struct
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    header, pixels = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0), zlib.compress(b"\0\1\2\3\4\5\6")
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", pixels), chunk(b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


@pytest.mark.parametrize("size", [17, 72], ids=["resident", "streamed"])
def test_grey_is_pillows_luminance(image_folder, size):
    pixels = val_pixels(f"data.root={image_folder}", "data.mode=grey", f"data.image_size={size}")
    for path, found in zip(sorted(image_folder.rglob("val/*/*.png")), pixels, strict=True):
        plain = fit(Image.open(path).convert("L"), (size, size), decoding=Decoding(mode="grey"))
        if size == 17:  # not resized, so luminance and crop can be exchanged
            assert np.array_equal(plain[..., 0], np.asarray(Image.open(path).convert("L"))[:, 1:18])
            assert torch.equal((found[0] * 255).round(), torch.from_numpy(plain[..., 0].astype(np.float32)))
        assert found.shape == (1, size, size)


def test_the_digits_in_grey_are_their_one_channel():
    grey, rgb = (compose_config([f"data.mode={mode}", *SHORT]) for mode in ("grey", "rgb"))
    batches = [torch.cat([x for x, _ in build_loaders(config, CPU).val.eval_batches()]) for config in (grey, rgb)]
    assert torch.equal(batches[0], batches[1][:, :1]) and batches[0].shape[1] == 1


@pytest.mark.parametrize("mode", ["grey", "grey16"])
@pytest.mark.parametrize("size", ["[16,24]", "[72,100]"])
def test_augmentation_is_a_function_of_seed_epoch_and_index(deep, mode, size):
    """The same images must come from batches of another size, with crops, flips, erasing and, in 8 bits, policies."""
    keys = ["augment.erasing_prob=0.5", "augment.crop_scale=[0.3,1.0]", f"data.image_size={size}"]
    keys += ["augment.policy=rand_augment", "augment.brightness=0.3"] if mode == "grey" else []
    found = []
    for batch in (3, 6):
        given = ["data=image_folder", f"data.root={deep}", f"data.mode={mode}", f"trainer.global_batch_size={batch}"]
        loaders = build_loaders(compose_config([*given, "data.num_workers=0", *keys]), CPU)
        found.append(torch.cat([images for images, _ in loaders.train.train_batches(1)]))
    assert torch.equal(*found) and found[0].shape[1:] == (1, *json.loads(size))
    assert found[0].std() > 0.005 and found[0].isfinite().all()


def test_policies_on_grey_and_long_images_are_torchvisions():
    """Shears, shifts and rotations of images that are not square must be about the right centre."""
    for policy, channels in (("rand_augment", 1), ("trivial_augment", 3), ("auto_augment_imagenet", 1)):
        ours = Policy(compose_config([f"augment.policy={policy}"]).augment)
        image = torch.randint(0, 256, (channels, 18, 31), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
        draws = sample_draws(3, 0, np.arange(80), 16, POLICY)
        for found, row in zip(ours.batch(image.expand(80, -1, -1, -1), draws), draws, strict=True):
            expected = image
            for name, magnitude in ours.choose(row, (18, 31)):
                how = (v2.InterpolationMode.NEAREST, ours.transform._fill)
                expected = ours.transform._apply_image_or_video_transform(expected, name, magnitude, *how)
            assert torch.equal(found, expected)


@pytest.mark.parametrize("size", [[160, 224], [224, 96], [40, 64], [65, 817]])
@pytest.mark.parametrize("keys", [[], ["data.val_crop=0.95", "data.interpolation=bicubic"]], ids=["default", "timms"])
def test_timms_transform_gives_the_pixels_of_val(tiny_run, size, keys):
    """The least resized image that covers the crop is cropped, as in timm; for images of any shape."""
    trained = load_trained(tiny_run, keys)
    trained.config.data.image_size = size
    transform = timm.data.create_transform(**timm_data_config(trained))
    for shape in ((71, 297), (307, 211), tuple(size)):
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))
        ours = trained.normalize(CPU)(torch.tensor(val_shape(trained.config.data)(image)).permute(2, 0, 1)[None])[0]
        torch.testing.assert_close(transform(image), ours, rtol=0, atol=1e-6)  # normalisation in another order


@pytest.mark.parametrize("stem", slow_but_for(["attention_small"], ["conv_small", "attention_small"]))
def test_weights_for_colours_adapt_to_grey(in_process, tmp_path, stem):
    """The first layer's weights are summed over colours, as in timm; mean and std are averaged, and both are said."""
    run = (*TINY, "trainer.epochs=1", f"model.stem={stem}")
    in_process("train", *run, "run_name=colours", "data.mean=[0.2,0.3,0.7]", "data.std=[0.2,0.3,0.4]")
    frozen = ("optimizer.lr=1e-30", "model.bn_momentum=0", "model.pretrained=out/colours")
    said = " ".join(in_process("train", *run, *frozen, "data.mode=grey", "run_name=grey").stdout.split())
    assert (
        "preprocessing of the source: data.mean=[0.4] (the mean of [0.2,0.3,0.7]) data.std=[0.3] (the mean of" in said
    )
    before, after = (last(tmp_path / f"out/{name}")["model"] for name in ("colours", "grey"))
    name = "stem.0.weight" if stem == "conv_small" else "stem.qk.weight"
    assert f"weight of {name.removesuffix('.weight')}" in said
    torch.testing.assert_close(after[name], before[name].sum(1, keepdim=True))
    assert after[name].shape[1] == 1
    back = in_process("train", *run, "model.pretrained=out/grey", "run_name=back")
    assert "data.mean=[0.4,0.4,0.4] (repeating [0.4])" in " ".join(back.stdout.split())
    assert "was trained with data.mode=grey, but this run reads images with data.mode=rgb" in back.stderr


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ("data.image_size=[8]", r"data.image_size=\[8\] must be a whole number, or two for height and width"),
        ("data.image_size=[8,8.5]", "must be a whole number, or two for height and width"),
        ("data.image_size=[8,16,24]", "must be a whole number, or two for height and width"),
        ("data.image_size=8x16", "must be a whole number, or two for height and width"),
        ("data.image_size=true", "must be a whole number, or two for height and width"),
        ("data.image_size=[8,0]", r"data.image_size=\[8, 0\] must be positive and at most 16384"),
        ("data.image_size=[8,20000]", "must be positive and at most 16384"),
        ("data.image_size=[8,72] augment.crop_mode=padded", r"but data.image_size=\[8,72\]; use auto or resized"),
        ("data.image_size=[8,16] augment.crop_padding=9", "must not exceed"),
        ("data.mode=gray", "must be one of rgb, grey, grey16"),
        ("data.mode=grey model.in_chans=3", "must be 1, the channels of data.mode=grey"),
        ("model.in_chans=1", "must be 3, the channels of data.mode=rgb"),
        ("model.target=a.B model.in_chans=3", "give it to your own in model.args"),
        ("data.mode=grey data.mean=[0.1,0.2,0.3]", r"must be one number, as in \[0.5\], for data.mode=grey"),
        ("data.std=[0.5]", "must be three numbers for data.mode=rgb"),
        ("data.mode=grey data.mean=0.5", "data.mean: must be a list, in brackets even if it has one value"),
        ("data.mode=grey augment.hue=0.1", r"augment.hue=0.1 does nothing to grey images"),
        ("data.mode=grey16 augment.policy=trivial_augment", "8 bits alone; leave it out, or use data.mode=grey"),
        ("data.mode=grey16 augment.contrast=0.1", "8 bits alone; leave it out, or use data.mode=grey"),
        ("data.mode=grey16 data.clip_values=true", "set data.value_range instead"),
    ],
)
def test_what_does_not_fit_is_refused(overrides, said):
    with pytest.raises(ConfigError, match=said):
        compose_config(overrides.split())


def test_a_model_that_cannot_take_the_shape_says_which_it_takes(in_process):
    """Attention stems need sides that 4 divides, and a shape of this kind is suggested."""
    refused = in_process("train", *TINY, "data.image_size=[10,17]", expect=2).stderr
    assert "cannot take images of 10 x 17 pixels: image of 10 x 17: the attention stem needs sides that 4" in refused
    assert "data.image_size=[8,16] or [12,20] works" in refused


def test_another_shape_of_the_same_checkpoint(tiny_run):
    """Attention has no weights that depend on the image's size; a mode would be another model."""
    assert load_trained(tiny_run, ["data.image_size=[8,16]"]).input_size == (3, 8, 16)
    with pytest.raises(ConfigError, match="the overrides make another model than the checkpoint's"):
        load_trained(tiny_run, ["data.mode=grey"])


def test_windows_of_images_that_are_not_square():
    weights = torch.zeros(1, 3, 5, 9)  # a map of 3 x 5 positions of 4 pixels
    layer = LocalSelfAttention2d(2, 2, kernel_size=3, num_heads=1)
    window = window_at(layer, weights, (11, 17), (12, 20))
    assert (window.query, window.reduction, window.box) == ((2, 4), 4, (12, 4, 20, 12))
    stem = torch.zeros(1, 15, 16, 16)
    stem[:, 2 * 5 + 4, 3 * 4 + 1] = 1 / 16
    assert window_at(AttentionStem(3, 8), stem, (11, 17), (12, 20)).weights.sum() == 1
    centre, (row, column) = default_pixels(np.random.default_rng(0).integers(0, 255, (12, 20, 3)).astype(np.uint8))
    assert centre == (6, 10) and row < 12 and column < 20 and np.hypot(row - 6, column - 10) >= 3


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "swin_tiny_patch4_window7_224"])
def test_timms_models_are_built_for_both_sides(name):
    config = compose_config(["model=timm", f"model.name={name}"]).model
    with torch.device("meta"):
        model = build_model(config, 3, (1, 224, 448))
        assert model.eval()(torch.empty(1, 1, 224, 448)).shape == (1, 3)


def test_a_config_of_before_reads_as_it_did(tiny_run):
    """A saved config that knows neither data.mode nor model.in_chans is of square RGB images."""
    text = last(tiny_run)["config"]
    lines = text.splitlines(keepends=True)
    old = "".join(line for line in lines if line.split(":")[0].strip() not in ("mode", "in_chans"))
    assert old != text and load_config(old) == load_config(text)


def by_hand(image: Image.Image, size: int, data) -> torch.Tensor:
    """Return what val's transform makes of an image, by torchvision alone."""
    covered = size if size <= 64 else math.ceil(size / 0.875)
    steps = [v2.Resize(covered, antialias=True), v2.CenterCrop(size), v2.ToImage(), v2.ToDtype(torch.float32, True)]
    return v2.Compose([*steps, v2.Normalize(data["mean"], data["std"])])(image)


@pytest.mark.parametrize("sizes", slow_but_for([(16, 72)], [(16, 72), (72, 16), (16, 24)]))
def test_val_has_an_image_size_of_its_own(in_process, tmp_path, sizes):
    """Training's val row, sasa-evaluate and sasa-predict see torchvision's pixels of that size, small or large."""
    size, val_size = sizes
    root = make_image_folder(tmp_path / "images", size=(90, 80))
    line = ("data=image_folder", f"data.root={root}", *SHORT, *OURS, "output_dir=out", "run_name=a")
    line = (*line, f"data.image_size={size}", f"data.val_image_size={val_size}", "trainer.epochs=1")
    said = in_process("train", *line).stdout
    assert f"images of {size} pixels (val: {val_size} pixels)" in " ".join(said.split())
    val = json.loads((tmp_path / "out/a/metrics.jsonl").read_text().splitlines()[-1])

    trained = load_trained(tmp_path / "out/a")
    normalised = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    paths = [path for name in ("blue", "red") for path in sorted((root / "val" / name).iterdir())]
    images = torch.stack([by_hand(Image.open(path), val_size, normalised) for path in paths])
    logits, labels = trained.model(images), torch.tensor([0] * 3 + [1] * 5)
    assert val["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    in_process("evaluate", "out/a", "--json", "found.json")
    assert json.loads((tmp_path / "found.json").read_text())["loss"] == val["loss"]
    [row] = in_process("predict", "out/a", str(paths[0]), "--format", "jsonl").stdout.splitlines()
    found = {each["class"]: each["probability"] for each in json.loads(row)["predictions"]}
    assert [found[name] for name in ("blue", "red")] == pytest.approx(logits[0].softmax(0).tolist(), rel=1e-4)
    torch.testing.assert_close(trained.transform(Image.open(paths[0])), images[0], rtol=0, atol=1e-5)
    assert trained.image_size == val_size and timm_data_config(trained)["input_size"] == (3, val_size, val_size)
    assert "data.val_image_size=" in in_process("predict", "out/a", str(paths[0]), "data.image_size=8", expect=2).stderr
    # The same run but for val's size has the same weights and another name.
    in_process("train", *line, "data.val_image_size=null", "run_name=b")
    one, other = (load_config(last(tmp_path / f"out/{name}")["config"]) for name in "ab")
    assert default_run_name(one) != default_run_name(other)
    assert_equal_state(last(tmp_path / "out/a")["model"], last(tmp_path / "out/b")["model"])


def test_a_model_of_a_fixed_size_refuses_another_one_for_val(in_process):
    line = ("model=timm", "model.name=vit_tiny_patch16_224", "data.image_size=32", "data=image_folder", "data.root=no")
    said = in_process("train", *line, "data.val_image_size=48", expect=2).stderr
    assert "data.val_image_size=48: vit_tiny_patch16_224 is built for images of 32 pixels (data.image_size)" in said
    assert "(48) doesn't match model (32)" in said and "leave data.val_image_size out" in said
