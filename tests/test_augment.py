"""Every operation beside Pillow's, on photographs and flat images; random numbers beside closed forms."""
import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from scipy import stats
from sklearn.datasets import load_sample_images

from nanorank import image_ops
from nanorank.augment import flips, mix, operations, rand_augment, random_crops, resize
from nanorank.rng import beta, uniform

PHOTOS = load_sample_images().images  # two of 427 x 640
GREY = (128, 128, 128)


def images(height, width):
    """uint8 (6, height, width, 3): photographs whole and close, few levels, flat, two levels, noise."""
    rng = np.random.default_rng(0)
    whole = [np.asarray(Image.fromarray(photo).resize((width, height), Image.BICUBIC)) for photo in PHOTOS]
    close = PHOTOS[0][20:20 + height, 30:30 + width]
    few = (close // 64 * 20 + 90).astype(np.uint8)
    flat = np.full_like(close, 77)
    two = np.where(whole[1] > 100, 200, 199).astype(np.uint8)
    return np.stack([*whole, few, flat, two, rng.integers(0, 256, close.shape, dtype=np.uint8)])


def batch(arrays):
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def pillow(arrays, operation):
    return batch([np.array(operation(Image.fromarray(array))) for array in arrays])


def enhanced(kind):
    return lambda image, factor: kind(image).enhance(factor)


def rotated(image, degrees):
    return image.rotate(degrees, Image.NEAREST, fillcolor=GREY)


def solarized_add(image, addition):
    table = [max(0, min(255, v + addition)) if v < 128 else v for v in range(256)]
    return image.point(table * 3)


def moved(entry):
    def operation(image, value):
        matrix = [1, 0, 0, 0, 1, 0]
        matrix[entry] = value
        return image.transform(image.size, Image.AFFINE, matrix, Image.NEAREST, fillcolor=GREY)
    return operation


FACTORS = [0.0, 0.1, 0.55, 0.9, 1.0, 1.37, 1.9, 2.8]
MOVES = [0.0, 1.0, -3.0, 2.4, 17.5, -22.32, 1000.0]
SLOPES = [0.0, 0.3, -0.3, 0.123, 0.9]
REFERENCES = {  # Pillow's operation, values of its argument
    "auto_contrast": (ImageOps.autocontrast, [()]),
    "equalize": (ImageOps.equalize, [()]),
    "invert": (ImageOps.invert, [()]),
    "rotate": (rotated, [0.0, 30.0, -30.0, 17.3, -4.5, 90.0, 180.0, 271.0]),
    "posterize": (ImageOps.posterize, [1, 4, 7, 8]),
    "solarize": (ImageOps.solarize, [0, 1, 128, 200, 256]),
    "solarize_add": (solarized_add, [0, 110, 200, -50]),
    "color": (enhanced(ImageEnhance.Color), FACTORS),
    "contrast": (enhanced(ImageEnhance.Contrast), FACTORS),
    "brightness": (enhanced(ImageEnhance.Brightness), FACTORS),
    "sharpness": (enhanced(ImageEnhance.Sharpness), FACTORS),
    "shear_x": (moved(1), SLOPES),
    "shear_y": (moved(3), SLOPES),
    "translate_x": (moved(2), MOVES),
    "translate_y": (moved(5), MOVES),
}

# -------------------------------------------------------------------------------------- operations

@pytest.mark.parametrize("size", [(64, 64), (97, 51), (31, 224), (2, 5)])
@pytest.mark.parametrize("name", REFERENCES)
def test_operation_is_pillows_to_the_bit(name, size):
    reference, values = REFERENCES[name]
    arrays = images(*size)
    x, function = batch(arrays), getattr(image_ops, name)
    before = x.clone()
    for value in values:
        arguments = () if value == () else (value,)
        expected = pillow(arrays, lambda image, arguments=arguments: reference(image, *arguments))
        assert torch.equal(function(x, *arguments), expected), value
    if values != [()]:  # an argument for each image
        each = np.resize(values, len(x))
        expected = batch([np.array(reference(Image.fromarray(a), value)) for a, value in zip(arrays, each)])
        assert torch.equal(function(x, each), expected)
    assert torch.equal(x, before)  # left as it was


def test_auto_contrast_and_equalize_where_rounding_is_close():
    """All spans of levels: Pillow's tables come from float64 products that miss whole numbers by a hair."""
    spans = [(lo, hi) for lo in range(0, 250, 5) for hi in range(lo, 256, 7)]
    levels = np.linspace(*np.transpose(spans), 256 * 3, axis=1).round().astype(np.uint8)
    arrays = levels.reshape(-1, 3, 16, 16).transpose(0, 2, 3, 1)
    x = batch(arrays)
    assert torch.equal(image_ops.auto_contrast(x), pillow(arrays, ImageOps.autocontrast))
    assert torch.equal(image_ops.equalize(x), pillow(arrays, ImageOps.equalize))


def test_cutout():
    x = batch(images(20, 30))
    row, column = np.array([0, 5, 19, 10, 3, 7]), np.array([0, 29, 29, 15, 4, 11])
    y = image_ops.cutout(x, row, column, 4)
    for i in range(6):
        image = Image.fromarray(x[i].permute(1, 2, 0).numpy())
        image.paste(GREY, (column[i] - 4, row[i] - 4, column[i] + 4, row[i] + 4))
        assert np.array_equal(y[i].permute(1, 2, 0), np.array(image))
    assert (y[3] == 128).all(0).sum() >= 64
    assert torch.equal(image_ops.cutout(x, row, column, 0), x)

# ------------------------------------------------------------------------------------------ resize

def worst(a, b):
    return (a.int() - b.int()).abs().max().item()


@pytest.mark.parametrize("size, out", [
    ((97, 131), 32), ((97, 131), 224), ((64, 64), 64), ((200, 50), (48, 96)), ((1, 3), 16), ((400, 600), 7)])
def test_resize_is_pillows_within_a_level(size, out):
    arrays = images(*size)
    out_h, out_w = (out, out) if isinstance(out, int) else out
    y = resize(torch.from_numpy(arrays), np.full((6, 2), size), out)
    expected = pillow(arrays, lambda image: image.resize((out_w, out_h), Image.BILINEAR))
    assert y.dtype == torch.uint8 and y.shape == (6, 3, out_h, out_w)
    assert worst(y, expected) <= 1  # Pillow rounds between its passes
    assert (y != expected).float().mean() < 0.25 and (y.float() - expected.float()).mean().abs() < 0.02
    if size == (out_h, out_w):
        assert torch.equal(y, expected)


def test_resize_of_padded_images_boxes_and_flips():
    """Whatever the padding holds: taps reach beyond the box, but not beyond what is valid."""
    rng = np.random.default_rng(1)
    sizes = rng.integers(20, 160, (12, 2))
    boxes = np.empty((12, 4))
    for i, (h, w) in enumerate(sizes):
        top, left = rng.uniform(0, h / 2), rng.uniform(0, w / 2)
        boxes[i] = top, left, rng.uniform(4, h - top), rng.uniform(4, w - left)
    boxes[0], boxes[1] = (0, 0, *sizes[0]), (3, 5, sizes[1][0] - 3, sizes[1][1] - 5)
    pixels = rng.integers(0, 256, (12, 160, 160, 3), dtype=np.uint8)
    flip = flips(3, np.arange(12))
    assert 0 < flip.sum() < 12
    expected = []
    for i, (h, w) in enumerate(sizes):
        pixels[i, :h, :w] = PHOTOS[i % 2][50:50 + h, 60:60 + w]
        top, left, height, width = boxes[i]
        box = left, top, left + width, top + height
        image = Image.fromarray(pixels[i, :h, :w]).resize((40, 40), Image.BILINEAR, box=box)
        expected.append(np.array(ImageOps.mirror(image) if flip[i] else image))
    y = resize(torch.from_numpy(pixels), sizes, 40, boxes, flip)
    assert worst(y, batch(expected)) <= 1
    pixels = torch.from_numpy(pixels)
    tensors = [torch.from_numpy(array) for array in (sizes, boxes, flip)]
    assert torch.equal(resize(pixels, tensors[0], 40, *tensors[1:]), y)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(resize(pixels, sizes, 40, boxes, flip), y)
    h, w = sizes[5]
    alone = resize(pixels[5:6, :h, :w].contiguous(), sizes[5:6], 40, boxes[5:6], flip[5:6])
    assert worst(alone, y[5:6]) <= 1  # sums of other lengths, so in another order
    assert (alone != y[5:6]).float().mean() < 1e-3

# ---------------------------------------------------------------------------------- random numbers

def test_uniform_is_uniform_and_independent():
    n = 200_000
    u = uniform(1, "crop", np.arange(n), 3)
    numbers = np.arange(n)
    others = [uniform(2, "crop", numbers), uniform(1, "flip", numbers), uniform(1, "crop", numbers + n),
              *u.T[1:], np.roll(u[:, 0], 1)]
    assert u.dtype == np.float64 and u.min() >= 0 and u.max() < 1
    for column in (*u.T, *others):
        assert stats.kstest(column, "uniform").pvalue > 1e-4
        assert stats.chisquare(np.histogram(column, 100, (0, 1))[0]).pvalue > 1e-7
    for other in others:
        assert abs(np.corrcoef(u[:, 0], other)[0, 1]) < 5 / math.sqrt(n)


def test_uniform_is_a_function_of_seed_purpose_and_number():
    numbers = np.arange(10**12, 10**12 + 100)
    whole = uniform(7, "a", numbers, 5)
    parts = [uniform(7, "a", part, 5) for part in (numbers[:31], numbers[31:])]
    assert np.array_equal(whole, np.concatenate(parts))
    assert np.array_equal(whole[:, :2], uniform(7, "a", numbers, 2))
    assert np.array_equal(whole[:, 0], uniform(7, "a", numbers))
    for seed, purpose, shift in ((8, "a", 0), (7, "b", 0), (7, "aa", 0), (7, "a", 100)):
        assert not np.isin(uniform(seed, purpose, numbers + shift, 5), whole).any()
    assert uniform(-1, "a", []).shape == (0,)


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.8, 1.0, 1.5, 4.0])
def test_beta(alpha):
    n = 50_000
    x = beta(alpha, 5, "mixup", np.arange(n))
    closed = stats.beta(alpha, alpha)
    assert ((x >= 0) & (x <= 1)).all()
    assert abs(x.mean() - 0.5) < 5 * math.sqrt(closed.var() / n)
    assert abs(x.var() / closed.var() - 1) < 0.03
    for q in (0.1, 0.3, 0.5, 0.8):  # the share of samples below a quantile
        assert abs((x < closed.ppf(q)).mean() - q) < 5 * math.sqrt(q * (1 - q) / n)
    assert np.array_equal(x[900:1000], beta(alpha, 5, "mixup", np.arange(900, 1000)))


