"""Tables of pictures: labels that can be read, whatever they say, and cells that nothing covers."""

import numpy as np
import pytest
from PIL import Image

from library.samples.picture_table import draw_table

PICTURE = Image.new("RGB", (64, 64), "#ff0000")
LONG_TAGS = ",".join(f"tag_{number}" for number in range(40))


def with_labels(row: str, column: str) -> np.ndarray:
    """The table of 2x2 pictures whose labels these are, twice."""
    return np.asarray(draw_table([row, row], [column, column], [[PICTURE, PICTURE], [PICTURE, PICTURE]]))


def is_ink(pixels: np.ndarray) -> np.ndarray:
    """Where letters are: all three colours are dark."""
    return (pixels < 100).all(axis=-1)


@pytest.mark.parametrize("label", [LONG_TAGS, "a " * 200, "猫" * 9000], ids=["tags", "words", "no spaces"])
def test_labels_of_any_length_stay_beside_their_own_picture(label: str):
    pixels = with_labels(label, label)
    is_red = (pixels == (255, 0, 0)).all(axis=-1)
    assert is_red.sum() == 4 * 64 * 64  # no letter covers a picture
    columns, rows = np.flatnonzero(is_red.any(axis=0)), np.flatnonzero(is_red.any(axis=1))
    assert columns[0] <= 64 + 8  # the margin is no wider than a picture and two gaps
    between_columns = pixels[:, columns[63] + 1 : columns[64]]
    assert not is_ink(between_columns).any()  # a column's label ends where its picture does
    assert not is_ink(pixels[rows[64] - 2 : rows[64]]).any()  # a row's label ends before the next one begins
    assert not is_ink(pixels[-2:]).any()  # nor is the last one cut off


def test_a_long_first_line_leaves_room_for_the_second():
    def table(second: str) -> np.ndarray:
        return with_labels(f"{LONG_TAGS}\n{second}", "x")

    assert not np.array_equal(table("a cat"), table("a dog"))


@pytest.mark.parametrize(("one", "other"), [("猫", "犬"), ("кот", "пёс"), ("é", "ñ")])
def test_labels_of_any_script_differ_where_their_texts_do(one: str, other: str):
    first, second = with_labels(one, "x"), with_labels(other, "x")
    assert first.shape != second.shape or not np.array_equal(first, second)
