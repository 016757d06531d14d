"""What is taken for a refusal, and what of a model's words is the caption."""

import pytest

from library.annotation.refusals import caption_in, is_refusal


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I'm sorry, but I can't describe this.", True),
        ("I’m unable to help with that.", True),
        ("Sorry, no.", True),
        ("I cannot assist with this request.", True),
        ("As an AI, I do not see images.", True),
        ("Unfortunately, I cannot say.", True),
        ("A sorry-looking dog that cannot walk.", False),
        ("I see a cat.", False),
        ("As an air balloon rises, people wave.", False),
        ("", False),
    ],
)
def test_a_refusal_is_told_from_a_caption_by_how_it_begins(text, expected):
    assert is_refusal(text) is expected


@pytest.mark.parametrize(
    ("said", "caption"),
    [
        ("  A cat\non a  table. \n", "A cat on a table."),
        ("Caption: a cat", "a cat"),
        ('"A cat."', "A cat."),
        ('"A" and "B"', '"A" and "B"'),
        ("", ""),
    ],
)
def test_a_caption_is_one_line_without_its_label(said, caption):
    assert caption_in(said) == caption
