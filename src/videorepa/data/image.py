"""Reads the image that a clip continues."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from videorepa.data.video import fit, resize
from videorepa.errors import UserError
from videorepa.system.files import file_digest, open_file

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")

DIGEST = 16
"""The number of hexadecimal digits of an image's digest."""

SAME_SHAPE = 0.02
"""Part of its width by which an image may be wider or narrower than the clip and is cropped."""


def read_image(path: Path, height: int, width: int, *, whole: bool = False) -> Image.Image:
    """Read an image as the first frame of a clip of a size.

    It is put upright as its EXIF says, cropped by up to 2 % to the clip's shape, and scaled as the
    frames of training clips are. Grey becomes RGB.

    Args:
      whole: Squeeze an image of another shape to the clip's, and crop nothing.

    Raises:
      UserError: It cannot be read, has another shape or colours that RGB of 8 bits does not hold.
    """
    pixels = np.array(_in_rgb(path, ImageOps.exif_transpose(_opened(path))))
    if whole:
        return Image.fromarray(resize(pixels, height, width))
    theirs, ours = pixels.shape[1] / pixels.shape[0], width / height
    if abs(theirs / ours - 1) > SAME_SHAPE:
        raise UserError(
            f"The image {path} has {pixels.shape[0]}x{pixels.shape[1]} pixels, upright; clips of "
            f"{height}x{width} have another shape. Crop it to {width}:{height}."
        )
    return Image.fromarray(fit(pixels, height, width))


def image_shape(path: Path) -> tuple[int, int]:
    """The height and width of an image, upright. Raises UserError if it cannot be read."""
    width, height = ImageOps.exif_transpose(_opened(path)).size
    return height, width


def image_digest(path: Path) -> str:
    """What an image is called in sidecars. Raises UserError if it cannot be read."""
    try:
        return file_digest(path)[:DIGEST]
    except OSError as error:
        raise UserError(f"The image {path} cannot be read: {error.strerror}.") from None


def _opened(path: Path) -> Image.Image:
    try:
        with open_file(path) as file, Image.open(file, formats=FORMATS) as image:
            pictures = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
            # Pillow cuts colours of 16 bits to 8 and says nothing; how they are stored tells.
            is_deep = re.search(";16[BLN]", str(image.tile)) is not None
            image.load()
    except Image.DecompressionBombError as error:
        reason = str(error).partition(",")[0]
        raise UserError(f"The image {path} is too large: {reason}. Scale it down.") from None
    except UnidentifiedImageError:
        if path.stat().st_size == 0:
            raise UserError(f"{path} is empty; copy or download it again.") from None
        raise UserError(
            f"{path} is no image that is read here ({', '.join(FORMATS)}); save it as one of these."
        ) from None
    except (OSError, ValueError, SyntaxError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"The image {path} cannot be read: {reason}.") from None
    if pictures > 1:
        raise UserError(
            f"{path} holds {pictures} pictures, and a clip continues one. Save that one alone."
        )
    if is_deep:
        raise UserError(f"The image {path} has colours of 16 bits; expected 8. Save it so.")
    return image


def _in_rgb(path: Path, image: Image.Image) -> Image.Image:
    if image.mode == "P":
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    if image.mode in ("RGBA", "LA"):
        lowest, _ = image.getchannel("A").getextrema()
        if lowest != 255:
            raise UserError(f"The image {path} is transparent in parts. Lay it on a background.")
    elif image.mode not in ("RGB", "L", "1"):
        raise UserError(
            f"The image {path} has pixels of the kind {image.mode}; expected RGB or grey of 8 "
            "bits. Save it so."
        )
    return image.convert("RGB")