@pytest.mark.parametrize("alpha", [0, -1.0, math.inf, math.nan])
def test_beta_refuses(alpha):
    with pytest.raises(ValueError, match="alpha"):
        beta(alpha, 0, "mixup", np.arange(3))

# ------------------------------------------------------------------------------------------- crops

def test_random_crops_distribution():
    n = 20_000
    boxes = random_crops(np.full(n, 3000), np.full(n, 4000), 0, np.arange(n))
    top, left, h, w = boxes.T
    assert boxes.min() >= 0 and (top + h <= 3000).all() and (left + w <= 4000).all()
    share, ratio = h * w / 12e6, w / h
    assert share.min() > 0.0499 and ratio.min() > 0.749 and ratio.max() < 1.335
    small = share < 0.5  # these always fit, so their shares are uniform and their ratios log-uniform
    assert abs(share[small].mean() - 0.275) < 5 * 0.13 / math.sqrt(small.sum())
    assert abs(np.log(ratio[small]).mean()) < 5 * 0.166 / math.sqrt(small.sum())
    assert abs(np.log(ratio[small]).std() - math.log(16 / 9) / math.sqrt(12)) < 0.01
    places = top[small] / (3000 - h[small]), left[small] / (4000 - w[small])
    for place in places:
        assert abs(place.mean() - 0.5) < 5 * 0.29 / math.sqrt(small.sum())
        assert place.min() < 0.01 and place.max() > 0.99
    assert abs(np.corrcoef(*places)[0, 1]) < 5 / math.sqrt(small.sum())
    heights, widths = np.full(100, 3000), np.full(100, 4000)
    assert np.array_equal(boxes[500:600], random_crops(heights, widths, 0, np.arange(500, 600)))
    assert not np.array_equal(boxes[:100], random_crops(heights, widths, 1, np.arange(100)))


