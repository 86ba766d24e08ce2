"""Check that each augmentation does what it claims, for a single image in a worker and for a batch in memory."""

import functools
import itertools

import numpy as np
import pytest
import torch
from making_data import CPU, assert_same, batches, config_for
from marking import slow_but_for
from PIL import Image
from torchvision.transforms import v2

from sasa_train.config.compose import compose_config
from sasa_train.data.loader import build_loaders
from sasa_train.data.mixing import Mixing
from sasa_train.data.policies import NUM_DRAWS, Policy
from sasa_train.data.randomness import POLICY, sample_draws
from sasa_train.data.reading import read_batches, read_fitted
from sasa_train.data.transforms import Augment, decode_box, fit, random_resized_box
from sasa_train.refusal import ConfigError

POLICIES = ("rand_augment", "trivial_augment", "auto_augment_imagenet", "auto_augment_cifar10", "auto_augment_svhn")
policies = pytest.mark.parametrize("policy", slow_but_for(POLICIES[:3], POLICIES))
EVERYTHING = (
    "augment.hflip=true", "augment.erasing_prob=0.5", "augment.brightness=0.3", "augment.contrast=0.3",
    "augment.saturation=0.3", "augment.hue=0.1", "augment.mixup=0.4", "augment.cutmix=1.0", "data.max_train_images=100",
)  # fmt: skip


def augment_for(*overrides: str, mean=(0.5, 0.5, 0.5)) -> Augment:
    config = compose_config(["data=cifar10", *overrides])
    return Augment(config.data, config.augment, config.seed, mean)


def photo(size: int = 32) -> torch.Tensor:
    """Return an image with smooth colour gradients, so that every operation changes at least one pixel."""
    x = torch.linspace(0, 255, size)
    return torch.stack([x.expand(size, -1), x.expand(size, -1).T, (x + x[:, None]) / 2]).to(torch.uint8)


@policies
@pytest.mark.parametrize("num_workers", slow_but_for([3], [0, 3]))
def test_with_everything_on_streamed_equals_resident(policy, num_workers):
    """In-memory and streamed images must give the same batches, because a resumed run may switch between the two."""
    overrides = (*EVERYTHING, f"augment.policy={policy}")
    resident = batches(config_for(*overrides), epoch=2)
    streamed = batches(config_for(*overrides, "data.resident=false", f"data.num_workers={num_workers}"), epoch=2)
    assert_same(resident, streamed)
    assert resident[0][1].shape == (32, 10)  # labels are mixed


@policies
def test_a_batch_is_transformed_as_its_images_are_one_by_one_by_torchvision(policy):
    """Grouped operations must match torchvision's own calls exactly and Pillow's results approximately."""
    augment = compose_config([f"augment.policy={policy}"]).augment
    ours, images = Policy(augment), photo().expand(60, -1, -1, -1)
    draws = sample_draws(3, 0, np.arange(60), NUM_DRAWS, POLICY)
    together = ours.batch(images, draws)
    changed = 0
    for image, row in zip(together, draws, strict=True):
        expected = images[0]
        for name, magnitude in ours.choose(row, (32, 32)):
            how = (v2.InterpolationMode.NEAREST, ours.transform._fill)
            expected = ours.transform._apply_image_or_video_transform(expected, name, magnitude, *how)
        assert torch.equal(image, expected)
        changed += not torch.equal(image, images[0])
        pillow = v2.functional.pil_to_tensor(ours.one(v2.functional.to_pil_image(images[0]), row))
        assert (pillow.float() - image.float()).abs().median() <= 3  # Pillow rounds and samples differently
    assert changed > 25


