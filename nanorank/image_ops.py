"""
Pillow's image operations on batches of images, on any device: uint8 (n, 3, H, W) -> the same.

    y = rotate(x, 30.0)                          # all images alike
    y = posterize(x, np.array([4, 7, 8]))        # an argument for each of three images

Arguments are numbers, or arrays on the host with one entry an image. Every operation is Pillow's to the bit.
"""
import numpy as np
import torch
import torch.nn.functional as F

GREY = 128  # fills what comes in from beyond the image's edge


def to_device(values, device):
    """A tensor on `device` from a tensor or an array on the host. The host does not wait for the copy."""
    if torch.is_tensor(values):
        return values.to(device, non_blocking=True)
    values = torch.from_numpy(np.ascontiguousarray(values))
    if device.type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def per_image(values, device, dtype):
    """A number as it is; an array (n,) as a tensor (n, 1, 1, 1)."""
    if np.ndim(values) == 0:
        return values
    return to_device(np.asarray(values, dtype=dtype), device)[:, None, None, None]

# ------------------------------------------------------------------------------------------ levels

def auto_contrast(x):
    """Each channel of each image stretched linearly to 0 ... 255 (ImageOps.autocontrast)."""
    # Pillow computes in float64; mps has none, and may miss by 1
    exact = torch.float32 if x.device.type == "mps" else torch.float64
    lo, hi = [z.to(exact) for z in x.flatten(2).aminmax(dim=2, keepdim=True)]  # (n, 3, 1)
    # torch's 255 / tensor multiplies by the reciprocal, which is not quite the same
    scale = torch.full_like(hi, 255) / (hi - lo)
    scale = torch.where(hi > lo, scale, 1)
    offset = torch.where(hi > lo, -lo * scale, 0)
    level = torch.arange(256, dtype=exact, device=x.device)
    table = (level * scale + offset).clamp_(0, 255).to(torch.uint8)  # (n, 3, 256)
    return table.gather(2, x.flatten(2).long()).view_as(x)


