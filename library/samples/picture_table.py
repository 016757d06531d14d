"""Images in rows and columns, with labels."""

from collections.abc import Iterable, Iterator, Sequence

from PIL import Image, ImageDraw, ImageFont

_GAP = 4  # pixels between images, and around labels
_PAPER, _TEXT, _NO_IMAGE = "#ffffff", "#202020", "#d8d8d8"
_MOST_LINES = 6
"""Lines that one line of a label can wrap to; an ellipsis replaces the rest."""

_SYSTEM_FONTS = (
    *("DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc"),
    *("arial.ttf", "msgothic.ttc", "msyh.ttc", "malgun.ttf"),
    *("Arial Unicode.ttf", "Hiragino Sans GB.ttc"),
)
"""Fonts of Linux, Windows and macOS that Pillow finds by name."""
_IN_NO_FONT = "\U0010fffd"  # a private-use code point, drawn as the placeholder for missing characters

_Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


def draw_table(
    row_labels: Sequence[str], column_labels: Sequence[str], cells: Sequence[Sequence[Image.Image | None]]
) -> Image.Image:
    """Return a table of `cells[row][column]` with row labels on the left and column labels above.

    A cell that is None stays grey. All cells have the size of the largest image; smaller ones lie in the upper left.
    Labels wrap to the width of a cell. Characters beyond ASCII are drawn in a system font, or as an escape (U+732B is
    `\\u732b`) if none has them.
    """
    width = max((image.width for row in cells for image in row if image is not None), default=64)
    height = max((image.height for row in cells for image in row if image is not None), default=64)
    font = _font_for("".join([*row_labels, *column_labels]), max(11, min(width, height) // 14))
    row_texts = [_wrapped(label, font, width) for label in row_labels]
    column_texts = [_wrapped(label, font, width) for label in column_labels]
    row_sizes = [_size(text, font) for text in row_texts]
    left = max(text_width for text_width, _ in row_sizes) + 2 * _GAP
    top = max(_size(text, font)[1] for text in column_texts) + 2 * _GAP
    row_height = max(height, *(text_height for _, text_height in row_sizes))
    size = (left + len(column_labels) * (width + _GAP), top + len(row_labels) * (row_height + _GAP))
    table = Image.new("RGB", size, _PAPER)
    pen = ImageDraw.Draw(table)
    for column, text in enumerate(column_texts):
        pen.multiline_text((left + column * (width + _GAP), _GAP), text, fill=_TEXT, font=font)
    for row, text in enumerate(row_texts):
        y = top + row * (row_height + _GAP)
        pen.multiline_text((_GAP, y), text, fill=_TEXT, font=font)
        for column, image in enumerate(cells[row]):
            x = left + column * (width + _GAP)
            if image is None:
                pen.rectangle((x, y, x + width - 1, y + height - 1), fill=_NO_IMAGE)
            else:
                table.paste(image, (x, y))
    return table


# -- labels -----------------------------------------------------------------------------------------------------------


def _font_for(text: str, size: int) -> _Font:
    """Return the font with the most characters of the text; of equals the first, which is Pillow's own."""
    fonts = [ImageFont.load_default(size), *(() if text.isascii() else _system_fonts(size))]
    return max(fonts, key=lambda font: sum(_has(font, character) for character in set(text)))


def _system_fonts(size: int) -> Iterator[_Font]:
    for name in _SYSTEM_FONTS:
        try:
            yield ImageFont.truetype(name, size)
        except OSError:  # not installed
            continue


def _has(font: _Font, character: str) -> bool:
    return character.isascii() or bytes(font.getmask(character)) != bytes(font.getmask(_IN_NO_FONT))


def _wrapped(label: str, font: _Font, width: int) -> str:
    """Return the label wrapped to `width` pixels, between words where possible."""
    return "\n".join(_wrapped_line(line, font, width) for line in label.splitlines())


def _wrapped_line(text: str, font: _Font, width: int) -> str:
    shown = "".join(
        character if character.isspace() or _has(font, character) else character.encode("unicode_escape").decode()
        for character in text[: _MOST_LINES * width]  # the rest has no room, however narrow its letters
    )
    lines = [""]
    for word in _short_words(shown.split(), font, width):
        longer = f"{lines[-1]} {word}".lstrip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    if len(lines) > _MOST_LINES:
        lines = lines[:_MOST_LINES]
        while lines[-1] and font.getlength(f"{lines[-1]} …") > width:
            lines[-1] = lines[-1][:-1]
        lines[-1] += " …"
    return "\n".join(lines)


def _short_words(words: Iterable[str], font: _Font, width: int) -> Iterator[str]:
    """Yield the words; those wider than `width` in pieces."""
    for word in words:
        piece = ""
        for character in word:
            if piece and font.getlength(piece + character) > width:
                yield piece
                piece = ""
            piece += character
        yield piece


def _size(text: str, font: _Font) -> tuple[int, int]:
    """Return the width and height of a text in pixels, from the top of its first line."""
    pen = ImageDraw.Draw(Image.new("L", (1, 1)))
    _, _, right, bottom = pen.multiline_textbbox((0, 0), text or " ", font=font)
    return round(right), round(bottom)
