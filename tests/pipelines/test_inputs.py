# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Pictures and masks are read alike by training, evaluation and every pipeline, whatever a tool wrote them as."""

import io
import re
import struct
import zlib

import numpy as np
import PIL.Image
import PIL.ImageFilter
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ecvae_diffusers import ECVAEPipeline, ECVAERestorationPipeline
from ecvae_diffusers.evaluation.evaluate_restoration import choose_clean
from ecvae_diffusers.evaluation.pictures import decode_all
from ecvae_diffusers.pipelines.inputs import read_mask, read_picture
from ecvae_diffusers.training.data.images import decode_image
from ecvae_diffusers.training.data.transforms import to_range


# What brings an upright array to what a camera that was held otherwise stores.
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}
FORMATS = {
    "png": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "tiff": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK"),
    "webp": ("RGB", "RGBA"),
    "jpeg": ("L", "RGB", "CMYK"),
    "gif": ("P",),
}
WITHOUT_EXIF = {"gif"}


def exif(orientation: int) -> PIL.Image.Exif:
    data = PIL.Image.Exif()
    data[0x0112] = orientation
    return data


def to_gray(rgb: np.ndarray) -> np.ndarray:
    """ITU-R 601 luma, rounded."""
    weighted = rgb[..., :3].astype(np.int64) @ np.array([19595, 38470, 7471])
    return ((weighted + 2**15) >> 16).astype(np.uint8)


