"""Each rule that cleans captions, as a table of cases; what no rule concerns keeps every character."""

import pytest

from library.annotation.cleaning_options import RuleOptions, read_rules
from library.annotation.cleaning_rules import Rule, clean, clean_captions
from library.config.errors import UserError

CASES = [  # flags of the script, the caption before, the caption after
    ({"find": ["cat"], "replace": ["dog"]}, "a cat, cats", "a dog, dogs"),
    ({"find": ["cat"], "replace": ["cat cat"]}, "a cat", "a cat cat"),
    ({"find": ["a", "b"], "replace": ["b", "c"]}, "a b", "c c"),
    ({"find": ["young "], "replace": [""]}, "a young woman", "a woman"),
    ({"find": ["woman"], "replace": [""]}, "a woman, a  young woman  walks", "a, a young walks"),
    ({"find": ["x"], "replace": [""]}, "a, x, b", "a, b"),
    ({"find": ["x"], "replace": [""]}, "x", ""),
    ({"find": ["."], "replace": ["!"]}, "a.b", "a!b"),
    (
        {"find": [r"\bphotos?\b"], "replace": ["photograph"], "regex": True},
        "a photo, photos",
        "a photograph, photograph",
    ),
    ({"find": [r"(\w+) hair"], "replace": [r"hair: \1"], "regex": True}, "long hair", "hair: long"),
    ({"remove_tags": "b, d"}, "a, b, bb, c", "a, bb, c"),
    ({"remove_tags": "b"}, "a,c", "a,c"),
    ({"deduplicate": True}, "b, a, b, A", "b, a, A"),
    ({"deduplicate": True}, "a  ,b", "a  ,b"),
    ({"sort": True}, "b, a, C", "a, b, C"),
    ({"remove_underscore": True}, "long_hair, ^_^, >_o, (o)_(o), a_b", "long hair, ^_^, >_o, (o)_(o), a_b"),
    ({"remove_underscore": True}, "a_bc", "a bc"),
    ({"prefix": "photo, "}, "a", "photo, a"),
    ({"prefix": "photo, "}, "photo, a", "photo, a"),
    ({"prefix": "photo"}, "", "photo"),
    ({"sort": True, "prefix": "z, "}, "b, a", "z, a, b"),
    ({"remove_tags": "a"}, "a, b\r\n\r\n  a, c  \n", "b\r\n\r\n  c  \n"),
    ({"remove_tags": "a"}, "\ufeffa, b\n", "\ufeffb\n"),
    ({"find": ["b"], "replace": ["c"]}, "a\rb\r", "a\rc\r"),
    ({"booru_rules": True}, "long_hair, ^_^, rating:safe, x", "long hair, ^_^"),
    ({"booru_rules": True}, "1girl, red hair, blue eyes, green eyes", "1girl, red hair, blue eyes, green eyes"),
    ({"booru_rules": True}, "2girls, red hair, blonde hair, long hair", "2girls, long hair"),
    ({"booru_rules": True}, "2girls, red hair, blonde hair, long hair, short hair", "2girls"),
    ({"booru_rules": True}, "2boys, blue eyes, green eyes, smile", "2boys, smile"),
    ({"booru_rules": True}, "2girls, bob cut, hime cut, ponytail, braid, ahoge", "2girls"),
    ({"booru_rules": True}, "2girls, blue eyes, long sleeves, sleeveless", "2girls, blue eyes"),
    ({"booru_rules": True}, "shirt, white shirt, skirt", "white shirt, skirt"),
    ({"booru_rules": True}, "hair ornament, red hair ornament", "red hair ornament"),
    ({"booru_rules": True}, "rating", "rating"),
]


def flags(**values):
    return RuleOptions(**values).in_order(", ")


@pytest.mark.parametrize(("options", "before", "after"), CASES, ids=repr)
def test_each_rule_does_what_the_table_says(options, before, after):
    assert clean(before, flags(**options)) == after


@pytest.mark.parametrize(
    ("own", "other", "expected"),
    [
        (["a, style, b"], ["c"], (("a, b",), ("c, style",))),
        (["a, style"], [], (("a",), ("style",))),
        (["a"], [], (("a",), ())),
        (["a, style"], ["style, c"], (("a",), ("style, c",))),
        (["style\nb, oil\n"], ["x\ny"], (("\nb\n",), ("x, oil, style\ny, oil, style",))),
        (["style"], [""], (("",), ("style",))),
    ],
)
def test_tags_move_to_every_variant_of_the_other_encoder(own, other, expected):
    cleaned = clean_captions(own, other, flags(move_tags="oil, style"))
    assert (cleaned.own, cleaned.other) == expected


def test_a_rule_tells_whether_it_changed_anything():
    assert clean_captions(["a, b"], [], flags(remove_tags="a", sort=True, deduplicate=True)).used == (
        True,
        False,
        False,
    )


def test_a_file_of_rules_is_applied_in_its_order_before_the_flags(tmp_path):
    path = tmp_path / "rules.toml"
    path.write_text(
        """
        [[rule]]
        find = "cat"
        replace = "dog"
        [[rule]]
        regex = 'dogs?'
        replace = "wolf"
        [[rule]]
        remove = ["x", "y"]
        [[rule]]
        sort = true
        [[rule]]
        prefix = "p, "
        [[rule]]
        move = ["z"]
        """,
        encoding="utf-8",
    )
    rules = flags(rules=path, prefix="q, ")
    assert rules[5] == Rule("move", tags=("z",))
    assert clean_captions(["x, cats, b, z"], [], rules).own == ("q, p, b, wolf",)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[rule]]\nfind = 'a'\n", "rule 1: expected find and replace"),
        ("[[rule]]\nsort = true\n[[rule]]\nfind = 1\nreplace = 'b'", "rule 2: expected find and replace"),
        ("[[rule]]\nsort = false\n", "rule 1: expected"),
        ("[[rule]]\nremove = []\n", "rule 1: expected"),
        ("[[rule]]\nregex = '('\nreplace = ''\n", "rule 1: '\\(' with '' is no regular expression"),
        ("[[rule]]\nregex = 'a'\nreplace = '\\2'\n", "rule 1: 'a' with .* is no regular expression"),
        ("[[rule]]\nfind = ''\nreplace = 'b'\n", "rule 1: the text to find is empty"),
        ("[[rule]]\nfind = 'a'\nreplace = \"b\\nc\"\n", "a replacement has no line end"),
        ("[rule]\n", "expected tables"),
        ("rules = 3\n", "expected tables"),
        ("[[rule\n", "no TOML file"),
        ("", "expected tables"),
    ],
)
def test_a_file_of_rules_that_is_wrong_is_refused_with_the_number_of_the_rule(text, said, tmp_path):
    path = tmp_path / "rules.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=said):
        read_rules(path)
