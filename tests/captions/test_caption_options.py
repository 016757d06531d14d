"""Flags for both encoders or one, the levels at which they stand, and the mistakes that are named."""

from dataclasses import fields

import pytest

from library.captions.options import (
    CaptionOptions,
    caption_extension,
    level_problems,
    read_protected_tags,
    resolve,
    rule_problems,
)
from library.captions.rules import CaptionDropout, CaptionRules, PairRules
from library.config.config_file import read_config_file
from library.config.errors import UserError
from library.config.options import options_of, parse_options
from library.config.spellings import Spellings

FLAGS = {each.name for each in options_of(CaptionOptions)}


def parsed(*argv):
    (options,) = parse_options([CaptionOptions], list(argv), description="")
    return options


def rules_of(*argv):
    return resolve([vars(parsed(*argv))])


# -- flags ------------------------------------------------------------------------------------------------------------


def test_every_setting_of_the_rules_is_a_flag_for_both_encoders_and_for_each():
    for each in fields(CaptionRules):
        assert {each.name, f"{each.name}_l", f"{each.name}_g"} <= FLAGS
    assert {each.name for each in fields(CaptionDropout)} <= FLAGS
    assert {"caption_extension", "caption_extension_l", "caption_extension_g", "caption_draws"} <= FLAGS
    assert not {"caption_draws_l", "caption_dropout_rate_l_l"} & FLAGS


def test_without_flags_nothing_happens_to_captions():
    assert rules_of() == PairRules()
    assert set(vars(parsed()).values()) == {None}


def test_a_plain_flag_less_one_encoder_says_the_same_as_the_other_encoder_alone():
    assert rules_of("--shuffle_caption", "--shuffle_caption_g=false") == rules_of("--shuffle_caption_l")
    assert rules_of("--shuffle_caption_l") == PairRules(rules_l=CaptionRules(shuffle_caption=True))
    assert rules_of("--shuffle_caption").rules_l == rules_of("--shuffle_caption").rules_g


def test_values_of_each_type_reach_the_encoder_that_they_are_for():
    rules = rules_of("--keep_tokens=2", "--caption_prefix_l", "style,", "--max_token_length_g=150")
    assert rules.rules_l == CaptionRules(keep_tokens=2, caption_prefix="style,")
    assert rules.rules_g == CaptionRules(keep_tokens=2, max_token_length=150)


def test_rates_of_caption_dropout_are_three_events_and_none_replaces_another():
    rules = rules_of("--caption_dropout_rate=0.1", "--caption_dropout_rate_l=0.05")
    assert rules.dropout == CaptionDropout(caption_dropout_rate=0.1, caption_dropout_rate_l=0.05)


def test_draws_are_shared_on_demand():
    assert rules_of("--caption_draws=shared").shared
    assert not rules_of("--caption_draws=separate").shared


@pytest.mark.parametrize("argument", ["--max_token_length_l=80", "--dropped_caption_g=nothing", "--caption_draws=both"])
def test_a_value_that_is_no_choice_is_refused(argument):
    with pytest.raises(UserError, match=r"expects one of"):
        parsed(argument)


def test_a_toml_file_switches_one_encoder_off(tmp_path):
    file = tmp_path / "options.toml"
    file.write_text("shuffle_caption = true\nshuffle_caption_g = false\n", encoding="utf-8")
    level = read_config_file(file, options_of(CaptionOptions), Spellings({}, {}))
    assert resolve([level]) == rules_of("--shuffle_caption_l")


# -- levels -----------------------------------------------------------------------------------------------------------


def test_the_nearest_level_that_says_anything_wins_even_over_a_form_for_one_encoder():
    subset = {"keep_tokens": 1, "shuffle_caption": None}
    general = {"keep_tokens_l": 5, "keep_tokens": 4, "shuffle_caption_g": True}
    command_line = {"shuffle_caption": False, "caption_prefix": "x"}
    rules = resolve([subset, general, command_line])
    assert rules.rules_l == CaptionRules(keep_tokens=1, shuffle_caption=False, caption_prefix="x")
    assert rules.rules_g == CaptionRules(keep_tokens=1, shuffle_caption=True, caption_prefix="x")


def test_within_a_level_the_form_for_one_encoder_wins():
    rules = resolve([{}, {"keep_tokens_l": 5, "keep_tokens": 4}])
    assert (rules.rules_l.keep_tokens, rules.rules_g.keep_tokens) == (5, 4)


