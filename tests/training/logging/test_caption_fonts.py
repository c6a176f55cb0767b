"""Captions in any script are drawn with a font that has their letters, or it is said."""

import numpy as np
import pytest
from absl import logging
from PIL import ImageFont

from starflow2_jax.training.logging import caption_fonts, image_grid

pytestmark = pytest.mark.fast


@pytest.fixture
def warnings(monkeypatch):
    lines = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: lines.append(text % values))
    return lines


def test_each_caption_has_a_font_with_its_letters(warnings):
    fonts = caption_fonts.fonts_of(["a red circle", "красный круг", "دائرة"], 11)
    assert fonts[0].getname() == ImageFont.load_default(11).getname()
    assert [font.getname()[0] for font in fonts[1:]] == ["DejaVu Sans"] * 2
    assert not warnings


def test_characters_without_a_font_are_named(warnings, monkeypatch):
    monkeypatch.setattr(caption_fonts, "_files", lambda: ())
    caption_fonts._choose.cache_clear()
    caption_fonts.fonts_of(["a circle", "圓 круг"], 11)
    caption_fonts._choose.cache_clear()
    assert len(warnings) == 1
    assert "CJK UNIFIED IDEOGRAPH-5713" in warnings[0] and "Noto Sans" in warnings[0]


def test_letters_of_another_script_are_no_boxes():
    images = np.zeros((2, 8, 8, 3), np.uint8)
    sheets = [image_grid.grid(images, [text, "a"], 1) for text in ("ж", "я", "\U000f0000")]
    assert not any(np.array_equal(sheets[0], sheet) for sheet in sheets[1:])