@policies
def test_policies_draw_what_torchvisions_classes_draw(policy):
    """The frequencies of operations and negative magnitudes must match torchvision's within sampling error."""
    ours = Policy(compose_config([f"augment.policy={policy}"]).augment)
    counts: dict[str, list[float]] = {}
    for row in sample_draws(0, 0, np.arange(4000), NUM_DRAWS, POLICY):
        for name, magnitude in ours.choose(row, (32, 32)):
            counts.setdefault(name, []).append(magnitude)
    theirs: dict[str, list[float]] = {}
    apply = ours.transform._apply_image_or_video_transform

    def note(image, name, magnitude, **_):
        theirs.setdefault(name, []).append(magnitude)
        return image

    ours.transform._apply_image_or_video_transform = note
    torch.manual_seed(0)
    for _ in range(4000):
        ours.transform(photo())
    ours.transform._apply_image_or_video_transform = apply
    assert counts.keys() == theirs.keys()
    for name, magnitudes in counts.items():
        # Two counts of about n differ by 5 sqrt(2 n) in one of a million cases; the seeds are fixed.
        assert abs(len(magnitudes) - len(theirs[name])) < 5 * (2 * len(theirs[name])) ** 0.5, name
        assert set(np.abs(np.round(magnitudes, 5))) == set(np.abs(np.round(theirs[name], 5))), name
        tolerance = 5 * (2 / len(theirs[name])) ** 0.5
        assert abs(np.mean(np.sign(magnitudes)) - np.mean(np.sign(theirs[name]))) < tolerance, name


def test_erasing_fills_a_rectangle_with_the_mean_colour():
    augment = augment_for("augment.crop=false", "augment.hflip=false", "augment.erasing_prob=0.5", mean=(0.2, 0.4, 0.6))
    images = torch.full((2000, 3, 32, 32), 200, dtype=torch.uint8)
    out = augment.batch(augment.pad(images), np.arange(2000), 0, np.arange(2000))
    is_erased = (out != 200).all(1)
    assert out.permute(0, 2, 3, 1)[is_erased].unique(dim=0).tolist() == [[51, 102, 153]]
    areas = is_erased.sum((1, 2))
    rows, columns = is_erased.any(2).sum(1), is_erased.any(1).sum(1)
    assert torch.equal(areas, rows * columns)  # each erased area is a rectangle
    erased = areas[areas > 0] / 32**2
    assert 0.46 < len(erased) / 2000 < 0.54 and 0.01 < erased.min() < 0.04 and 0.28 < erased.max() < 0.36
    assert (rows / columns)[areas > 0].min() > 0.3 / 1.35 and (rows / columns)[areas > 0].max() < 3.3 * 1.35


def test_jitter_stays_within_its_factors():
    """With brightness=0.3, mid grey must become values that span the whole range from 128 x 0.7 to 128 x 1.3."""
    augment = augment_for("augment.crop=false", "augment.brightness=0.3")
    images = torch.full((300, 3, 32, 32), 128, dtype=torch.uint8)
    levels = augment.batch(images, np.arange(300), 0, np.arange(300))[:, 0, 0, 0].float()
    assert 89 <= levels.min() < 95 and 161 < levels.max() <= 167


def test_random_resized_boxes_are_torchvisions():
    """Area and ratio are in range, boxes are inside the image, and the mean area is the same as torchvision's."""
    config = compose_config([]).augment
    draws = sample_draws(0, 0, np.arange(3000), 23)
    boxes = np.array([random_resized_box(500, 375, d, config.crop_scale, config.crop_ratio) for d in draws])
    widths, heights = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert (boxes >= 0).all() and (boxes[:, 2] <= 500).all() and (boxes[:, 3] <= 375).all()
    areas, ratios = widths * heights / (500 * 375), widths / heights
    assert 0.079 < areas.min() < 0.1 and 0.9 < areas.max() <= 1 and ratios.min() > 0.74 and ratios.max() < 1.345
    torch.manual_seed(0)
    crop, blank = v2.RandomResizedCrop(224), torch.empty(3, 375, 500, device="meta")
    theirs = [crop.make_params([blank]) for _ in range(3000)]
    expected = np.mean([p["height"] * p["width"] for p in theirs]) / (500 * 375)
    assert abs(areas.mean() - expected) < 0.02
    narrow = random_resized_box(10, 1000, np.full(23, 0.999), [0.9, 1.0], [0.75, 1.3333])  # no attempt can succeed
    assert narrow == (0, 493, 10, 506)