def equalize(x):
    """Each channel of each image with its histogram made flat (ImageOps.equalize)."""
    index = x.flatten(2).long()  # (n, 3, H * W)
    ones = torch.ones_like(index, dtype=torch.int32)  # an expanded 1 is less memory, but in doubt on mps
    counts = torch.zeros(*index.shape[:2], 256, dtype=torch.int32, device=x.device)
    counts.scatter_add_(2, index, ones)
    brightest = counts.gather(2, index.amax(2, keepdim=True))  # do not count in the step
    step = (index.shape[2] - brightest) // 255
    darker = counts.cumsum(2) - counts  # pixels below each level
    table = ((darker + step // 2) // step.clamp(min=1)).clamp_(max=255)
    level = torch.arange(256, device=x.device)
    table = torch.where(step > 0, table, level).to(torch.uint8)
    return table.gather(2, index).view_as(x)


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

# ------------------------------------------------------------------------------------- enhancement

def blend(degenerate, x, factor):
    """degenerate + factor * (x - degenerate), clipped and truncated: Image.blend, in its float32."""
    difference = x.float().sub_(degenerate)
    difference.mul_(per_image(factor, x.device, np.float32))
    return difference.add_(degenerate).clamp_(0, 255).to(torch.uint8)


def luma(x):
    """Image.convert("L") of RGB: ITU-R 601-2 in 16 bits of fixed point. int32 (n, 1, H, W)."""
    red, green, blue = x.split(1, dim=1)
    grey = red.int().mul_(19595).add_(green, alpha=38470).add_(blue, alpha=7471)
    return grey.add_(0x8000) >> 16


def color(x, factor):
    """From grey (0) over the image (1) to more colour (ImageEnhance.Color)."""
    return blend(luma(x).float(), x, factor)


def contrast(x, factor):
    """From its mean grey (0) over the image (1) to more contrast (ImageEnhance.Contrast).

    big_vision's TensorFlow takes the number of pixels / 256 for the mean, by mistake.
    """
    pixels = x.shape[2] * x.shape[3]
    total = luma(x).sum((2, 3), keepdim=True)
    mean = (2 * total + pixels) // (2 * pixels)  # rounded
    return blend(mean.float(), x, factor)


def brightness(x, factor):
    """From black (0) over the image (1) to brighter (ImageEnhance.Brightness)."""
    return blend(0.0, x, factor)


def sharpness(x, factor):
    """From smoothed (0) over the image (1) to sharper (ImageEnhance.Sharpness).

    Smoothed: the mean over 3 x 3 pixels, the central one counted five times, rounded; not the outermost ones.
    """
    smooth = x.float()
    if min(x.shape[2:]) > 2:
        inner = smooth[:, :, 1:-1, 1:-1]
        rows = (smooth[:, :, :-2] + smooth[:, :, 1:-1]).add_(smooth[:, :, 2:])
        total = (rows[..., :-2] + rows[..., 1:-1]).add_(rows[..., 2:]).add_(inner, alpha=4)
        inner.copy_(total.add_(6.5).mul_(1 / 13).floor_())  # exact: sums are whole numbers
    return blend(smooth, x, factor)

# ---------------------------------------------------------------------------------------- geometry

def affine(x, matrix):
    """Image.transform(AFFINE, NEAREST): output pixel (i, j) is the input's at matrix @ (j, i, 1), else GREY.

    matrix: float64 (n, 6) or (6,), on the host, gives (column, row). Pillow's sums have 16 bits of fraction.
    """
    n, _, H, W = x.shape
    a, b, c, d, e, f = np.asarray(matrix, dtype=np.float64).T
    # from the pixels' centres; + 1: the input gets a margin of one grey pixel
    fixed = [a, b, c + 0.5 * a + 0.5 * b + 1, d, e, f + 0.5 * d + 0.5 * e + 1]
    fixed = np.stack(fixed, axis=-1).reshape(-1, 6, 1, 1)
    fixed = np.floor(fixed * 65536 + 0.5).astype(np.int32)
    a, b, c, d, e, f = to_device(fixed, x.device).unbind(1)  # (n or 1, 1, 1)

    i = torch.arange(H, dtype=torch.int32, device=x.device)[:, None]
    j = torch.arange(W, dtype=torch.int32, device=x.device)
    column = ((a * j + (b * i + c)) >> 16).clamp_(0, W + 1)
    row = ((d * j + (e * i + f)) >> 16).clamp_(0, H + 1)
    index = row.mul_(W + 2).add_(column).long()
    index = index.view(-1, 1, H * W).expand(n, x.shape[1], H * W)
    return F.pad(x, (1, 1, 1, 1), value=GREY).flatten(2).gather(2, index).view_as(x)


def rotate(x, degrees):
    """Counter-clockwise about the centre (Image.rotate, NEAREST)."""
    angle = -np.radians(np.asarray(degrees, dtype=np.float64) % 360)
    cos, sin = np.round([np.cos(angle), np.sin(angle)], 15)
    i, j = x.shape[2] / 2, x.shape[3] / 2  # the centre stays where it is
    matrix = [cos, sin, j - (cos * j + sin * i), -sin, cos, i - (cos * i - sin * j)]
    return affine(x, np.stack(matrix, axis=-1))


def affine_one(x, entry, values):
    """affine with the identity matrix but for one entry, whose value is given."""
    matrix = np.broadcast_to([1.0, 0, 0, 0, 1, 0], (*np.shape(values), 6)).copy()
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
    i = torch.arange(x.shape[2], device=x.device)[:, None] - per_image(row, x.device, np.int64)
    j = torch.arange(x.shape[3], device=x.device) - per_image(column, x.device, np.int64)
    return x.masked_fill((i >= -half) & (i < half) & (j >= -half) & (j < half), GREY)
