"""What the values of an image file mean, and that nothing beside them makes it unreadable."""

import io
import json
import struct
import warnings
import weakref
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from gspn.data.images import DataError, Preprocessing, Split, centre_box, decode, upright, with_channels


def grey(file):
    """The 8-bit grey values of an image file, given as bytes or as an image."""
    image = decode(io.BytesIO(file)) if isinstance(file, bytes) else file
    return np.asarray(with_channels(image, 1)).tolist()


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(levels, chunks=(), bits=16):
    """A PNG of one row of grey `levels`; `chunks` (name, content) before its pixels."""
    header = struct.pack(">IIBBBBB", len(levels), 1, bits, 0, 0, 0, 0)
    row = np.unpackbits(np.array(levels, ">u2").view(np.uint8)).reshape(-1, 16)[:, 16 - bits :]
    pixels = zlib.compress(b"\0" + np.packbits(row).tobytes())
    parts = [(b"IHDR", header), *chunks, (b"IDAT", pixels), (b"IEND", b"")]
    joined = [struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(joined)


def tiff(pixels, width, bits, *, white=1, kind=1, order="<"):
    """A TIFF of one row of grey. white: PhotometricInterpretation. kind: SampleFormat."""
    entries = {256: width, 257: 1, 258: bits, 259: 1, 262: white, 277: 1, 278: 1, 279: len(pixels), 339: kind}
    entries[273] = 8 + 2 + 12 * (len(entries) + 1) + 4
    content = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, len(entries))
    for tag, value in sorted(entries.items()):
        content += struct.pack(order + "HHI", tag, 4 if tag in (273, 279) else 3, 1)
        content += struct.pack(order + ("I" if tag in (273, 279) else "HH"), *([value] + [0] * (tag not in (273, 279))))
    return content + struct.pack(order + "I", 0) + pixels


# -- 16 bits --


@pytest.mark.parametrize("most", [200, 255, 256, 65535])
def test_16_bit_grey_means_the_same_whatever_else_is_in_the_file(most):
    levels, expected = [0, 128, 129, 200, most], [0, 0, 1, 1, round(most / 257)]
    row = np.array([levels], np.uint16)
    deep = Image.fromarray(row)
    little, big = (tiff(row.astype(f"{order}u2").tobytes(), 5, 16, order=order) for order in "<>")
    files = [png(levels), little, big, saved(deep, "TIFF", compression="tiff_lzw"), saved(deep, "JPEG2000")]
    files.append(b"P5 5 1 65535 " + row.astype(">u2").tobytes())
    files.append(b"P2 5 1 65535 " + b" ".join(str(level).encode() for level in levels))
    files += [deep, Image.fromarray(row.astype(">u2"))]
    assert [grey(file) for file in files] == [[expected]] * len(files)
    assert all(decode(io.BytesIO(file)).mode.startswith("I;16") for file in files if isinstance(file, bytes))


def test_every_16_bit_level_is_rounded_to_its_257th():
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = np.round(levels.astype(np.float64) / 257)
    assert np.array_equal(np.asarray(with_channels(Image.fromarray(levels), 1)), expected)


def test_12_bit_levels_and_white_as_zero():
    assert grey(tiff(bytes([0xFF, 0xF8, 0x00, 0x00, 0x01, 0x01]), 4, 12)) == [[255, 128, 0, 16]]
    levels = np.array([0, 257, 65535], "<u2").tobytes()
    assert grey(tiff(levels, 3, 16)) == [[0, 1, 255]]
    assert grey(tiff(levels, 3, 16, white=0)) == [[255, 254, 0]]
    assert grey(tiff(bytes([0, 1, 255]), 3, 8, white=0)) == [[255, 254, 0]]
    assert grey(b"P5 2 1 1023 " + np.array([512, 1023], ">u2").tobytes()) == [[128, 255]]


def test_a_transparent_16_bit_level_is_white():
    assert grey(png([0, 300, 301], [(b"tRNS", struct.pack(">H", 300))])) == [[0, 255, 1]]


@pytest.mark.parametrize(("bits", "expected"), [(2, [0, 255, 170]), (4, [0, 255, 34]), (8, [0, 255, 2])])
def test_a_transparent_level_of_few_bits_is_white(bits, expected):
    file = png([0, 1, 2], [(b"tRNS", struct.pack(">H", 1))], bits)
    opened = upright(Image.open(io.BytesIO(file)))
    assert grey(file) == grey(opened) == grey(upright(opened)) == [expected]