def test_random_crops_of_tiny_images_and_panoramas():
    heights = np.array([1, 1, 2, 3, 20, 5000, 20] * 500)
    widths = np.array([1, 2, 1, 3, 5000, 20, 30] * 500)
    boxes = random_crops(heights, widths, 0, np.arange(3500))
    top, left, h, w = boxes.T
    assert min(h.min(), w.min()) == 1 and min(top.min(), left.min()) == 0
    assert (top + h <= heights).all() and (left + w <= widths).all()
    assert (w <= np.maximum(1, np.rint(h * 4 / 3) + 1)).all()
    assert (h <= np.maximum(1, np.rint(w * 4 / 3) + 1)).all()
    wide = random_crops([30], [5000], 0, [3], area=(1.0, 1.0))  # none fits: central
    assert wide.tolist() == [[0, 2480, 30, 40]]
    assert random_crops([5000], [30], 0, [3], area=(1.0, 1.0)).tolist() == [[2480, 0, 40, 30]]
    assert random_crops([30], [30], 0, [3], area=(1.0, 1.0), ratio=(1, 1)).tolist() == [[0, 0, 30, 30]]


@pytest.mark.parametrize("settings", [
    {"area": (0, 1)}, {"area": (0.5, 0.4)}, {"area": (0.5, 1.1)}, {"ratio": (2, 1)}, {"ratio": (0, 1)}])