def test_a_box_is_what_cropping_and_resizing_gives(tmp_path):
    """PNGs must match crop-then-resize except at the edges; JPEGs decoded at half size may have small errors."""
    generator = np.random.default_rng(0)
    coarse = Image.fromarray(generator.integers(0, 255, (24, 32, 3), dtype=np.uint8)).resize((1024, 768))
    coarse.save(tmp_path / "a.png")
    coarse.save(tmp_path / "a.jpg", quality=95)
    small, large = (37, 50, 337, 290), (16, 24, 1000, 744)
    with Image.open(tmp_path / "a.png") as image:
        ours, plain = (
            np.asarray(decode_box(image, small, (224, 224))),
            np.asarray(image.crop(small).resize((224, 224), 2)),
        )
    assert np.array_equal(ours[2:-2, 2:-2], plain[2:-2, 2:-2]) and np.abs(ours.astype(float) - plain).max() < 8
    with Image.open(tmp_path / "a.jpg") as image:
        drafted = np.asarray(decode_box(image, large, (224, 224))).astype(float)
        assert image.size == (512, 384)  # half size: the box has 492 x 360 pixels; a quarter has too few
    with Image.open(tmp_path / "a.jpg") as image:
        whole = np.asarray(image.crop(large).resize((224, 224), 2)).astype(float)
    assert np.abs(drafted - whole).mean() < 1.0


def test_every_reader_resizes_as_configured(tmp_path):
    """In black and white images that are resized without interpolation, no grey may appear, wherever they are read."""
    for name in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / name).mkdir(parents=True)
        noise = np.random.default_rng(0).integers(0, 2, (90, 110), dtype=np.uint8) * 255
        Image.fromarray(noise).save(tmp_path / name / "x.png")
    common = ["data=image_folder", f"data.root={tmp_path}", "trainer.global_batch_size=2", "data.num_workers=0"]
    for of_size in ("data.image_size=24", "data.image_size=72", "data.image_size=72 augment.crop=false"):
        for interpolation in ("nearest", "bilinear"):
            config = compose_config([*common, *of_size.split(), f"data.interpolation={interpolation}"])
            loaders = build_loaders(config, CPU)
            normalize, images = loaders.val.normalize, loaders.train_set
            read = [normalize.undo(x) for x, _ in (*loaders.train.train_batches(0), *loaders.val.eval_batches())]
            read += [read_fitted(images, range(2), config.data).pixels]
            read += [batch.pixels for batch in read_batches([images], config.data)]
            loaders.close()
            for pixels in read:
                inside = pixels[..., 4:-4, 4:-4]  # without padding
                assert bool(((inside > 0) & (inside < 255)).any()) == (interpolation == "bilinear")


def test_val_never_takes_a_shortcut(tmp_path):
    """As in published results, val images are fully decoded, resized to a short side of 256 and cropped to 224."""
    Image.effect_noise((1200, 900), 60).convert("RGB").save(tmp_path / "a.jpg")
    theirs = v2.Compose([v2.Resize(256, antialias=True), v2.CenterCrop(224)])
    with Image.open(tmp_path / "a.jpg") as image:
        expected = np.asarray(theirs(image.convert("RGB")))
    with Image.open(tmp_path / "a.jpg") as image:
        assert np.array_equal(fit(image, (224, 224)), expected)


@functools.cache
def augment_config(*overrides: str):
    return compose_config([*overrides]).augment


def mix(*overrides: str, step: int = 0, micro: int = 0):
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 8, 8).contiguous()
    return Mixing(augment_config(*overrides), 4, 0, 100)(images, torch.arange(4), step, micro)