@st.composite
def pictures(draw) -> tuple[bytes, np.ndarray, str]:
    """The bytes of a file, the upright RGBA picture (H, W, 4) that it holds, and the file's format."""
    format = draw(st.sampled_from(sorted(FORMATS)))
    mode = draw(st.sampled_from(FORMATS[format]))
    size = draw(st.sampled_from([(16, 16), (16, 21), (20, 17)]))
    orientation = 1 if format in WITHOUT_EXIF else draw(st.integers(1, 8))
    transparency = draw(st.sampled_from(["none", "hard", "soft"]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    gray = mode in ("1", "L", "LA", "I;16")
    # Few levels, as in palettes. One of them is the transparent colour.
    levels = np.array([0, 255]) if mode == "1" else rng.choice(256, 6, replace=False)
    colours = np.repeat(levels[:, None], 3, 1) if gray else rng.permuted(np.repeat(levels[:, None], 3, 1), axis=0)
    index = rng.integers(len(levels), size=size)
    truth = np.dstack([colours[index], np.full(size, 255)]).astype(np.uint8)
    has_alpha = mode in ("LA", "RGBA")
    if has_alpha and transparency != "none":
        truth[..., 3] = rng.choice([0, 255], size) if transparency == "hard" else rng.integers(0, 256, size)
    stored, index = (np.ascontiguousarray(STORED[orientation](a)) for a in (truth, index))
    options = {} if format in WITHOUT_EXIF else {"exif": exif(orientation)}
    if mode == "P":
        image = PIL.Image.fromarray(index.astype(np.uint8))
        image.putpalette(colours.astype(np.uint8).tobytes())
    elif mode == "I;16":
        image = PIL.Image.fromarray(stored[..., 0].astype(np.uint16) * 257)
    else:
        image = PIL.Image.fromarray(stored if has_alpha else stored[..., :3])
        image = image.convert(mode, dither=PIL.Image.Dither.NONE)
    keyed = (format in ("png", "gif") and mode == "P") or (format == "png" and mode in ("1", "L", "I;16", "RGB"))
    if keyed and transparency != "none":
        key = int(rng.integers(len(levels)))
        by_mode = {"P": key, "1": int(levels[key]), "L": int(levels[key]), "I;16": int(levels[key]) * 257}
        options["transparency"] = by_mode.get(mode, tuple(map(int, colours[key])))
        truth[(truth[..., :3] == colours[key]).all(-1), 3] = 0
        if mode == "P" and format == "png" and transparency == "soft":
            alphas = rng.integers(0, 256, len(levels)).astype(np.uint8)
            options["transparency"] = alphas.tobytes()
            truth[..., 3] = alphas[(truth[..., None, :3] == colours).all(-1).argmax(-1)]
    if format == "webp":
        options |= {"lossless": True, "exact": True}
    if format == "jpeg":
        options |= {"quality": 100, "subsampling": 0} if mode != "L" else {"quality": 100}
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue(), truth, format


def expected_picture(truth: np.ndarray, channels: int) -> np.ndarray:
    if channels == 4:
        return truth
    alpha = truth[..., 3:] / 255
    white = (truth[..., :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8)
    return white if channels == 3 else to_gray(white)[..., None]


@pytest.fixture(scope="module")
def pipelines(make_pipeline) -> dict[int, tuple[ECVAEPipeline, ECVAERestorationPipeline]]:
    made = {}
    for channels in (1, 3, 4):
        pipe = make_pipeline(channels, with_energy=False)
        pipe.vae.register_to_config(reconstruction_variance=0.02)
        restoration = ECVAERestorationPipeline.from_pipe(pipe)
        restoration.set_progress_bar_config(disable=True)
        made[channels] = (pipe, restoration)
    return made


def levels(images: torch.Tensor) -> np.ndarray:
    """(1, C, H, W) in [0, 1] to (H, W, C)."""
    return (images[0] * 255).round().byte().permute(1, 2, 0).numpy()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(pictures(), st.sampled_from([1, 3, 4]))
def test_training_and_every_pipeline_read_a_file_alike(pipelines, drawn, channels):
    """To the last level, and as what was written, whatever the mode, size, orientation, transparency and bit depth."""
    content, truth, format = drawn
    height, width = truth.shape[:2]
    size = min(height, width)
    top, left = (height - size) // 2, (width - size) // 2
    trained = decode_image({"bytes": content, "path": None}, channels, size).permute(1, 2, 0).numpy()
    difference = np.abs(
        trained.astype(int) - expected_picture(truth, channels)[top : top + size, left : left + size].astype(int)
    )
    if format != "jpeg":
        assert difference.max() <= (0 if channels == 4 or set(truth[..., 3].flat) <= {0, 255} else 1)

    pipe, restoration = pipelines[channels]
    image = PIL.Image.open(io.BytesIO(content))
    if (height, width) == (16, 16):
        np.testing.assert_array_equal(levels(pipe.prepare_image(image) / 2 + 0.5), trained)
    else:
        with pytest.raises(ValueError, match="`image`"):
            pipe.prepare_image(image)
    mask = torch.zeros(1, 1, height, width)
    mask[..., -1, -1] = 1
    # As a file that was just opened, too.
    again = PIL.Image.open(io.BytesIO(content))
    restored = restoration(again, mask_image=mask, num_inference_steps=1, noise_std=0.0, output_type="pt").images
    kept = levels(restored)
    kept[-1, -1] = read_back = np.array(read_picture(image, channels)).reshape(height, width, channels)[-1, -1]
    np.testing.assert_array_equal(kept[top : top + size, left : left + size], trained)
    assert read_back.shape == (channels,)


def test_evaluation_reads_files_as_pipelines_do(pipelines, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 4), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif(6))
    found = to_range(decode_all(choose_clean(str(tmp_path), 1), 16, 3))
    expected = pipelines[3][0].prepare_image(PIL.Image.open(tmp_path / "turned.png"))
    torch.testing.assert_close(found, expected)


# Pictures


@pytest.mark.parametrize("mode", ["La", "PA", "RGBa", "RGBX", "YCbCr", "HSV", "LAB"])
def test_modes_that_no_png_holds(mode):
    rgb = np.random.default_rng(0).integers(60, 196, (4, 4, 3), dtype=np.uint8)
    gray = PIL.Image.fromarray(to_gray(rgb))
    image = {
        "La": lambda: PIL.Image.merge("LA", (gray, PIL.Image.new("L", (4, 4), 255))).convert("La"),
        "PA": lambda: gray.convert("PA"),
        "LAB": lambda: PIL.Image.fromarray(rgb).convert("LAB"),
    }.get(mode, lambda: PIL.Image.fromarray(rgb).convert("RGBA" if mode == "RGBa" else "RGB").convert(mode))()
    assert image.mode == mode
    expected = np.repeat(np.asarray(gray)[..., None], 3, 2) if mode in ("La", "PA") else rgb
    difference = np.abs(np.asarray(read_picture(image, 3)).astype(int) - expected)
    assert difference.max() <= {"HSV": 6, "YCbCr": 3, "LAB": 6}.get(mode, 0)
    difference = np.abs(np.asarray(read_picture(image, 1)).astype(int) - np.asarray(gray))
    assert difference.max() <= {"HSV": 4, "YCbCr": 2, "LAB": 4}.get(mode, 0)


def png(bits: int, kind: int, row: bytes, key: bytes) -> PIL.Image.Image:
    """A PNG file of 4x1 px with a transparent colour, in bit depths that Pillow does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 1, bits, kind, 0, 0, 0))
    body = chunk(b"tRNS", key) + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")
    return PIL.Image.open(io.BytesIO(b"\x89PNG\r\n\x1a\n" + header + body))


@pytest.mark.parametrize(
    "file, expected",
    [
        ((1, 0, b"\x50", b"\0\0"), [255, 255, 255, 255]),
        ((1, 0, b"\x50", b"\0\1"), [0, 255, 0, 255]),
        ((2, 0, b"\x1b", b"\0\1"), [0, 255, 170, 255]),
        ((4, 0, b"\x05\x5f", b"\0\5"), [0, 255, 255, 255]),
        ((8, 0, b"\x05\x11\x22\x33", b"\0\5"), [255, 17, 34, 51]),
        ((16, 0, struct.pack(">4H", 1000, 1001, 0, 65535), struct.pack(">H", 1000)), [255, 4, 0, 255]),
        ((16, 2, struct.pack(">12H", *[40000] * 3, *[0] * 9), struct.pack(">3H", *[40000] * 3)), [255, 0, 0, 0]),
    ],
)
def test_transparent_colours_of_every_bit_depth(file, expected):
    assert np.asarray(read_picture(png(*file), 1)).flatten().tolist() == expected
    alpha = np.asarray(read_picture(png(*file), 4))[..., 3].flatten().tolist()
    assert 0 in alpha and 255 in alpha


def test_sixteen_bits_of_other_formats(tmp_path):
    values = np.array([[0, 1000, 65535]], np.uint16)
    (tmp_path / "a.pgm").write_bytes(b"P5 3 1 65535\n" + values.astype(">u2").tobytes())
    PIL.Image.fromarray(values).save(tmp_path / "a.jp2")
    for name in ("a.pgm", "a.jp2"):
        assert np.asarray(read_picture(PIL.Image.open(tmp_path / name), 1)).tolist() == [[0, 4, 255]]


RECIPE = re.compile(
    r"PIL\.Image\.fromarray\(.*?\)(?=\. To |$)|[a-z]+\.convert\('RGBA'\)\.getchannel\('A'\)(?:\.point\(.*?\))?|image\.info.*\)"
)


def recipes(error: ValueError, **names) -> list:
    """What the recipes in a message give."""
    found = RECIPE.findall(str(error))
    assert found, error
    return [eval(recipe, {"PIL": PIL, "numpy": np, **names}) for recipe in found]


@pytest.mark.parametrize("white, dtype", [(1, np.float32), (255, np.int32), (65535, np.int32)])
def test_modes_without_an_agreed_white_are_refused_with_a_recipe(pipelines, white, dtype):
    expected = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = PIL.Image.fromarray((expected / np.float64(255) * white).astype(dtype))
    for read in (pipelines[1][0].reconstruct, lambda image: pipelines[1][1](image, mask_image=np.eye(16))):
        with pytest.raises(ValueError, match=f"`image`.*mode {image.mode}") as raised:
            read(image)
    (mended,) = recipes(raised.value, image=image)
    np.testing.assert_array_equal(np.asarray(read_picture(mended, 1)), expected)


def test_what_can_not_be_read_is_refused(pipelines):
    pixels = np.zeros((16, 16), np.float32)
    pixels[3, 3] = np.nan
    with pytest.raises(ValueError, match="`image`"):
        pipelines[1][0].reconstruct(PIL.Image.fromarray(pixels))
    with pytest.raises(ValueError, match="`mask_image`"):
        pipelines[1][1](np.zeros((16, 16)), mask_image=PIL.Image.fromarray(pixels))
    for broken in (b"b'Exif\\x00\\x00'", b"Exif\0\0II*\0"):
        image = PIL.Image.new("RGB", (16, 16), (1, 2, 3))
        image.info["exif"] = broken
        with pytest.raises(ValueError, match="`image`.*EXIF") as raised:
            pipelines[3][0].reconstruct(image)
        recipes(raised.value, image=image)
        assert np.asarray(read_picture(image, 3))[0, 0].tolist() == [1, 2, 3]


def test_a_gray_model_says_that_it_drops_colours(pipelines, caplog):
    pipe, _ = pipelines[1]
    gray = PIL.Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    expected = pipe.prepare_image(gray)
    for image in (gray.convert("RGB"), gray.convert("P"), gray.convert("RGB").convert("CMYK")):
        assert torch.equal(pipe.prepare_image(image), expected)
    assert caplog.text == ""
    pipe.prepare_image(PIL.Image.new("RGB", (16, 16), "red"))
    assert "`image` has colours" in caplog.text


# Masks


HOLE = np.zeros((24, 24), bool)
HOLE[4:12, 6:20] = True


def labelled(colours: list[tuple[int, int, int]], labels: np.ndarray = HOLE) -> PIL.Image.Image:
    image = PIL.Image.fromarray(labels.astype(np.uint8))
    image.putpalette([value for colour in colours for value in colour])
    return image


def painted(colour: tuple[int, int, int]) -> PIL.Image.Image:
    return PIL.Image.fromarray(HOLE[..., None] * np.array(colour, np.uint8))


def reopened(image: PIL.Image.Image, format: str, **options) -> PIL.Image.Image:
    file = io.BytesIO()
    image.save(file, format, **options)
    return PIL.Image.open(file)


WHITE = PIL.Image.fromarray(HOLE.astype(np.uint8) * 255)
BORDER = HOLE.astype(np.uint8)
BORDER[3, 6:20] = 2  # a second label next to the first
RECOGNISED = {
    "1 bit": WHITE.convert("1"),
    "JPEG": reopened(WHITE, "jpeg", quality=60),
    "opaque RGBA": WHITE.convert("RGBA"),
    "labels 0 and 1": PIL.Image.fromarray(HOLE.astype(np.uint8)),
    "labels of 16 bits": PIL.Image.fromarray(HOLE.astype(np.uint16)),
    "labels as floats": PIL.Image.fromarray(HOLE.astype(np.float32)),
    "16 bits with a dark ground": PIL.Image.fromarray(np.where(HOLE, 65535, 2000).astype(np.uint16)),
    "16 bits, noisy": PIL.Image.fromarray((np.where(HOLE, 64000, 900) + np.arange(24)).astype(np.uint16)),
    "palette of a dark label": labelled([(0, 0, 0), (64, 0, 0)]),
    "palette in black and white": WHITE.convert("P"),
    "dark blue paint": painted((0, 0, 90)),
    "soft red paint": PIL.Image.merge("RGB", (WHITE.resize((96, 96)).resize((24, 24), 2), *[PIL.Image.new("L", (24, 24))] * 2)),
    "soft edges": WHITE.filter(PIL.ImageFilter.GaussianBlur(0.6)),
}  # fmt: skip


@pytest.mark.parametrize("name", RECOGNISED)
def test_masks_as_tools_write_them(name):
    np.testing.assert_array_equal(read_mask(RECOGNISED[name]), HOLE)


PHOTOGRAPH = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
REFUSED = {
    "erased alpha": (PIL.Image.fromarray(np.dstack([PHOTOGRAPH, np.where(HOLE, 0, 255)]).astype(np.uint8)), 0),
    "paint on a transparent layer": (PIL.Image.fromarray(np.dstack([*[HOLE * 200] * 3, HOLE * 255]).astype(np.uint8)), 1),
    "transparent palette": (reopened(labelled([(0, 0, 0), (9, 9, 9)]), "png", transparency=0), 1),
    "palette with a border": (labelled([(0, 0, 0), (128, 0, 0), (224, 224, 192)], BORDER), 0),
    "several labels": (PIL.Image.fromarray(BORDER), 0),
    "several labels of 16 bits": (PIL.Image.fromarray(BORDER.astype(np.uint16)), 0),
    "labels of -1": (PIL.Image.fromarray(-HOLE.astype(np.int32)), None),
    "neither black nor white": (PIL.Image.fromarray(np.where(HOLE, 150, 100).astype(np.uint8)), None),
    "paint on a photograph": (PIL.Image.fromarray(PHOTOGRAPH), None),
    "red paint as JPEG": (reopened(painted((255, 0, 0)), "jpeg", quality=60), None),
    "uniform gray": (PIL.Image.new("L", (24, 24), 128), None),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_masks_that_can_not_be_known_are_refused_with_a_recipe(pipelines, name):
    mask, right = REFUSED[name]
    with pytest.raises(ValueError, match=f"`mask_image`.*mode {mask.mode}") as raised:
        pipelines[1][1](np.zeros((24, 24)), mask_image=mask, num_inference_steps=1)
    mended = recipes(raised.value, mask=mask)
    if right is not None:
        np.testing.assert_array_equal(read_mask(mended[right]), HOLE)


@pytest.mark.parametrize("orientation", [2, 6])
def test_picture_and_mask_turn_together(pipelines, orientation, caplog):
    """Each by its own EXIF data; if the mask has none, it is taken to be upright, which is said."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 16), dtype=np.uint8)
    hole = np.zeros((20, 16), np.uint8)
    hole[2:9, 3:15] = 255
    turned = [
        reopened(PIL.Image.fromarray(np.ascontiguousarray(STORED[orientation](a))), "png", exif=exif(orientation))
        for a in (pixels, hole)
    ]
    settings = {"num_inference_steps": 2, "output_type": "pt"}
    found = [
        pipelines[1][1](image, mask_image=mask, generator=torch.manual_seed(0), **settings).images
        for image, mask in (map(PIL.Image.fromarray, (pixels, hole)), turned)
    ]
    assert torch.equal(*found) and found[0].shape[2:] == (20, 16)
    assert caplog.text == ""
    pipelines[1][1](turned[0], mask_image=PIL.Image.fromarray(hole), **settings)
    assert "`mask_image`" in caplog.text