def test_random_crops_refuses(settings):
    with pytest.raises(ValueError, match="area=.*ratio="):
        random_crops([8], [8], 0, [0], **settings)
    with pytest.raises(ValueError, match="number 41 is empty"):
        random_crops([8, 0], [8, 8], 0, [40, 41])

# ------------------------------------------------------------------------------------- RandAugment

def photos(n, side):
    rng = np.random.default_rng(2)
    at = rng.integers(0, 427 - 2 * side, (n, 2))
    return batch([PHOTOS[i % 2][r:r + 2 * side:2, c:c + 2 * side:2] for i, (r, c) in enumerate(at)])


def test_rand_augment_does_not_depend_on_the_batch():
    x, numbers = photos(96, 48), np.arange(1000, 1096)
    whole = rand_augment(x, 4, numbers, layers=2, magnitude=9)
    assert whole.dtype == torch.uint8 and whole.shape == x.shape
    for pieces in (96, 7):
        parts = []
        for part, rows in zip(torch.tensor_split(x, pieces), np.array_split(numbers, pieces)):
            parts.append(rand_augment(part, 4, rows, layers=2, magnitude=9))
        assert torch.equal(torch.cat(parts), whole)
    swapped = np.random.default_rng(0).permutation(96)
    shuffled = rand_augment(x[swapped], 4, numbers[swapped], layers=2, magnitude=9)
    assert torch.equal(shuffled, whole[swapped])
    assert not torch.equal(rand_augment(x, 5, numbers, layers=2, magnitude=9), whole)


