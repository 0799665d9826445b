"""Pictures for people: coloured maps with a legend, bars, a labelled grid. An IMAGE is (B, H, W, 3), from 0 to 1."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

# black, purple, red, orange, pale yellow: brightness grows all along
SEQUENTIAL = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))
# blue below zero, white at zero, red above
DIVERGING = ((33, 102, 172), (247, 247, 247), (178, 24, 43))
BACKGROUND, INK = (24, 24, 27), (235, 235, 235)
LINE, LEAST_READABLE = 20, 9
LEAST_WIDTH, MOST = 256, 512
# of a grid that grows, on its longer side and without labels
PREVIEW = 768
# fonts with Chinese, Japanese, Korean, Arabic or Hebrew letters: Linux, Windows, macOS
FONTS = (
    "NotoSansCJK-Regular.ttc", "NotoSansCJKsc-Regular.otf", "SourceHanSans-Regular.ttc", "wqy-microhei.ttc",
    "DroidSansFallbackFull.ttf", "msyh.ttc", "YuGothM.ttc", "meiryo.ttc", "malgun.ttf", "msjh.ttc", "simsun.ttc",
    "PingFang.ttc", "Hiragino Sans GB.ttc", "AppleSDGothicNeo.ttc", "Arial Unicode.ttf", "arial.ttf", "DejaVuSans.ttf",
    "NotoSansArabic-Regular.ttf", "NotoSansHebrew-Regular.ttf",
)  # fmt: skip


def colours(values: torch.Tensor, anchors: Sequence[tuple[int, int, int]]) -> torch.Tensor:
    """(H, W) from 0 to 1 -> (H, W, 3) from 0 to 1."""
    table = torch.tensor(anchors, dtype=torch.float32) / 255
    place = values.nan_to_num(0.0).clamp(0, 1) * (len(anchors) - 1)
    low = place.floor().long().clamp(max=len(anchors) - 2)
    part = (place - low).unsqueeze(-1)
    return table[low] * (1 - part) + table[low + 1] * part


def draw_map(
    values: torch.Tensor, title: str, low: float, high: float, size: tuple[int, int], behind: torch.Tensor | None
) -> torch.Tensor:
    """One map (h, w) at `size` (H, W), `low` to `high`, under a title and over a legend; a `low` below 0 is signed.

    `behind`: an image (H, W, 3) that shines through.
    """
    anchors = DIVERGING if low < 0 else SEQUENTIAL
    values = (values - low) / max(high - low, 1e-12)
    values = torch.nn.functional.interpolate(values[None, None], size, mode="bilinear")[0, 0]
    picture = colours(values, anchors)
    if behind is not None:
        picture = 0.4 * behind + 0.6 * picture
    height, width = size
    canvas = Image.new("RGB", (width, height + 3 * LINE), BACKGROUND)
    canvas.paste(_to_pil(picture), (0, LINE))
    bar = colours(torch.linspace(0, 1, width - 16).expand(8, -1), anchors)
    canvas.paste(_to_pil(bar), (8, LINE + height + 6))
    draw = ImageDraw.Draw(canvas)
    _text(draw, (width // 2, LINE // 2), title, width - 8, "mm")
    below = 2 * LINE + height + 4
    _text(draw, (8, below), f"{low:.2g}", width // 3, "lm")
    _text(draw, (width - 8, below), f"{high:.2g}", width // 3, "rm")
    if low < 0:
        _text(draw, (width // 2, below), "0", width // 3, "mm")
    return _to_tensor(canvas)


def draw_bars(names: Sequence[str], columns: dict[str, Sequence[float]], title: str) -> torch.Tensor:
    """A table of bars: a row per name, a column per figure, every column on its own scale from 0. (1, H, W, 3)."""
    name_width, bar_width = 100, 180
    size = (name_width + bar_width * len(columns), LINE * (len(names) + 3))
    canvas = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    _text(draw, (8, LINE // 2), title, size[0] - 16, "lm")
    for column, (head, figures) in enumerate(columns.items()):
        left = name_width + column * bar_width
        _text(draw, (left, LINE + LINE // 2), head, bar_width - 8, "lm")
        top = max(*figures, 1e-12)
        for row, figure in enumerate(figures):
            y = LINE * (row + 2)
            draw.rectangle((left, y + 4, left + (bar_width - 70) * figure / top, y + LINE - 5), fill=(249, 142, 9))
            _text(draw, (left + bar_width - 12, y + LINE // 2), f"{figure:.3g}", 60, "rm")
    for row, name in enumerate(names):
        _text(draw, (8, LINE * (row + 2) + LINE // 2), name, name_width - 12, "lm")
    return _to_tensor(canvas)[None]


def draw_grid(
    cells: Sequence[torch.Tensor], labels: Sequence[str], columns: int, total: int | None = None
) -> torch.Tensor:
    """Cells (B, H, W, 3) side by side under their labels, for every index of B: (B, H', W', 3).

    `total`: with room for as many; None for those that are there.
    """
    batch, height, width, _ = cells[0].shape
    tile_width, gap = max(width, 96), 4
    rows = -(-(total or len(cells)) // columns)
    lines = [_lines(label, tile_width) for label in labels]
    head = LINE * max(map(len, lines))
    size = (columns * (tile_width + gap) + gap, rows * (height + head + gap) + gap)
    grids = []
    for index in range(batch):
        canvas = Image.new("RGB", size, BACKGROUND)
        draw = ImageDraw.Draw(canvas)
        for number, cell in enumerate(cells):
            x = gap + number % columns * (tile_width + gap)
            y = gap + number // columns * (height + head + gap)
            # the last line stands next to the picture
            top = y + head - LINE * len(lines[number])
            for line, text in enumerate(lines[number]):
                _text(draw, (x + tile_width // 2, top + LINE * line + LINE // 2), text, tile_width, "mm")
            canvas.paste(_to_pil(cell[index]), (x + (tile_width - width) // 2, y + head))
        grids.append(_to_tensor(canvas))
    return torch.stack(grids)


def draw_preview(cells: Sequence[torch.Tensor], labels: Sequence[str], columns: int, total: int) -> torch.Tensor:
    """The grid of which only the first cells are there, small enough to be drawn after each: (1, H', W', 3)."""
    _, height, width, _ = cells[0].shape
    factor = min(1.0, PREVIEW / max(columns, -(-total // columns)) / max(height, width))
    size = max(round(height * factor), 1), max(round(width * factor), 1)
    firsts = (cell[:1].movedim(-1, 1).float() for cell in cells)
    small = [torch.nn.functional.interpolate(first, size, mode="area").movedim(1, -1) for first in firsts]
    return draw_grid(small, labels, columns, total)


def map_size(latent: tuple[int, int], image: torch.Tensor | None) -> tuple[int, int]:
    """(H, W) at which to draw maps of a latent: wide enough for a legend, at most `MOST` on the longer side."""
    height, width = latent if image is None else image.shape[1:3]
    factor = min(max(1.0 if image is not None else 8.0, LEAST_WIDTH / width), MOST / max(height, width))
    return max(round(height * factor), 16), max(round(width * factor), LEAST_WIDTH // 2)


def fitted(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The first image of a batch at `size`, (H, W, 3)."""
    moved = image[:1, ..., :3].movedim(-1, 1).float()
    return torch.nn.functional.interpolate(moved, size, mode="bilinear")[0].movedim(0, -1).cpu()