def test_nothing_and_off_are_something_said():
    near = {"caption_prefix": "", "keep_tokens": 0, "caption_dropout_rate": 0.0, "shuffle_caption": False}
    far = {"caption_prefix": "x", "keep_tokens": 2, "caption_dropout_rate": 0.5, "shuffle_caption": True}
    assert resolve([near, far]) == PairRules()


def test_rates_of_dropout_are_resolved_one_by_one():
    rules = resolve([{"caption_dropout_rate_l": 0.05}, {"caption_dropout_rate": 0.1, "caption_dropout_rate_l": 0.2}])
    assert rules.dropout == CaptionDropout(caption_dropout_rate=0.1, caption_dropout_rate_l=0.05)


def test_caption_files_end_as_the_nearest_level_says_or_by_default():
    assert [caption_extension([{}], encoder) for encoder in ("l", "g")] == [".txt", ".caption"]
    levels = [{"caption_extension_g": ".g"}, {"caption_extension": ".cap"}]
    assert [caption_extension(levels, encoder) for encoder in ("l", "g")] == [".cap", ".g"]


# -- protected tags ---------------------------------------------------------------------------------------------------


def test_protected_tags_are_read_from_a_file_of_one_encoder(tmp_path):
    file = tmp_path / "tags.txt"
    file.write_text("\ufeffSolo\n\n  1girl \r\nlong hair, wet\n", encoding="utf-8")
    rules = rules_of(f"--protected_tags_l={file}")
    assert rules.rules_l.protected_tags == {"solo", "1girl", "long hair, wet"}
    assert rules.rules_g.protected_tags == frozenset()


def test_a_file_of_protected_tags_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match=r"missing\.txt"):
        read_protected_tags(tmp_path / "missing.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"latin\.txt.*UTF-8"):
        read_protected_tags(tmp_path / "latin.txt")
    (problem,) = level_problems({"protected_tags": tmp_path / "missing.txt"})
    assert "missing.txt" in problem


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--caption_dropout_rate_l=1.5"], "--caption_dropout_rate_l is 1.5; it must be 1 or less."),
        (["--caption_tag_dropout_rate_g=-0.1"], "--caption_tag_dropout_rate_g is -0.1; it must be 0 or more."),
        (["--caption_dropout_rate=nan"], "--caption_dropout_rate is nan; it must be 0 or more."),
        (["--keep_tokens=-1"], "--keep_tokens is -1; it must be 0 or more."),
        (["--token_warmup_step=inf"], "--token_warmup_step is inf; it must be 10000000 or less."),
        (["--caption_variants_l=-2"], "--caption_variants_l is -2; it must be 0 or more."),
        (["--caption_dropout_every_n_epochs_g=-1"], "--caption_dropout_every_n_epochs_g is -1; it must be 0 or more."),
        (["--caption_separator="], "--caption_separator is ''; it must not be empty."),
        (
            ["--caption_dropout_rate=0.5", "--caption_dropout_rate_l=0.3", "--caption_dropout_rate_g=0.3"],
            "--caption_dropout_rate, --caption_dropout_rate_l and --caption_dropout_rate_g add up to 1.1",
        ),
        (
            ["--secondary_separator_l=,"],
            "--caption_separator and --secondary_separator of encoder L are both ','; change one.",
        ),
        (
            ["--keep_tokens_separator_g=;", "--secondary_separator=;"],
            "--keep_tokens_separator and --secondary_separator of encoder G are both ';'; change one.",
        ),
        (
            ["--token_warmup_step=5", "--caption_variants_g=3"],
            "--token_warmup_step and --caption_variants of encoder G exclude each other",
        ),
        (
            ["--caption_draws=shared", "--enable_wildcard", "--caption_variants_l=3"],
            "--caption_draws is shared, but --caption_variants differs between L and G",
        ),
    ],
)
def test_what_cannot_work_is_named_in_one_line(arguments, expected):
    with pytest.raises(UserError) as error:
        parsed(*arguments)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_rates_whose_sum_is_one_but_for_rounding_are_accepted():
    assert 0.7 + 0.2 + 0.1 != 1
    assert not list(rule_problems(PairRules(dropout=CaptionDropout(0.7, 0.2, 0.1 + 1e-16))))


def test_a_level_of_a_file_is_checked_with_its_own_spelling_and_other_keys_are_left_to_others():
    assert level_problems({"num_repeats": -1, "keep_tokens_l": 1}) == []
    assert level_problems({"caption_dropout_rate_l": 2.0}) == ["caption_dropout_rate_l is 2.0; it must be 1 or less."]