def test_rand_augment_is_its_operations():
    """Every result is one of the 16 operations', each about as often; layers follow each other."""
    x, numbers = photos(1, 32).expand(1600, -1, -1, -1), np.arange(1600)
    y = rand_augment(x, 0, numbers, layers=1, magnitude=8)
    counts = {}
    for sign in (-1, 1):
        ops = operations(8, 32, 32, np.array([sign]), np.array([0]), np.array([0]))
        for function, arguments in ops.items():
            if function is not image_ops.cutout:
                same = (y == function(x[:1], *arguments)).flatten(1).all(1)
                signed = any(np.ndim(a) for a in arguments)
                counts[function.__name__, sign if signed else 0] = same.sum().item()
    assert len(counts) == 20 and sum(sign != 0 for _, sign in counts) == 10
    for (_, sign), count in counts.items():
        expected = 50 if sign else 100
        assert abs(count - expected) < 5 * math.sqrt(expected), counts
    cut = ((y == x) | (y == 128)).flatten(1).all(1) & (y != x).flatten(1).any(1)
    holes = (y[cut] != x[cut]).any(1)
    assert 50 < cut.sum() < 150 and holes.flatten(1).sum(1).max() <= 10**2
    assert sum(counts.values()) + cut.sum() >= 1600
    both = rand_augment(x, 0, numbers, layers=2, magnitude=8)
    inverted = (y == 255 - x).flatten(1).all(1)
    assert inverted.any() and (both[inverted] == x[inverted]).flatten(1).all(1).any()  # inverted twice
    assert len({tuple(row) for row in both.flatten(1)[:, ::97].tolist()}) > 200


def test_operations_at_224_are_big_visions():
    one = np.ones(1)
    arguments = {f.__name__: a for f, a in operations(10, 224, 224, one, one, one).items()}
    assert list(arguments) == [
        "auto_contrast", "equalize", "invert", "rotate", "posterize", "solarize",
        "color", "contrast", "brightness", "sharpness",
        "shear_x", "shear_y", "translate_x", "translate_y", "cutout", "solarize_add"]
    assert arguments["rotate"][0] == 30
    assert arguments["posterize"] == (4,) and arguments["solarize"] == (256,)
    assert arguments["color"] == pytest.approx((1.9,)) and arguments["sharpness"] == pytest.approx((1.9,))
    assert arguments["shear_x"][0] == pytest.approx(0.3)
    assert arguments["translate_y"][0] == pytest.approx(100)
    assert arguments["cutout"][2] == 40 and arguments["solarize_add"] == (110,)


def test_rand_augment_edges():
    x = photos(4, 16)
    assert rand_augment(x, 0, np.arange(4), layers=0) is x
    assert rand_augment(x[:0], 0, np.arange(0)).shape == (0, 3, 16, 16)
    for magnitude in (0, 30):
        y = rand_augment(photos(64, 16), 0, np.arange(64), layers=3, magnitude=magnitude)
        assert y.shape == (64, 3, 16, 16)
    with pytest.raises(ValueError, match="layers=-1"):
        rand_augment(x, 0, np.arange(4), layers=-1)
    with pytest.raises(ValueError, match="3 sample numbers for 4 images"):
        rand_augment(x, 0, np.arange(3))

# ----------------------------------------------------------------------------------- mixup, cutmix

def mixable(n=64, side=24):
    return photos(n, side).float() / 255, torch.arange(n) % 10