def test_mixup_mixes_images_and_labels_alike():
    """Images and labels must be mixed with the same lam, which depends only on the seed, step and micro-batch."""
    images, labels = mix("augment.mixup=0.4")
    lam = labels[1, 1].item()
    assert 0 < lam < 1
    torch.testing.assert_close(labels, lam * torch.eye(4) + (1 - lam) * torch.eye(4).roll(1, 0))
    torch.testing.assert_close(images[2], torch.full((3, 8, 8), lam * 2 + (1 - lam) * 1))
    torch.rand(7)
    again, _ = mix("augment.mixup=0.4")
    assert torch.equal(images, again)
    others = [mix("augment.mixup=0.4", step=s, micro=m)[0] for s, m in ((1, 0), (0, 1))]
    assert not any(torch.equal(images, other) for other in others)


def test_cutmix_labels_count_its_pixels():
    for step in range(10):
        images, labels = mix("augment.cutmix=1.0", step=step)
        torch.testing.assert_close((images[2, 0] == 2).float().mean(), labels[2, 2])


def test_mixing_is_switched_and_ends():
    both = [mix("augment.mixup=0.4", "augment.cutmix=1.0", "augment.mix_prob=0.5", step=s) for s in range(99)]
    kinds = []
    for images, labels in both:
        is_cut = images[2].unique().numel() == 2 or (labels.ndim == 2 and images[2].unique().tolist() in ([1.0], [2.0]))
        kinds.append("none" if labels.ndim == 1 else "cut" if is_cut else "mixup")
    shares = {kind: kinds.count(kind) / 99 for kind in ("none", "cut", "mixup")}
    assert 0.35 < shares["none"] < 0.65 and 0.12 < shares["cut"] < 0.38 and 0.12 < shares["mixup"] < 0.38
    images, labels = mix("augment.mixup=0.4", step=100)
    assert labels.ndim == 1 and torch.equal(images[:, 0, 0, 0], torch.arange(4.0))
    config = config_for("augment.mixup=1.0", "augment.mix_off_epochs=1", "trainer.epochs=3", "data.max_train_images=99")
    loaders = build_loaders(config, CPU)
    assert [next(iter(loaders.train.train_batches(e)))[1].ndim for e in range(3)] == [2, 2, 1]


def test_the_mixed_steps_are_the_runs_not_the_epochs():
    """A run resumed in the middle of an epoch must mix the same images as it would have without the interruption."""
    config = config_for("augment.mixup=1.0", "data.max_train_images=100", "trainer.grad_accum_steps=2")
    assert_same(batches(config, epoch=1)[2:], batches(config, epoch=1, first_step=1))


@pytest.mark.parametrize("resident", ["true", "false"])
def test_resized_crops_of_small_images_stream(image_folder, resident):
    overrides = ("data=image_folder", f"data.root={image_folder}", "data.image_size=16", "augment.crop_mode=resized")
    if resident == "true":
        with pytest.raises(ConfigError, match="needs images of 64 pixels and less and augment.crop_mode=padded"):
            config_for(*overrides, "data.resident=true")
        return
    config = config_for(*overrides, "trainer.global_batch_size=9", "data.num_workers=0")
    loaders = build_loaders(config, CPU)
    assert loaders.kind == "streamed" and next(iter(loaders.train.train_batches(0)))[0].shape == (9, 3, 16, 16)


def test_flips_and_crops_of_a_batch_are_those_of_its_images():
    augment = augment_for("augment.hflip=true")
    images = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8)
    together = augment.batch(augment.pad(images), np.arange(20), 5, np.arange(20) + 100)
    for i in range(20):
        alone = augment.batch(augment.pad(images[i : i + 1]), np.array([0]), 5, np.array([100 + i]))
        assert torch.equal(alone[0], together[i])
    assert len({x.numpy().tobytes() for x, _ in itertools.product(together, [0])}) == 20
