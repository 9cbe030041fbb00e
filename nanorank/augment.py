"""
Batches of images -> augmented batches, on the training device: random resized crop, flip, RandAugment, mixup, cutmix.

    numbers = first + np.arange(batch_size)                                      # sample numbers in the training stream
    boxes = random_crops(heights, widths, seed, numbers)                         # on the host, before reading
    ...                                                                          # crops -> pixels (B, H, W, 3), sizes (B, 2)
    x = resize(pixels, sizes, 224, flip=flips(seed, numbers))                    # (B, 3, 224, 224) uint8
    x = rand_augment(x, seed, numbers, layers=2, magnitude=10)
    x, targets = mix(normalise(x), labels, n_classes, seed, numbers, mixup=0.2)

All randomness is a pure function of (seed, sample number), computed on the host, so that an image's augmentation is the
same however the stream is split into batches and processes; there is no generator and no state, and no step waits for the
device. Images are uint8 (n, 3, H, W) where nothing else is said.

The reference of every operation is Pillow, to the bit (resize: to one level); tests/test_augment.py holds them side by side.
"""
import numpy as np
import torch
import torch.nn.functional as F

from nanorank.errors import UserError
from nanorank.rng import beta, uniform

GREY = 128  # what comes in from beyond the image's edge

# ---------------------------------------------------------------------------------------------------- random numbers


def flips(seed, numbers, p=0.5):
    """Which samples are mirrored, each with probability p: bool (len(numbers),)."""
    return uniform(seed, "flip", numbers) < p