@pytest.mark.parametrize("alphas", [{"mixup": 0.2}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
def test_mix(alphas):
    x, labels = mixable()
    numbers = np.arange(100, 164)
    y, targets = mix(x, labels, 10, 3, numbers, **alphas)
    assert y.dtype == x.dtype and targets.dtype == torch.float32 and targets.shape == (64, 10)
    assert torch.allclose(targets.sum(1), torch.ones(64), atol=1e-6)
    pieces = [mix(x[a:b], labels[a:b], 10, 3, numbers[a:b], **alphas) for a, b in ((0, 2), (2, 40), (40, 64))]
    assert torch.equal(torch.cat([piece[0] for piece in pieces]), y)
    assert torch.equal(torch.cat([piece[1] for piece in pieces]), targets)
    kinds = set()
    for i in range(64):
        j, share = i ^ 1, targets[i, labels[i]].item()
        assert targets[i, labels[j]].item() == pytest.approx(1 - share, abs=1e-6)
        assert targets[j, labels[j]].item() == share  # the partner's mirrored mix
        own, other = (y[i] == x[i]).all(0), (y[i] == x[j]).all(0)
        if (own | other).all():
            kinds.add("cutmix")
            box = (x[i] != x[j]).any(0) & other
            rows, columns = box.any(1).nonzero(), box.any(0).nonzero()
            if len(rows):  # a full rectangle, as large as the targets say
                top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
                assert other[top:bottom, left:right].all()
                area = ((bottom - top) * (right - left)).item()
                assert share == pytest.approx(1 - area / 24**2, abs=2 / 24)
        else:
            kinds.add("mixup")
            assert share >= 0.5
            assert torch.allclose(y[i], share * x[i] + (1 - share) * x[j], atol=1e-6)
    assert kinds >= set(alphas)


def test_mix_shares():
    """Mixup's share is max(a, 1 - a), a of Beta(0.2, 0.2); cutmix's counts pixels; else a coin decides."""
    n = 4000
    x = torch.zeros(n, 1, 16, 16)
    x[1::2] = 1.0
    labels, numbers = torch.arange(n) % 2, np.arange(n)
    _, targets = mix(x, labels, 2, 0, numbers, mixup=0.2)
    a = beta(0.2, 0, "mixup", np.arange(n // 2))
    assert torch.allclose(targets[::2, 0], torch.from_numpy(np.maximum(a, 1 - a)).float())
    y, targets = mix(x, labels, 2, 0, numbers, cutmix=1.0)
    assert torch.allclose(y.mean((1, 2, 3)), targets[:, 1], atol=1e-6)
    assert ((y == 0) | (y == 1)).all()
    lam = beta(1.0, 0, "cutmix", np.arange(n // 2))
    own = targets[::2, 0].numpy()
    assert (own > lam - 0.1).all() and (own > lam + 0.1).any()  # clipped boxes are smaller
    y, targets = mix(x, labels, 2, 0, numbers, mixup=0.2, cutmix=1.0)
    assert torch.allclose(y.mean((1, 2, 3)), targets[:, 1], atol=1e-6)
    blended = ((y > 0) & (y < 1)).flatten(1).any(1).float().mean().item()
    pure = (np.maximum(a, 1 - a).astype(np.float32) == 1).mean()  # nothing of the partner left in float32
    assert blended == pytest.approx((1 - pure) / 2, abs=0.04)


def test_mix_of_nothing_and_refusals():
    x, labels = mixable(4)
    y, targets = mix(x, labels, 10, 0, np.arange(1, 5))
    assert y is x and torch.equal(targets, torch.nn.functional.one_hot(labels, 10).float())
    for numbers in (np.arange(1, 5), np.array([0, 1, 2, 4]), np.arange(3)):
        with pytest.raises(ValueError, match="even batch size"):
            mix(x, labels, 10, 0, numbers, mixup=0.2)
    with pytest.raises(ValueError, match="even batch size"):
        mix(x[:3], labels[:3], 10, 0, np.arange(3), cutmix=1.0)
    with pytest.raises(ValueError, match="mixup=-1"):
        mix(x, labels, 10, 0, np.arange(4), mixup=-1)
    half = mix(x.bfloat16(), labels, 10, 0, np.arange(4), mixup=0.2, cutmix=1.0)
    assert half[0].dtype == torch.bfloat16 and half[1].dtype == torch.float32
