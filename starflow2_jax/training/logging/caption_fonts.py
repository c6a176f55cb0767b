"""Fonts for captions in any script: Pillow's own, matplotlib's DejaVu Sans, or an installed one.

Pillow's own font has the letters of English alone, and draws a box for every other character.
"""

import functools
import io
import os
import unicodedata
from collections.abc import Sequence

from absl import logging
from PIL import ImageFont

_MAX_LISTED = 5  # characters that a warning lists


def fonts_of(captions: Sequence[str], size: int) -> list[ImageFont.FreeTypeFont]:
    """Return a font for each caption, and log which characters no font here can draw."""
    chosen, absent = [], set()
    for caption in captions:
        font, missing = _choose(frozenset(filter(str.isprintable, caption)), size)
        chosen.append(font)
        absent |= missing
    if absent:
        names = [f"{c} (U+{ord(c):04X} {unicodedata.name(c, '')})" for c in sorted(absent)]
        more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
        logging.warning("captions: no font here has %s%s, which become boxes; install one such as "
                        "Noto Sans", ", ".join(names[:_MAX_LISTED]), more)  # fmt: skip
    return chosen


@functools.lru_cache(maxsize=4096)
def _choose(characters: frozenset[str], size: int) -> tuple[ImageFont.FreeTypeFont, frozenset[str]]:
    """Return the first font with the most of some characters, and those that it lacks."""
    default = ImageFont.load_default(size)
    if all(character.isascii() for character in characters):
        return default, frozenset()
    missing, best = _lacking(characters, ""), ""
    for file in ("", *_files()):
        lacking = _lacking(characters, file)
        if len(lacking) < len(missing):
            missing, best = lacking, file
        if not missing:
            break
    return (ImageFont.truetype(best, size) if best else default), missing


def _lacking(characters: frozenset[str], file: str) -> frozenset[str]:
    codes = _codes(file)
    return frozenset(character for character in characters if ord(character) not in codes)


@functools.lru_cache(maxsize=1024)
def _codes(file: str) -> frozenset[int]:
    """Return the characters of a font's file, by default of Pillow's own font."""
    from matplotlib.ft2font import FT2Font

    try:
        source = file or io.BytesIO(ImageFont.load_default(10).font_bytes)
        return frozenset(FT2Font(source).get_charmap())
    except (OSError, RuntimeError, ValueError):
        return frozenset()  # a font of another kind


@functools.cache
def _files() -> tuple[str, ...]:
    """Return the files of the fonts to try: matplotlib's, then those of the system."""
    from matplotlib import font_manager, get_data_path

    bundled = os.path.join(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    installed = sorted(font_manager.findSystemFonts())
    return (bundled, *(file for file in installed if os.path.basename(file) != "DejaVuSans.ttf"))
