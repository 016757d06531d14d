"""From the probabilities of labels to the tags of an image: every flag of the reference's tagger."""

import pytest

from library.annotation.tag_choice import Label, read_labels, tag_choice
from library.annotation.tag_options import TagOptions
from library.config.errors import UserError

LABELS = [
    Label("general", "9"),
    Label("sensitive", "9"),
    Label("1girl", "0"),
    Label("long_hair", "0"),
    Label("^_^", "0"),
    Label("a,b", "0"),
    Label("alice_(red)_(tales)", "4"),
    Label("bob", "4"),
    Label("copy", "3"),
]
SURE = [0.2, 0.7, 0.9, 0.5, 0.4, 0.1, 0.8, 0.6, 0.36]
EVERY = "1girl, long_hair, ^_^, copy, alice_(red)_(tales), bob"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, EVERY),
        ({"thresh": 0.6}, "1girl, alice_(red)_(tales), bob"),
        ({"general_threshold": 0.5}, "1girl, long_hair, alice_(red)_(tales), bob"),
        ({"character_threshold": 0.7}, "1girl, long_hair, ^_^, copy, alice_(red)_(tales)"),
        ({"thresh": 0}, "1girl, long_hair, ^_^, a,b, copy, alice_(red)_(tales), bob"),
        ({"remove_underscore": True}, "1girl, long hair, ^_^, copy, alice (red) (tales), bob"),
        ({"undesired_tags": "1girl,bob"}, "long_hair, ^_^, copy, alice_(red)_(tales)"),
        ({"undesired_tags": "long_hair", "remove_underscore": True}, "1girl, ^_^, copy, alice (red) (tales), bob"),
        ({"always_first_tags": "bob,^_^,dog"}, "bob, ^_^, 1girl, long_hair, copy, alice_(red)_(tales)"),
        ({"character_tags_first": True}, "alice_(red)_(tales), bob, 1girl, long_hair, ^_^, copy"),
        ({"character_tag_expand": True}, "1girl, long_hair, ^_^, copy, alice_(red), tales, bob"),
        ({"use_rating_tags": True}, f"sensitive, {EVERY}"),
        ({"use_rating_tags_as_last_tag": True}, f"{EVERY}, sensitive"),
        ({"use_rating_tags": True, "undesired_tags": "sensitive"}, EVERY),
        ({"use_rating_tags": True, "always_first_tags": "1girl"}, f"1girl, sensitive, {EVERY[7:]}"),
        ({"tag_replacement": "1girl,woman;bob,robert"}, "woman, long_hair, ^_^, copy, alice_(red)_(tales), robert"),
        ({"tag_replacement": r"1girl,a\,b\;c"}, "a,b;c, long_hair, ^_^, copy, alice_(red)_(tales), bob"),
        ({"tag_replacement": r"a\,b,x", "thresh": 0.95, "general_threshold": 0.05}, "1girl, long_hair, ^_^, x, copy"),
        ({"tag_replacement": "1girl,bob"}, "bob, long_hair, ^_^, copy, alice_(red)_(tales)"),
        ({"caption_separator": " | "}, EVERY.replace(", ", " | ")),
    ],
    ids=str,
)
def test_the_flags_decide_which_tags_are_written_in_which_order(options, expected):
    choice = TagOptions(**options)
    assert choice.caption_separator.join(tag_choice(LABELS, choice).tags_of(SURE).written) == expected


def test_a_replacement_of_a_tag_that_the_model_does_not_have_is_named(capsys):
    tag_choice(LABELS, TagOptions(tag_replacement="dog,cat;bob,rob"))
    assert "the model has no tags dog" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,b\n1,2\n", "its first line has to name the columns name and category"),
        ("", "its first line has to name the columns"),
        ("tag_id,name,category\n1,cat\n", "line 2: expected a name and a category"),
    ],
)
def test_a_file_of_labels_that_is_none_is_refused_with_the_line(text, said, tmp_path):
    path = tmp_path / "selected_tags.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=said):
        read_labels(path)