@pytest.mark.parametrize(
    "file",
    [
        tiff(np.array([0, 70000], "<u4").tobytes(), 2, 32),
        tiff(np.array([0, 200], "<u4").tobytes(), 2, 32),
        tiff(np.array([-1, 200], "<i4").tobytes(), 2, 32, kind=2),
        tiff(np.array([-1, 200], ">i4").tobytes(), 2, 32, kind=2, order=">"),
        tiff(np.array([-1, 200], "<i2").tobytes(), 2, 16, kind=2),
        tiff(np.array([-1, 100], "i1").tobytes(), 2, 8, kind=2),
        tiff(np.array([0, 1], "<f4").tobytes(), 2, 32, kind=3),
        b"Pf 2 1 -1.0\n" + np.array([0, 1], "<f4").tobytes(),
        Image.new("I", (2, 1), 7),
        Image.new("F", (2, 1), 0.5),
    ],
    ids=["u32", "u32 small", "i32", "i32 big-endian", "i16", "i8", "f32", "PFM", "mode I", "mode F"],
)
def test_values_without_a_fixed_range_are_refused_alike(file):
    with pytest.raises(ValueError, match=r"range.*16"):
        grey(file)


def test_an_image_without_a_fixed_range_is_told_by_name():
    values = tiff(np.array([0, 70000], "<u4").tobytes(), 2, 32)
    split = Split([0], None, read=lambda i: decode(io.BytesIO(values)), names=lambda i: "a.tiff")
    assert split.problem(0).startswith("a.tiff: the image has 32-bit")
    in_memory = Split([0], None, read=lambda i: Image.new("F", (2, 1)), names=lambda i: "b")
    assert in_memory.problem(0).startswith("b: the image has floating-point")


def test_every_other_mode_has_a_way_to_grey_and_colour():
    white = {"1": 1, "L": 255, "LA": (255, 255), "P": 255, "PA": (255, 255), "RGB": (255,) * 3, "RGBA": (255,) * 4}
    white |= {"RGBa": (255,) * 4, "RGBX": (255,) * 4, "CMYK": (0,) * 4, "YCbCr": (255, 128, 128)}
    white |= {"HSV": (0, 0, 255), "LAB": (255, 128, 128)}
    for mode, value in white.items():
        image = Image.new(mode, (2, 1), value)
        if mode in ("P", "PA"):
            image.putpalette([level for level in range(256) for _ in "rgb"])
        for channels in (1, 3):
            values = np.asarray(with_channels(image, channels))
            assert values.min() >= 253, (mode, channels)  # LAB's white is rounded


def test_an_opened_image_means_what_its_file_means():
    about = Image.Exif()
    about[0x0112] = 6
    turned, levels = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3)), np.array([[0, 300, 1023]], np.uint16)
    files = [saved(turned, kind, exif=about) for kind in ("PNG", "TIFF", "MPO")]
    files += [b"P5 3 1 %d " % most + levels.astype(">u2").tobytes() for most in (1023, 65535)]
    files += [tiff(levels.astype("<u2").tobytes(), 3, 16, white=white) for white in (0, 1)]
    files += [png([0, 300, 65535]), tiff(bytes([0xFF, 0xF8, 0x00, 0x00, 0x01, 0x01]), 4, 12)]
    for file in files:
        expected, opened = decode(io.BytesIO(file)), upright(Image.open(io.BytesIO(file)))
        for image in (opened, upright(opened), upright(expected)):
            assert image.size == expected.size and np.array_equal(np.asarray(image), np.asarray(expected))
            assert grey(image) == grey(file)
    plain = Image.new("RGB", (3, 2))
    assert upright(plain) is plain


# -- metadata --


def exif(*, header=b"MM\0*", orientation=6):
    """EXIF with that orientation and a string where a number belongs, which Pillow cannot write again."""
    entries = struct.pack(">HHII", 0x0112, 3, 1, orientation << 16) + struct.pack(">HHI4s", 0x0100, 2, 4, b"abc\0")
    return header + struct.pack(">IH", 8, 2) + entries + bytes(4)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "MPO"])
def test_exif_that_cannot_be_parsed_leaves_an_image_readable(kind):
    image = Image.new("RGB", (20, 10), "red")
    for damaged in (exif(header=b"XX\0*"), exif(header=b"MM\0*")[:11], b"MM", b"\xff" * 40, exif(orientation=77)):
        content = saved(image, kind, exif=b"Exif\0\0" + damaged)
        assert decode(io.BytesIO(content)).size == (20, 10), damaged
    content = saved(image, kind, exif=b"Exif\0\0" + exif())
    assert decode(io.BytesIO(content)).size == (10, 20)  # one bad tag hides no other


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_upright(orientation):
    upright = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3))
    stored = {  # rows and columns as EXIF's standard has them
        1: [[0, 1, 2], [3, 4, 5]],
        2: [[2, 1, 0], [5, 4, 3]],
        3: [[5, 4, 3], [2, 1, 0]],
        4: [[3, 4, 5], [0, 1, 2]],
        5: [[0, 3], [1, 4], [2, 5]],
        6: [[2, 5], [1, 4], [0, 3]],
        7: [[5, 2], [4, 1], [3, 0]],
        8: [[3, 0], [4, 1], [5, 2]],
    }[orientation]
    image = Image.fromarray(np.array(stored, np.uint8))
    about = Image.Exif()
    about[0x0112] = orientation
    for kind in ("PNG", "TIFF"):
        assert np.array_equal(decode(io.BytesIO(saved(image, kind, exif=about))), upright), kind


