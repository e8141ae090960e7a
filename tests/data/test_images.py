"""Pictures of every kind become what a viewer shows of them, or are refused by name."""

import struct
import zlib

import pytest
import torch

Image = pytest.importorskip("PIL.Image")
np = pytest.importorskip("numpy")

from hkdfast.data.images import UPRIGHT, image_of, read_image, rgb  # noqa: E402

RED, BLUE, WHITE, BLACK = (255, 0, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)
RAMP = (np.arange(256) * 257).astype(np.uint16)[None].repeat(4, 0)  # 256 levels of 16 bits


def pixels(image):
    assert image.mode == "RGB"
    return np.asarray(image)


def corners():
    """A picture that no turn leaves as it is: 6 x 4, another color in each corner."""
    found = Image.new("RGB", (6, 4), "gray")
    for place, color in zip(((0, 0), (5, 0), (0, 3)), (RED, BLUE, BLACK), strict=True):
        found.putpixel(place, color)
    return found


@pytest.mark.parametrize("kind", ["png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_upright(tmp_path, orientation, kind):
    right = corners()
    turned = right if orientation == 1 else right.transpose(UPRIGHT[{6: 8, 8: 6}.get(orientation, orientation)])
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{kind}"
    turned.save(path, exif=exif, **({"lossless": True} if kind == "webp" else {}))
    assert (pixels(read_image(path)) == np.asarray(right)).all()
    with Image.open(path) as opened:
        assert (pixels(rgb(opened)) == np.asarray(right)).all()
    # whoever reads it again does not turn it again
    assert (pixels(rgb(read_image(path))) == np.asarray(right)).all()


def test_orientation_is_that_of_the_standard(tmp_path):
    # 6: the camera was held upright; the first row is the right-hand side of the scene
    wide = np.zeros((40, 60, 3), np.uint8)
    wide[:, :30], wide[:, 30:] = RED, BLUE
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(wide).save(tmp_path / "a.png", exif=exif)
    found = read_image(tmp_path / "a.png")
    assert found.size == (40, 60)
    assert found.getpixel((20, 5)) == RED and found.getpixel((20, 55)) == BLUE


def test_damaged_exif_does_not_lose_the_picture(tmp_path):
    corners().save(tmp_path / "a.png", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert (pixels(read_image(tmp_path / "a.png")) == np.asarray(corners())).all()


@pytest.mark.parametrize("name", ["a.png", "a.tif", "big.tif", "a.jp2", "a.pgm"])
def test_sixteen_bits_are_scaled(tmp_path, name):
    image = Image.fromarray(RAMP)
    if name == "big.tif":
        image = Image.frombytes("I;16B", image.size, RAMP.astype(">u2").tobytes())
    image.save(tmp_path / name)
    assert (pixels(read_image(tmp_path / name))[0] == np.arange(256)[:, None]).all()
    if name == "a.png":
        assert (pixels(rgb(image))[0] == np.arange(256)[:, None]).all()


def tiff(path, values, bits, white_is_zero, format=1):
    """A gray TIFF of one strip as its specification has it, little-endian."""
    data = values.tobytes()
    height, width = values.shape
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, 0 if white_is_zero else 1), (273, 8), (277, 1)]
    tags += [(278, height), (279, len(data)), (339, format)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    start = 8 + len(data)
    path.write_bytes(b"II*\0" + struct.pack("<I", start) + data + struct.pack("<H", len(tags)) + entries + bytes(4))
    return path


def test_a_tiff_may_begin_with_white(tmp_path):
    expected = 255 - np.arange(256)[:, None]
    assert (pixels(read_image(tiff(tmp_path / "a.tif", RAMP, 16, True)))[0] == expected).all()
    assert (pixels(read_image(tiff(tmp_path / "b.tif", RAMP, 16, False)))[0] == 255 - expected).all()
    floats = np.linspace(0, 1, 256, dtype=np.float32)[None].repeat(4, 0)
    assert (pixels(read_image(tiff(tmp_path / "c.tif", floats, 32, True, 3)))[0] == expected).all()


def test_floats_are_from_zero_to_one(tmp_path):
    floats = np.linspace(0, 1, 256, dtype=np.float32)[None].repeat(4, 0)
    Image.fromarray(floats).save(tmp_path / "a.tif")
    assert (pixels(read_image(tmp_path / "a.tif"))[0] == np.arange(256)[:, None]).all()
    for wrong in (floats * 255, floats - 0.5, np.where(floats == floats[0, 3], np.nan, floats)):
        Image.fromarray(wrong.astype(np.float32)).save(tmp_path / "b.tif")
        with pytest.raises(ValueError, match=r"b\.tif.* range from .*, expected 0 to 1"):
            read_image(tmp_path / "b.tif")


def test_a_range_that_nobody_knows_is_refused(tmp_path):
    Image.fromarray(np.arange(64, dtype=np.int32).reshape(8, 8)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=r"a\.tif.* 32 bits, here 0 to 63, have no known range"):
        read_image(tmp_path / "a.tif")


def ink():
    """RGBA: black ink on nothing, and what is hidden under nothing is black too; one pixel half transparent."""
    found = np.zeros((20, 20, 4), np.uint8)
    found[5:15, 5:15] = (0, 0, 0, 255)
    found[0, 0] = (255, 0, 0, 128)
    return Image.fromarray(found)


def test_nothing_is_white(tmp_path):
    ink().save(tmp_path / "a.png")
    found = read_image(tmp_path / "a.png")
    assert found.getpixel((10, 10)) == BLACK and found.getpixel((1, 1)) == WHITE
    assert found.getpixel((0, 0)) == (255, 127, 127)
    assert (pixels(rgb(ink())) == np.asarray(found)).all()
    for mode in ("RGBa", "LA", "La"):
        other = rgb(ink().convert("LA").convert("La") if mode == "La" else ink().convert(mode))
        assert other.getpixel((10, 10)) == BLACK and other.getpixel((1, 1)) == WHITE, mode


@pytest.mark.parametrize("mode", ["P", "L", "RGB", "1", "I;16"])
def test_one_color_may_stand_for_nothing(tmp_path, mode):
    level = 65535 if mode == "I;16" else 255
    values = np.zeros((8, 8), np.uint16 if mode == "I;16" else np.uint8)  # what stands for nothing is black
    values[2:6, 2:6] = level
    image = Image.fromarray(values) if mode == "I;16" else Image.fromarray(values).convert(mode)
    image.save(tmp_path / "a.png", transparency=BLACK if mode == "RGB" else 0)
    assert (pixels(read_image(tmp_path / "a.png")) == 255).all()
    image.save(tmp_path / "b.png")
    assert read_image(tmp_path / "b.png").getpixel((0, 0)) == BLACK


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_one_color_of_16_bits_may_stand_for_nothing(tmp_path):
    values = np.full((8, 8, 3), 0x1234, ">u2")
    values[2:6, 2:6] = 0
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    parts = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0))
    parts += chunk(b"tRNS", struct.pack(">HHH", *[0x1234] * 3)) + chunk(b"IDAT", zlib.compress(rows))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + parts + chunk(b"IEND", b""))
    found = read_image(tmp_path / "a.png")
    assert found.getpixel((0, 0)) == WHITE and found.getpixel((4, 4)) == BLACK


