"""
Batches of images -> augmented batches, on the training device: random crop, flip, RandAugment, mixup, cutmix.

    numbers = first + np.arange(batch_size)                 # sample numbers in the training stream
    boxes = random_crops(heights, widths, seed, numbers)    # on the host, before reading
    ...                                                     # read pixels (B, H, W, 3) and sizes (B, 2)
    x = resize(pixels, sizes, 224, flip=flips(seed, numbers))         # (B, 3, 224, 224) uint8
    x = rand_augment(x, seed, numbers, layers=2, magnitude=10)
    x, targets = mix(normalise(x), labels, n_classes, seed, numbers, mixup=0.2)

All randomness is a pure function of (seed, sample number), computed on the host: the same however the
stream is split into batches and processes. Images are uint8 (n, 3, H, W) where nothing else is said.
"""
import numpy as np
import torch
import torch.nn.functional as F

from nanorank import image_ops
from nanorank.errors import UserError
from nanorank.image_ops import to_device
from nanorank.rng import beta, uniform

# ------------------------------------------------------------------------------------------- crops

def flips(seed, numbers, p=0.5):
    """Which samples are mirrored, each with probability p: bool (n,)."""
    return uniform(seed, "flip", numbers) < p


def random_crops(heights, widths, seed, numbers, area=(0.05, 1.0), ratio=(3 / 4, 4 / 3)):
    """Random resized crops of images of these sizes: int64 (B, 4), top, left, height, width.

    Ten times a share of the image's area and a ratio width / height (uniform in the logarithm) are drawn.
    The first crop that fits is taken, else the largest central one within the ratios, as in torchvision's
    RandomResizedCrop. Raises UserError for bounds out of order and for empty images.
    """
    heights, widths = np.asarray([heights, widths], dtype=np.int64)
    if not 0 < area[0] <= area[1] <= 1 or not 0 < ratio[0] <= ratio[1]:
        raise UserError(f"area={area}, ratio={ratio}: expects 0 < area[0] <= area[1] <= 1 "
                        "and 0 < ratio[0] <= ratio[1]")
    shortest = np.minimum(heights, widths)
    if shortest.min(initial=1) < 1:
        raise UserError(f"image number {numbers[shortest.argmin()]} is empty: expects 1 x 1 or larger")

    # ten tries: w and h (B, 10)
    u = uniform(seed, "crop", numbers, 22)
    pixels = (area[0] + (area[1] - area[0]) * u[:, :10]) * (heights * widths)[:, None]
    low, high = np.log(ratio[0]), np.log(ratio[1])
    shape = np.exp(low + (high - low) * u[:, 10:20])  # width / height
    w = np.rint(np.sqrt(pixels * shape)).astype(np.int64)
    h = np.rint(np.sqrt(pixels / shape)).astype(np.int64)
    fits = (w > 0) & (w <= widths[:, None]) & (h > 0) & (h <= heights[:, None])

    # the first that fits, or the central one: w and h (B,)
    found = fits.any(1)
    first = np.arange(len(heights)), fits.argmax(1)
    central_h = np.clip(np.rint(widths / ratio[0]).astype(np.int64), 1, heights)
    central_w = np.clip(np.rint(heights * ratio[1]).astype(np.int64), 1, widths)
    h = np.where(found, h[first], central_h)
    w = np.where(found, w[first], central_w)
    top = np.where(found, u[:, 20] * (heights - h + 1), (heights - h) // 2)
    left = np.where(found, u[:, 21] * (widths - w + 1), (widths - w) // 2)
    return np.stack([top, left, h, w], axis=1).astype(np.int64)

# ------------------------------------------------------------------------------------------ resize

def resize(pixels, sizes, out, boxes=None, flip=None):
    """Crops of padded images, resized: uint8 (B, 3, out, out), antialiased bilinear, as Pillow's resize.

    pixels: uint8 (B, H, W, 3) on the device. sizes: (B, 2), height and width of the part that is valid; the
    rest is never read. out: side in pixels, or (height, width). boxes: float (B, 4), top, left, height,
    width, by default all that is valid. flip: bool (B,), mirrored left to right. sizes, boxes and flip are
    tensors on the device or arrays on the host. Pillow rounds to uint8 between its two passes, this does
    not: they differ by one level at most (by two where TF32 rounds the weights).
    """
    device = pixels.device
    B, H, W, _ = pixels.shape
    if device.type == "cpu" and B > 8:  # a third less time: what is in flight stays in the caches
        parts = []
        for k in range(0, B, 8):
            own = [None if x is None else x[k:k + 8] for x in (boxes, flip)]
            parts.append(resize(pixels[k:k + 8], sizes[k:k + 8], out, *own))
        return torch.cat(parts)

    out_h, out_w = (out, out) if isinstance(out, int) else out
    sizes = to_device(sizes, device).float()
    boxes = F.pad(sizes, (2, 0)) if boxes is None else to_device(boxes, device).float()
    rows = triangle_weights(sizes[:, 0], H, boxes[:, 0], boxes[:, 2], out_h)     # (B, out_h, H)
    columns = triangle_weights(sizes[:, 1], W, boxes[:, 1], boxes[:, 3], out_w)  # (B, out_w, W)
    if flip is not None:
        columns = torch.where(to_device(flip, device)[:, None, None], columns.flip(1), columns)
    with torch.autocast(device.type, enabled=False):
        # change the layout while pixels are bytes
        x = pixels.transpose(2, 3).contiguous().view(B, H, 3 * W).float()
        x = torch.bmm(rows, x).view(B, out_h * 3, W)
        x = torch.bmm(x, columns.mT)
    x = x.add_(0.5).clamp_(0, 255).to(torch.uint8)
    return x.view(B, out_h, 3, out_w).transpose(1, 2).contiguous()


def triangle_weights(valid, n, start, length, out):
    """Weights (B, out, n), float32, of n pixels in `out` pixels that share [start, start + length).

    The first `valid` (B,) of the n pixels count. The triangle is as wide as an output pixel, or as an input
    pixel where those are wider.
    """
    scale = (length / out)[:, None, None]
    number = torch.arange(out, device=valid.device)[:, None] + 0.5
    centre = start[:, None, None] + number * scale
    pixel = torch.arange(n, device=valid.device) + 0.5
    weight = (1 - (pixel - centre).abs() / scale.clamp(min=1)).clamp(min=0)
    weight = weight * (pixel < valid[:, None, None])
    return weight / weight.sum(-1, keepdim=True)

# ------------------------------------------------------------------------------------- RandAugment

def operations(level, H, W, sign, row, column):
    """RandAugment's operations and arguments at level / 10 of full strength, as in big_vision's `randaug`.

    sign (-1 or 1), row, column: arrays, one entry an image. Moves and holes are 100 and 40 pixels at
    224 x 224 there; here they are as much of any image.
    """
    level = level / 10
    factor = 0.1 + 1.8 * level
    return {
        image_ops.auto_contrast: (),
        image_ops.equalize: (),
        image_ops.invert: (),
        image_ops.rotate: (30 * level * sign,),
        image_ops.posterize: (min(8, int(4 * level)),),
        image_ops.solarize: (min(256, int(256 * level)),),
        image_ops.color: (factor,),
        image_ops.contrast: (factor,),
        image_ops.brightness: (factor,),
        image_ops.sharpness: (factor,),
        image_ops.shear_x: (0.3 * level * sign,),
        image_ops.shear_y: (0.3 * level * sign,),
        image_ops.translate_x: (100 / 224 * W * level * sign,),
        image_ops.translate_y: (100 / 224 * H * level * sign,),
        image_ops.cutout: (row, column, round(40 / 224 * min(H, W) * level)),
        image_ops.solarize_add: (int(110 * level),),
    }


def rand_augment(x, seed, numbers, layers=2, magnitude=10):
    """RandAugment (Cubuk et al. 2020): `layers` times one of sixteen operations, drawn for each image.

    numbers: sample numbers (n,), on the host. Raises UserError for what is negative or not of one length.
    """
    n, _, H, W = x.shape
    if layers < 0 or magnitude < 0:
        raise UserError(f"layers={layers}, magnitude={magnitude}: expects 0 or more")
    if len(numbers) != n:
        raise UserError(f"{len(numbers)} sample numbers for {n} images: expects one each")
    if not layers or not n:
        return x
    u = uniform(seed, "randaugment", numbers, 4 * layers).reshape(n, layers, 4)
    for k in range(layers):
        # images of one operation stand side by side: a call for each operation
        op = np.floor(16 * u[:, k, 0])
        order = np.argsort(op, kind="stable")
        to_groups, back = to_device(np.stack([order, np.argsort(order)]), x.device)
        sign, row, column = u[order, k, 1:].T
        ops = operations(magnitude, H, W, np.where(sign < 0.5, -1, 1), (row * H).astype(np.int64),
                         (column * W).astype(np.int64))
        ends = np.searchsorted(op[order], range(len(ops) + 1))
        x = x[to_groups]
        parts = []
        for (function, arguments), start, end in zip(ops.items(), ends, ends[1:]):
            if start < end:
                own = [a[start:end] if np.ndim(a) else a for a in arguments]
                parts.append(function(x[start:end], *own))
        x = torch.cat(parts)[back]
    return x

# ----------------------------------------------------------------------------------- mixup, cutmix

def mix(x, labels, n_classes, seed, numbers, mixup=0.0, cutmix=0.0):
    """Mixup (Zhang et al. 2018) and cutmix (Yun et al. 2019) of neighbours.

    x: float (B, C, H, W). labels: int64 (B,) on its device. mixup, cutmix: alpha of Beta(alpha, alpha),
    0 for none; with both, each pair tosses a fair coin. Returns x and targets (B, n_classes), float32.

    Samples 2k and 2k + 1 are mixed with each other. Mixup keeps the larger share of each image, as
    big_vision does. Cutmix swaps a box of share 1 - lambda about a uniform centre, clipped to the image.
    Raises UserError unless the batch begins with an even number and holds whole pairs.
    """
    B, _, H, W = x.shape
    targets = F.one_hot(labels, n_classes).float()
    if min(mixup, cutmix) < 0:
        raise UserError(f"mixup={mixup}, cutmix={cutmix}: expects 0 or more")
    if not mixup and not cutmix:
        return x, targets
    numbers = np.asarray(numbers)
    if B % 2 or len(numbers) != B or (numbers[::2] % 2).any() or (numbers[1::2] - numbers[::2] != 1).any():
        raise UserError("mixup and cutmix mix samples 2k and 2k + 1: expects a batch of such pairs, not "
                        f"{B} images numbered {numbers[:4].tolist()} ...; choose an even batch size")

    # a plan for each pair, on the host
    pairs = numbers[::2] // 2
    cut = np.full(len(pairs), bool(cutmix))
    if mixup and cutmix:
        cut = uniform(seed, "cutmix or mixup", pairs) < 0.5
    share = np.ones(len(pairs))  # of the image itself
    top = bottom = left = right = 0 * share
    if mixup:
        share = beta(mixup, seed, "mixup", pairs)
        share = np.maximum(share, 1 - share)
    if cutmix:
        side = np.sqrt(1 - beta(cutmix, seed, "cutmix", pairs))
        y, z = uniform(seed, "cutmix centre", pairs, 2).T
        top = np.clip(np.rint((y - 0.5 * side) * H), 0, H)
        bottom = np.clip(np.rint((y + 0.5 * side) * H), 0, H)
        left = np.clip(np.rint((z - 0.5 * side) * W), 0, W)
        right = np.clip(np.rint((z + 0.5 * side) * W), 0, W)
        share = np.where(cut, 1 - (bottom - top) * (right - left) / (H * W), share)

    # both images of a pair follow it; one copy to the device
    plan = np.repeat(np.stack([share, cut, top, bottom, left, right]), 2, axis=1).astype(np.float32)
    share, cut, top, bottom, left, right = to_device(plan, x.device)[..., None, None, None]  # (B, 1, 1, 1)
    weight = share.to(x.dtype)
    if cutmix:
        i, j = torch.arange(H, device=x.device)[:, None], torch.arange(W, device=x.device)
        box = (i >= top) & (i < bottom) & (j >= left) & (j < right)  # (B, 1, H, W)
        weight = torch.where(cut > 0, (~box).to(x.dtype), weight)
    x = (weight * x).addcmul_(1 - weight, partners(x))
    share = share[:, :, 0, 0]
    targets = share * targets + (1 - share) * partners(targets)
    return x, targets


def partners(x):
    """Rows 1, 0, 3, 2, 5, 4 ... of x."""
    return x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
