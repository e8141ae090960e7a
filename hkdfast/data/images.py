"""Read images as RGB, as an image viewer shows them, from any file format and mode. Every command reads by it."""

import os
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError

ORIENTATION = 0x0112  # EXIF's tag
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
BITS = 258  # TIFF's tag of the bits of a number
ZERO_IS = 262  # TIFF's tag of the photometric interpretation: 0 if zero is white


def read_image(path):
    """The image in a file as RGB: turned upright, transparency on white, the first frame of an animation.

    Args:
        path: str or os.PathLike.

    Raises:
        OSError: no such file, or one that cannot be opened.
        ValueError: a file that is empty, not an image, damaged, truncated, larger than Pillow accepts, or whose range
            of pixel values is unknown; names the file.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return upright(image)
    except UnidentifiedImageError as error:
        start = beginning(path)
        what = f"it begins with {start!r}" if start else "the file is empty"
        raise ValueError(f"image {str(path)!r} has no format that Pillow reads: {what}") from error
    except MemoryError:
        raise
    # Pillow's plug-ins raise errors of many types: OSError, SyntaxError, struct.error, ValueError
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise ValueError(f"image {str(path)!r} does not decode: {error}") from error


def beginning(path):
    with Path(path).open("rb") as file:
        return file.read(16)


def rgb(image):
    """An image as RGB, as `read_image` returns it.

    Args:
        image: PIL image, or the path of a file.

    Raises:
        ValueError: another type, which is named; a PIL image without pixels, or whose range of pixel values is
            unknown; for a path as `read_image`.
        OSError: as `read_image`.
    """
    if isinstance(image, Image.Image):
        return upright(image)
    if isinstance(image, str | os.PathLike):
        return read_image(image)
    if isinstance(image, list | tuple):
        raise ValueError(f"image is a {type(image).__name__} of {len(image)}, expected one PIL image or one path")
    what = type(image).__name__
    if isinstance(image, dict):
        what += f" of {', '.join(map(str, list(image)[:5]))}"
    shape = getattr(image, "shape", None)
    if shape is not None:
        what += f" of shape {tuple(shape)}"
    raise ValueError(f"image is a {what}, expected a PIL image or a path")


def image_of(example):
    """The image of an example, a dict with "image", as `rgb` returns it; ValueError if it has none."""
    if "image" not in example:
        raise ValueError(f"the example has no 'image', only {', '.join(map(str, example))}")
    return rgb(example["image"])


def upright(image):
    """A PIL image as RGB: its EXIF orientation applied, transparency on white.

    Pixels of 16 bits keep their upper 8, as in Pillow's color images; floats must be between 0 and 1.
    """
    if 0 in image.size:
        raise ValueError(f"an image of {image.width} x {image.height} has no pixels")
    image.load()
    turn = UPRIGHT.get(orientation(image))
    image = narrow(image)
    if turn is not None:
        image = image.transpose(turn)
    if image.mode == "La":
        image = image.convert("LA")
    key = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(key, tuple) and max(key) > 255:  # of 16 bits, as the file has it
        image = image.copy()
        image.info["transparency"] = tuple(level >> 8 for level in key)
    if image.mode in ("LA", "PA", "RGBa", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    image.info = {}  # else the next reader would apply the orientation again
    return image


def orientation(image):
    try:
        return image.getexif().get(ORIENTATION)
    except Exception:  # damaged EXIF, which viewers ignore: the image itself is intact
        return None


def narrow(image):
    """An image with gray levels of more than 8 bits as one of 8 bits; any other image unchanged."""
    # Pillow reads the 16 bits of these formats into 32
    if image.mode in SIXTEEN_BITS or image.mode == "I" and image.format in ("PNG", "PPM"):
        return of_16_bits(image)
    if image.mode == "I":
        low, high = image.getextrema()
        raise ValueError(
            f"gray levels of 32 bits, here {low} to {high}, have no known range: save the image with 8 or 16 bits"
        )
    if image.mode == "F":
        low, high = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.float32).aminmax()  # NaN if there is one
        if not (low >= 0 and high <= 1):
            raise ValueError(f"gray levels that are floats range from {low:g} to {high:g}, expected 0 to 1")
        scale, start = (-255, 255) if zero_is_white(image) else (255, 0)
        return image.point(lambda x: x * scale + (start + 0.5)).convert("L")
    return image


def zero_is_white(image):
    return getattr(image, "tag_v2", {}).get(ZERO_IS) == 0


def of_16_bits(image):
    bits = getattr(image, "tag_v2", {}).get(BITS, (16,))[0]
    levels = [min(level >> (bits - 8), 255) for level in range(2**16)]
    if zero_is_white(image):
        levels = [255 - level for level in levels]
    key = image.info.get("transparency")
    wide = image.convert("I")
    gray = wide.point(levels, "L")
    if key is None:
        return gray
    del gray.info["transparency"]
    gray.putalpha(wide.point([0 if level == key else 255 for level in range(2**16)], "L"))
    return gray