def test_other_metadata_that_cannot_be_parsed():
    red = Image.new("RGB", (20, 10), "red")
    xmp = b"<x:xmpmeta \xff\xfe tiff:Orientation=broken"
    icc = saved(red, "PNG", icc_profile=b"no profile")
    maker = saved(red, "TIFF", tiffinfo={0x8769: 2**31, 0x02BC: b"\xff<", 0x83BB: b"\0"})  # EXIF beyond the file's end
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what Pillow has to say about it reaches nobody
        for content in (saved(red, "JPEG", xmp=xmp), saved(red, "WEBP", xmp=xmp), icc, maker):
            assert decode(io.BytesIO(content)).size == (20, 10)
        raw = png([1, 2], [(b"tEXt", b"Raw profile type exif\0\nexif\n  4\nzzzz\n"), (b"eXIf", b"junk")])
        assert grey(raw) == [[0, 0]]


def test_a_truncated_image_is_an_error_all_the_same():
    content = saved(Image.effect_noise((64, 64), 50), "JPEG", exif=b"Exif\0\0" + b"XX")
    with pytest.raises(OSError, match="truncated"):
        decode(io.BytesIO(content[: len(content) // 2]))


# -- large images --


def test_few_images_of_a_sample_are_in_memory_at_once():
    made, most = [], 0

    def read(i):
        nonlocal most
        image = Image.new("L", (9, 9))
        made.append(weakref.ref(image))
        most = max(most, sum(each() is not None for each in made))
        return image

    split = Split([0] * 100, None, read=read)
    assert {image.size for image in split.sample()} == {(9, 9)} and len(made) == 32
    assert split.channels() == 1 and most <= 2
    with pytest.raises(DataError, match=r"none of 7 images .*image 0"):
        list(Split([0] * 100, None, read=lambda i: 1 / 0).sample(7))


def test_a_large_image_is_read_without_a_warning_and_a_larger_one_refused(monkeypatch):
    content = saved(Image.new("L", (15, 10)), "PNG")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        assert decode(io.BytesIO(content)).size == (15, 10)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 70)
        with pytest.raises(ValueError, match=r"too large: .*150 pixels.* 140 pixels"):
            decode(io.BytesIO(content))


def test_preprocessing_of_16_bits_in_colour():
    pixels = Preprocessing(3, (1, 3), (0,) * 3, (1,) * 3)(decode(io.BytesIO(png([0, 200, 255]))))
    assert torch.equal(pixels, torch.tensor([0, 1, 1], dtype=torch.uint8).expand(3, 1, 3))


def test_every_size_has_a_centre_box_within_the_image():
    """Also where a rounding error would make it larger than the image."""
    for size in ((224, 224), (480, 360), (299, 299), (28, 28)):
        for width in range(1, 1100):
            for image in ((width, 450), (450, width), (width, width)):
                left, top, right, bottom = centre_box(image, size, 1.0)
                assert 0 <= left < right <= image[0] and 0 <= top < bottom <= image[1], (size, image)
    preprocessing = Preprocessing(1, (299, 299), (0,), (1,))
    for side in (225, 350, 704, 900):
        assert preprocessing(Image.new("L", (side, side + 1), 7)).float().mean() == 7


def test_threads_that_decode_leave_the_warnings_as_they_are():
    content, before = saved(Image.new("L", (300, 300)), "PNG"), list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: decode(io.BytesIO(content)), range(200)))
    assert warnings.filters == before


def test_preprocessing_takes_numbers_of_numpy_and_nothing_else():
    good = dict(channels=3, size=(4, 6), mean=(0.5,) * 3, std=(0.25,) * 3, crop=0.875)
    numpys = {name: np.asarray(value, np.float32) for name, value in good.items()}
    numpys |= dict(channels=np.int64(3), size=np.array([4, 6]), crop=np.float32(0.875))
    found = Preprocessing(**numpys)
    assert found == Preprocessing(**good) and json.loads(json.dumps(found.to_json())) == json.loads(json.dumps(good))
    for change in (
        *(dict(channels=value) for value in (True, 2, "3", None)),
        *(dict(size=value) for value in (3, None, (8,), (True, 8), (0, 8), (8.0, 8), "88")),
        *(dict(mean=value) for value in (0.5, (), (0.5,) * 2, (float("nan"),) * 3, "abc")),
        *(dict(std=value) for value in (1, (0.0,) * 3, (None,) * 3)),
        dict(mean=(), std=()),
        *(dict(crop=value) for value in (0, 1.5, None, "1", True)),
    ):
        with pytest.raises(ValueError, match=r"^preprocessing needs 1 or 3 channels, .*; got Preprocessing"):
            Preprocessing(**good | change)
