"""Pictures in rows and columns, with a label for each."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_GAP = 4  # pixels between pictures, and around labels
_PAPER, _TEXT, _NO_PICTURE = "#ffffff", "#202020", "#d8d8d8"
_MOST_LINES = 6
"""Of a label; the rest of it becomes an ellipsis."""


def draw_table(
    row_labels: Sequence[str], column_labels: Sequence[str], cells: Sequence[Sequence[Image.Image | None]]
) -> Image.Image:
    """The pictures `cells[row][column]`, row labels left of them and column labels above; None leaves a cell grey.

    All cells are as large as the largest picture, which keeps its size; smaller ones lie in their cell's upper left.
    """
    width = max((picture.width for row in cells for picture in row if picture is not None), default=64)
    height = max((picture.height for row in cells for picture in row if picture is not None), default=64)
    font = ImageFont.load_default(max(11, min(width, height) // 14))
    row_texts = [_wrapped(label, font, width) for label in row_labels]
    column_texts = [_wrapped(label, font, width) for label in column_labels]
    left = max(_size(text, font)[0] for text in row_texts) + 2 * _GAP
    top = max(_size(text, font)[1] for text in column_texts) + 2 * _GAP
    table = Image.new("RGB", (left + len(column_labels) * (width + _GAP), top + len(row_labels) * (height + _GAP)))
    table.paste(_PAPER, (0, 0, *table.size))
    pen = ImageDraw.Draw(table)
    for column, text in enumerate(column_texts):
        pen.multiline_text((left + column * (width + _GAP), _GAP), text, fill=_TEXT, font=font)
    for row, text in enumerate(row_texts):
        y = top + row * (height + _GAP)
        pen.multiline_text((_GAP, y), text, fill=_TEXT, font=font)
        for column, picture in enumerate(cells[row]):
            x = left + column * (width + _GAP)
            if picture is None:
                pen.rectangle((x, y, x + width - 1, y + height - 1), fill=_NO_PICTURE)
            else:
                table.paste(picture, (x, y))
    return table


def _wrapped(label: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> str:
    """The label in lines of at most `width` pixels, where its words allow it."""
    lines = [""]
    for word in label.split():
        longer = f"{lines[-1]} {word}".lstrip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    if len(lines) > _MOST_LINES:
        lines[_MOST_LINES - 1 :] = [f"{lines[_MOST_LINES - 1]} …"]
    return "\n".join(lines)


def _size(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> tuple[int, int]:
    """Width and height of a text in pixels, from the top of its first line."""
    pen = ImageDraw.Draw(Image.new("L", (1, 1)))
    _, _, right, bottom = pen.multiline_textbbox((0, 0), text or " ", font=font)
    return round(right), round(bottom)