def drawable(text: str) -> bool:
    """Whether there is a font on this system that has all of its characters."""
    return _font_for(text) is not None


def _text(draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, width: int, anchor: str) -> None:
    """`text` at a size at which it fits into `width` pixels."""
    file = _font_for(text)
    for size in range(13, 6, -1):
        font = _font(file or "", size)
        if draw.textlength(text, font) <= width:
            break
    draw.text(at, text, INK, font, anchor)


def _lines(label: str, width: int) -> list[str]:
    """A label broken behind its commas, so that each line can be read in `width` pixels."""
    font = _font(_font_for(label) or "", LEAST_READABLE)
    lines: list[str] = []
    for part in re.findall(r"[^,]+,?", label):
        if lines and font.getlength(lines[-1] + part) <= width:
            lines[-1] += part
        else:
            # that of a list of blocks stays
            if part.startswith(" "):
                lines[-1] = lines[-1].removesuffix(",")
            lines.append(part.lstrip())
    return lines


@lru_cache(maxsize=256)
def _font_for(text: str) -> str | None:
    """The file of the first font that has every character; empty for the one that Pillow brings, None for no font."""
    return next((file for file in ("", *FONTS) if _has(file, text)), None)


def _has(file: str, text: str) -> bool:
    try:
        font = _font(file, 13)
    except OSError:
        return False
    # a character that no font has is drawn as what stands for the missing ones
    missing = bytes(font.getmask("\U0010ffff"))
    return all(character.isspace() or bytes(font.getmask(character)) != missing for character in set(text))


@lru_cache(maxsize=64)
def _font(file: str, size: int) -> ImageFont.FreeTypeFont:
    """Pillow looks for the file in the system's folders."""
    return ImageFont.truetype(file, size) if file else ImageFont.load_default(size)


def _to_pil(picture: torch.Tensor) -> Image.Image:
    return Image.fromarray((picture.detach().cpu().float().clamp(0, 1) * 255).round().numpy().astype(np.uint8))


def _to_tensor(canvas: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(canvas).astype(np.float32) / 255)