def test_palettes(tmp_path):
    image = ink().quantize(4)
    image.save(tmp_path / "a.png")
    found = read_image(tmp_path / "a.png")
    assert found.getpixel((10, 10)) == BLACK and found.getpixel((1, 1)) == WHITE
    ink().save(tmp_path / "a.gif")
    assert read_image(tmp_path / "a.gif").getpixel((1, 1)) == WHITE


def test_the_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "blue")]
    for name in ("a.gif", "a.png", "a.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
        assert read_image(tmp_path / name).getpixel((0, 0)) == RED


def test_cmyk(tmp_path):
    color = (200, 30, 40)
    Image.new("RGB", (16, 16), color).convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    assert np.abs(pixels(read_image(tmp_path / "a.jpg")).astype(int) - color).max() < 8


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.png", b"", r"a\.png' has no format that Pillow reads: the file is empty"),
        ("a.jpg", b"<html>404</html>", r"a\.jpg' has no format .*: it begins with b'<html>"),
        ("cut", None, r"cut' does not decode: .*truncated"),
        ("bomb", None, r"bomb' does not decode: .*decompression bomb"),
    ],
)
def test_what_is_no_picture_is_named(tmp_path, monkeypatch, name, data, message):
    path = tmp_path / name
    noise = torch.randint(256, (64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    if data is None:
        Image.fromarray(noise.numpy()).save(path, "PNG")
        data = path.read_bytes()
        data = data[: len(data) // 2] if name == "cut" else data
    if name == "bomb":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_image(path)


def test_files_that_cannot_be_opened_keep_their_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.png"):
        read_image(tmp_path / "none.png")
    with pytest.raises(IsADirectoryError):
        read_image(tmp_path)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((30, 30, 3)), r"image is a ndarray of shape \(30, 30, 3\), expected a PIL image or a path"),
        (torch.zeros(3, 9, 9), r"image is a Tensor of shape \(3, 9, 9\), expected"),
        ({"bytes": b"x" * 999, "path": None}, "image is a dict of bytes, path, expected"),
        (["a.png", "b.png"], "image is a list of 2, expected one PIL image or one path"),
        (b"x" * 999, "image is a bytes, expected"),
        (None, "image is a NoneType, expected"),
        (Image.new("RGB", (0, 5)), "an image of 0 x 5 has no pixels"),
    ],
)
def test_what_is_no_image_is_named_and_not_printed(image, message):
    with pytest.raises(ValueError, match=message) as caught:
        image_of({"image": image})
    assert len(str(caught.value)) < 120


def test_an_example_without_an_image():
    with pytest.raises(ValueError, match="the example has no 'image', only images, text"):
        image_of({"images": [], "text": ""})
