"""Picture files as people have them, read by Pillow: turned as their EXIF tag says, and in three channels."""

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

_SUFFIXES = set(".avif .bmp .gif .jp2 .jpeg .jpg .pgm .png .ppm .tif .tiff .webp".split())
_ORIENTATION = 0x0112  # EXIF's tag


def read(path: os.PathLike | str) -> Tensor:
    """[3, H, W] as a person sees it: turned by its EXIF orientation, without opacity.

    uint8; of more than 8 bits float32, as the file has them.

    Raises:
        ValueError: it cannot be read.
        ImportError: Pillow is missing.
    """
    import numpy
    from PIL import ImageOps

    with _open(path) as image:
        try:
            image = ImageOps.exif_transpose(image)
            if image.mode in ("F", "I") or image.mode.startswith("I;16"):
                values = torch.from_numpy(numpy.asarray(image).astype("float32"))
            else:
                values = torch.from_numpy(numpy.array(image.convert("RGB")))
        except Exception as error:  # a damaged picture can raise anything
            raise ValueError(f"{path} cannot be read as a picture: {error}") from None
    return values.expand(3, -1, -1) if values.dim() == 2 else values.permute(2, 0, 1)


def orientation(path: os.PathLike | str) -> int:
    """EXIF's: 1 if the picture is not turned, 5 to 8 if that swaps height and width."""
    with _open(path) as image:
        found = image.getexif().get(_ORIENTATION, 1)
    return found if found in range(1, 9) else 1


def listed(paths: Iterable[Path]) -> list[tuple[Path, Path]]:
    """(picture, the folder it was found in): a file, or what lies in a folder and its folders, by name.

    Raises:
        ValueError: a folder has no picture.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if not path.is_dir():
            found[path] = path.parent
            continue
        inside = [p for p in sorted(path.rglob("*")) if p.suffix.lower() in _SUFFIXES and not p.name.startswith(".")]
        if not inside:
            raise ValueError(f"{path} has no picture ({' '.join(sorted(_SUFFIXES))})")
        found |= dict.fromkeys(inside, path)
    return list(found.items())


def _open(path: os.PathLike | str):
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(f"pictures are read with Pillow: pip install pillow ({error})") from error
    try:
        return Image.open(path)
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}") from None