def random_crops(heights, widths, seed, numbers, area=(0.05, 1.0), ratio=(3 / 4, 4 / 3)):
    """Random resized crops of images of these sizes: int64 (B, 4), top, left, height, width.

    Up to ten times a share of the image's area and a ratio width / height (uniform in the logarithm) are drawn; the first
    crop that fits is taken, else the largest central one within the ratios (as torchvision's RandomResizedCrop). No crop is
    wider than ratio[1] times its height nor higher than 1 / ratio[0] times its width, so panoramas do not widen a batch.
    Raises UserError for bounds that are not ordered or positive, and for empty images.
    """
    heights, widths = np.asarray(heights, dtype=np.int64), np.asarray(widths, dtype=np.int64)
    if not 0 < area[0] <= area[1] <= 1 or not 0 < ratio[0] <= ratio[1]:
        raise UserError(f"area={area}, ratio={ratio}: expects 0 < area[0] <= area[1] <= 1 and 0 < ratio[0] <= ratio[1]")
    if min(heights.min(initial=1), widths.min(initial=1)) < 1:
        raise UserError(f"image number {numbers[int(np.argmin(np.minimum(heights, widths)))]} is empty: expects 1 x 1 or larger")
    u = uniform(seed, "crop", numbers, 22)
    share = (area[0] + (area[1] - area[0]) * u[:, :10]) * (heights * widths)[:, None]
    shape = np.exp(np.log(ratio[0]) + (np.log(ratio[1]) - np.log(ratio[0])) * u[:, 10:20])  # width / height
    w, h = np.rint(np.sqrt(share * shape)).astype(np.int64), np.rint(np.sqrt(share / shape)).astype(np.int64)
    fits = (w > 0) & (w <= widths[:, None]) & (h > 0) & (h <= heights[:, None])
    row, found = np.arange(len(heights)), fits.any(1)
    first = fits.argmax(1)
    central_h = np.clip(np.rint(widths / ratio[0]).astype(np.int64), 1, heights)
    central_w = np.clip(np.rint(heights * ratio[1]).astype(np.int64), 1, widths)
    h, w = np.where(found, h[row, first], central_h), np.where(found, w[row, first], central_w)
    top = np.where(found, u[:, 20] * (heights - h + 1), (heights - h) // 2).astype(np.int64)
    left = np.where(found, u[:, 21] * (widths - w + 1), (widths - w) // 2).astype(np.int64)
    return np.stack([top, left, h, w], axis=1)

# ------------------------------------------------------------------------------------------------------------- resize

def resize(pixels, sizes, out, boxes=None, flip=None):
    """Crops `boxes` of padded images, resized to `out`: uint8 (B, 3, out, out), antialiased bilinear, as Pillow's resize.

    pixels: uint8 (B, H, W, 3) on the device; sizes: (B, 2), height and width of what of it is valid, 1 at least, the rest is
    never read; out: side in pixels, or (height, width); boxes: float (B, 4), top, left, height, width, default all that is
    valid; flip: bool (B,), mirrored left to right. The last three: tensors on the device, or arrays.

    Pillow rounds to uint8 between its two passes, this does not: they differ by one level at most. Where the user allows
    TF32 products pixels are exact in it (8 of its 11 bits), weights are not, which can cost another level.
    """
    device = pixels.device
    B, H, W, _ = pixels.shape
    if device.type == "cpu" and B > 8:  # a third less time, as what is in flight stays in the caches
        parts = [slice(k, k + 8) for k in range(0, B, 8)]
        return torch.cat([resize(pixels[p], sizes[p], out, None if boxes is None else boxes[p], None if flip is None else flip[p]) for p in parts])
    out_h, out_w = (out, out) if isinstance(out, int) else out
    sizes = to_device(sizes, device).float()
    boxes = F.pad(sizes, (2, 0)) if boxes is None else to_device(boxes, device).float()
    rows = triangle_weights(sizes[:, 0], H, boxes[:, 0], boxes[:, 2], out_h)  # (B, out_h, H)
    columns = triangle_weights(sizes[:, 1], W, boxes[:, 1], boxes[:, 3], out_w)  # (B, out_w, W)
    if flip is not None:
        columns = torch.where(to_device(flip, device)[:, None, None], columns.flip(1), columns)
    with torch.autocast(device.type, enabled=False):
        x = pixels.transpose(2, 3).contiguous().view(B, H, 3 * W).float()  # layouts change while they are bytes
        x = torch.bmm(rows, x).view(B, out_h * 3, W)
        x = torch.bmm(x, columns.mT)
    return x.add_(0.5).clamp_(0, 255).to(torch.uint8).view(B, out_h, 3, out_w).transpose(1, 2).contiguous()


def triangle_weights(valid, n, start, length, out):
    """Weights (B, out, n) of n pixels, of which `valid` count, in `out` pixels that share [start, start + length). float32.

    The triangle is as wide as an output pixel, or as an input pixel where those are wider; weights are scaled to sum 1.
    """
    scale = (length / out)[:, None, None]
    centre = start[:, None, None] + (torch.arange(out, device=valid.device)[:, None] + 0.5) * scale
    pixel = torch.arange(n, device=valid.device) + 0.5
    weight = (1 - (pixel - centre).abs() / scale.clamp(min=1)).clamp(min=0) * (pixel < valid[:, None, None])
    return weight / weight.sum(-1, keepdim=True)


def to_device(values, device):
    """A tensor on `device` of a tensor, or of an array on the host; the host does not wait for the copy."""
    if torch.is_tensor(values):
        return values.to(device, non_blocking=True)
    values = torch.from_numpy(np.ascontiguousarray(values))
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)

# ---------------------------------------------------------------------------------------------------------- operations
# uint8 (n, 3, H, W) -> the same. Arguments are numbers, or arrays on the host, one entry an image.

def per_image(values, device, dtype):
    """A number as it is; an array (n,) as a tensor (n, 1, 1, 1)."""
    return values if np.ndim(values) == 0 else to_device(np.asarray(values, dtype=dtype), device)[:, None, None, None]


def auto_contrast(x):
    """Each channel of each image stretched linearly to 0 ... 255 (ImageOps.autocontrast)."""
    exact = torch.float32 if x.device.type == "mps" else torch.float64  # Pillow's, to the bit; mps has none and may miss by 1
    lo, hi = x.flatten(2).amin(2, keepdim=True).to(exact), x.flatten(2).amax(2, keepdim=True).to(exact)
    scale = torch.full_like(hi, 255) / (hi - lo)  # 255 / tensor would multiply by the reciprocal, not quite the same
    scale = torch.where(hi > lo, scale, 1)
    level = torch.arange(256, dtype=exact, device=x.device)
    table = (level * scale + torch.where(hi > lo, -lo * scale, 0)).clamp_(0, 255).to(torch.uint8)  # (n, 3, 256)
    return table.gather(2, x.flatten(2).long()).view_as(x)


def equalize(x):
    """Each channel of each image with its histogram made flat (ImageOps.equalize)."""
    index = x.flatten(2).long()
    counts = torch.zeros(*index.shape[:2], 256, dtype=torch.int32, device=x.device)
    counts.scatter_add_(2, index, torch.ones((), dtype=torch.int32, device=x.device).expand_as(index))
    brightest = counts.gather(2, x.flatten(2).amax(2, keepdim=True).long())  # pixels of it do not count in the step
    step = (index.shape[2] - brightest) // 255
    darker = counts.cumsum(2) - counts  # pixels below each level
    table = ((darker + step // 2) // step.clamp(min=1)).clamp_(max=255)
    level = torch.arange(256, device=x.device)
    return torch.where(step > 0, table, level).to(torch.uint8).gather(2, index).view_as(x)


def invert(x):
    """ImageOps.invert."""
    return 255 - x


def posterize(x, bits):
    """The upper `bits` (0 ... 8) of each value (ImageOps.posterize)."""
    return x & per_image(256 - (1 << 8 - bits), x.device, np.uint8)


def solarize(x, threshold):
    """Values of `threshold` (0 ... 256) and above inverted (ImageOps.solarize)."""
    return torch.where(x.short() < per_image(threshold, x.device, np.int16), x, 255 - x)


def solarize_add(x, addition):
    """`addition` added to values below 128. Pillow has no such operation."""
    raised = (x.short() + per_image(addition, x.device, np.int16)).clamp_(0, 255).to(torch.uint8)
    return torch.where(x < 128, raised, x)


def blend(degenerate, x, factor):
    """degenerate + factor * (x - degenerate), clipped and truncated: Image.blend, in its float32."""
    difference = x.float().sub_(degenerate)
    return difference.mul_(per_image(factor, x.device, np.float32)).add_(degenerate).clamp_(0, 255).to(torch.uint8)


def luma(x):
    """Image.convert("L") of RGB: ITU-R 601-2 in 16 bits of fixed point. int32 (n, 1, H, W)."""
    red, green, blue = x.split(1, dim=1)
    grey = red.int().mul_(19595).add_(green, alpha=38470).add_(blue, alpha=7471)
    return grey.add_(0x8000).bitwise_right_shift_(16)


def color(x, factor):
    """From grey (0) over the image (1) to more colour (ImageEnhance.Color)."""
    return blend(luma(x).float(), x, factor)


def contrast(x, factor):
    """From its mean grey (0) over the image (1) to more contrast (ImageEnhance.Contrast).

    big_vision's TensorFlow divides the sum of the grey values' histogram, which is the number of pixels, by 256: its mean
    grey depends on the image's size alone. Not so here.
    """
    pixels = x.shape[2] * x.shape[3]
    mean = (2 * luma(x).sum((2, 3), keepdim=True) + pixels) // (2 * pixels)  # rounded
    return blend(mean.float(), x, factor)


def brightness(x, factor):
    """From black (0) over the image (1) to brighter (ImageEnhance.Brightness)."""
    return blend(0.0, x, factor)


def sharpness(x, factor):
    """From smoothed (0) over the image (1) to sharper (ImageEnhance.Sharpness).

    Smoothed: mean over 3 x 3 pixels, the central one counted five times, rounded; big_vision's TensorFlow truncates. Both
    leave the outermost pixels as they are.
    """
    smooth = x.float()
    if min(x.shape[2:]) > 2:
        inner = smooth[:, :, 1:-1, 1:-1]
        rows = (smooth[:, :, :-2] + smooth[:, :, 1:-1]).add_(smooth[:, :, 2:])
        total = (rows[..., :-2] + rows[..., 1:-1]).add_(rows[..., 2:]).add_(inner, alpha=4)
        inner.copy_(total.add_(6.5).mul_(1 / 13).floor_())  # whole sums: half a thirteenth clear of any step
    return blend(smooth, x, factor)


def affine(x, matrix):
    """Image.transform(AFFINE, NEAREST): output pixel (i, j) is the input's at matrix @ (j, i, 1) = (column, row), else GREY.

    matrix: float64 (n, 6) or (6,), on the host; Pillow's pixels are centred on halves, and its sums have 16 bits of fraction.
    """
    n, _, H, W = x.shape
    a, b, c, d, e, f = np.asarray(matrix, dtype=np.float64).T
    fixed = np.stack([a, b, c + 0.5 * a + 0.5 * b + 1, d, e, f + 0.5 * d + 0.5 * e + 1], axis=-1).reshape(-1, 6, 1, 1)
    a, b, c, d, e, f = to_device(np.floor(fixed * 65536 + 0.5).astype(np.int32), x.device).unbind(1)  # (n or 1, 1, 1)
    i, j = torch.arange(H, dtype=torch.int32, device=x.device)[:, None], torch.arange(W, dtype=torch.int32, device=x.device)
    column = (a * j + (b * i + c)).bitwise_right_shift_(16).clamp_(0, W + 1)  # in an image with a margin of one grey pixel
    row = (d * j + (e * i + f)).bitwise_right_shift_(16).clamp_(0, H + 1)
    index = row.mul_(W + 2).add_(column).long().view(-1, 1, H * W).expand(n, x.shape[1], H * W)
    return F.pad(x, (1, 1, 1, 1), value=GREY).flatten(2).gather(2, index).view_as(x)


def rotate(x, degrees):
    """Counter-clockwise about the centre (Image.rotate, NEAREST)."""
    angle = -np.radians(np.asarray(degrees, dtype=np.float64) % 360)
    cos, sin = np.round(np.cos(angle), 15), np.round(np.sin(angle), 15)
    j, i = x.shape[3] / 2, x.shape[2] / 2  # the centre stays where it is
    return affine(x, np.stack([cos, sin, j - (cos * j + sin * i), -sin, cos, i - (cos * i - sin * j)], axis=-1))


def affine_one(x, entry, values):
    """affine with the identity matrix but for one entry, whose value is given."""
    matrix = np.zeros((*np.shape(values), 6)) + (1, 0, 0, 0, 1, 0)
    matrix[..., entry] = values
    return affine(x, matrix)


def shear_x(x, slope):
    """Each row moved left by slope times its distance from the top."""
    return affine_one(x, 1, slope)


def shear_y(x, slope):
    """Each column moved up by slope times its distance from the left."""
    return affine_one(x, 3, slope)


def translate_x(x, pixels):
    """Moved left."""
    return affine_one(x, 2, pixels)


def translate_y(x, pixels):
    """Moved up."""
    return affine_one(x, 5, pixels)


def cutout(x, row, column, half):
    """Grey in a square of side 2 * half about (row, column), as far as it is in the image."""
    i, j = torch.arange(x.shape[2], device=x.device)[:, None], torch.arange(x.shape[3], device=x.device)
    row, column = per_image(row, x.device, np.int64), per_image(column, x.device, np.int64)
    hole = (i >= row - half) & (i < row + half) & (j >= column - half) & (j < column + half)
    return x.masked_fill(hole, GREY)

# --------------------------------------------------------------------------------------------------------- RandAugment

def operations(level, H, W, sign, row, column):
    """RandAugment's sixteen operations and their arguments at level / 10 of full strength, as big_vision's `randaug` sets them.

    sign (-1 or 1), row, column: arrays, one entry an image. Moves and holes are 100 and 40 pixels at 224 x 224 there, here
    as much of any image, so that a recipe means the same at all resolutions.
    """
    level = level / 10
    enhance = (0.1 + 1.8 * level,)
    return {auto_contrast: (), equalize: (), invert: (), rotate: (30 * level * sign,), posterize: (min(8, int(4 * level)),),
            solarize: (min(256, int(256 * level)),), color: enhance, contrast: enhance, brightness: enhance, sharpness: enhance,
            shear_x: (0.3 * level * sign,), shear_y: (0.3 * level * sign,),
            translate_x: (100 / 224 * W * level * sign,), translate_y: (100 / 224 * H * level * sign,),
            cutout: (row, column, round(40 / 224 * min(H, W) * level)), solarize_add: (int(110 * level),)}


def rand_augment(x, seed, numbers, layers=2, magnitude=10):
    """RandAugment (Cubuk et al. 2020): `layers` times one of sixteen operations, drawn for each image. uint8 in and out.

    numbers: sample numbers (n,), on the host. Raises UserError for negative layers and magnitude, and unless there is a number per image.
    """
    n, _, H, W = x.shape
    if layers < 0 or magnitude < 0:
        raise UserError(f"layers={layers}, magnitude={magnitude}: expects 0 or more")
    if len(numbers) != n:
        raise UserError(f"{len(numbers)} sample numbers for {n} images: expects one each")
    if not layers or not n:
        return x
    u = uniform(seed, "randaugment", numbers, 4 * layers).reshape(n, layers, 4).transpose(1, 2, 0)  # (layers, 4, n)
    op = (16 * u[:, 0]).astype(np.int64)
    order = np.argsort(op, axis=1, kind="stable")  # images of one operation side by side
    place = np.argsort(order, axis=1)
    moves = [order[0], *(place[k - 1][order[k]] for k in range(1, layers)), place[-1]]  # from each layer's order to the next
    moves = to_device(np.stack(moves), x.device)  # all at once
    for k in range(layers):
        x = x[moves[k]]
        sign, row, column = np.where(u[k, 1] < 0.5, -1, 1), (u[k, 2] * H).astype(np.int64), (u[k, 3] * W).astype(np.int64)
        ops = operations(magnitude, H, W, *(values[order[k]] for values in (sign, row, column)))
        ends = np.cumsum(np.bincount(op[k], minlength=len(ops)))
        parts = []
        for (function, arguments), start, end in zip(ops.items(), [0, *ends[:-1]], ends):
            if end > start:
                parts.append(function(x[start:end], *(a[start:end] if np.ndim(a) else a for a in arguments)))
        x = torch.cat(parts)
    return x[moves[layers]]

# ------------------------------------------------------------------------------------------------------- mixup, cutmix

def mix(x, labels, n_classes, seed, numbers, mixup=0.0, cutmix=0.0):
    """Mixup (Zhang et al. 2018) and cutmix (Yun et al. 2019) of neighbours. Returns x and targets (B, n_classes), float32.

    x: float (B, C, H, W); labels: int64 (B,) on its device; mixup, cutmix: alpha of Beta(alpha, alpha), 0 for none; with
    both each pair tosses a fair coin. Samples 2k and 2k + 1 are mixed with each other, so that pairs do not depend on how
    the stream is split: a batch must begin with an even number and hold whole pairs, else ValueError.
    Mixup keeps the larger share of each image, as big_vision does it. Cutmix swaps a box of share 1 - lambda about a
    uniform centre, clipped to the image; what is left of it is counted in pixels and sets the targets.
    """
    B, _, H, W = x.shape
    targets = F.one_hot(labels, n_classes).float()
    if min(mixup, cutmix) < 0:
        raise UserError(f"mixup={mixup}, cutmix={cutmix}: expects 0 or more")
    if not mixup and not cutmix:
        return x, targets
    numbers = np.asarray(numbers)
    if len(numbers) != B or B % 2 or (numbers[::2] % 2).any() or (numbers[1::2] != numbers[::2] + 1).any():
        raise UserError(f"mixup and cutmix mix samples 2k and 2k + 1: expects a batch of such pairs, not {B} images "
                         f"numbered {numbers[:4].tolist()} ...; choose an even batch size")
    pairs = numbers[::2] // 2
    cut = uniform(seed, "cutmix or mixup", pairs) < 0.5 if mixup and cutmix else np.full(len(pairs), bool(cutmix))
    share = np.ones(len(pairs))  # of the image itself
    if mixup:
        share = beta(mixup, seed, "mixup", pairs)
        share = np.maximum(share, 1 - share)
    top = bottom = left = right = np.zeros(len(pairs))
    if cutmix:
        side = np.sqrt(1 - beta(cutmix, seed, "cutmix", pairs))
        y, z = uniform(seed, "cutmix centre", pairs, 2).T
        top, bottom = (np.clip(np.rint((y + half * side) * H), 0, H) for half in (-0.5, 0.5))
        left, right = (np.clip(np.rint((z + half * side) * W), 0, W) for half in (-0.5, 0.5))
        share = np.where(cut, 1 - (bottom - top) * (right - left) / (H * W), share)
    plan = np.repeat(np.stack([share, cut, top, bottom, left, right]), 2, axis=1).astype(np.float32)
    share, cut, top, bottom, left, right = to_device(plan, x.device)[..., None, None, None]  # (B, 1, 1, 1)
    weight = share.to(x.dtype)
    if cutmix:
        i, j = torch.arange(H, device=x.device)[:, None], torch.arange(W, device=x.device)
        box = (i >= top) & (i < bottom) & (j >= left) & (j < right)  # (B, 1, H, W)
        weight = torch.where(cut > 0, (~box).to(x.dtype), weight)
    share = share[:, :, 0, 0]
    targets = share * targets + (1 - share) * partners(targets)
    return (weight * x).addcmul_(1 - weight, partners(x)), targets


def partners(x):
    """Rows 1, 0, 3, 2, 5, 4 ... of x."""
    return x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
