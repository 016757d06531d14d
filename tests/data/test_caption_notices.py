"""What is said about captions before a run, and what is not."""

from dataclasses import replace

import pytest

from library.captions.final_captions import CaptionPair, variants_of
from library.captions.rules import CaptionDropout, CaptionRules, PairRules
from library.config.errors import UserError
from library.data.caption_notices import caption_notices, dropout_sentence, require_paired_lines
from library.data.caption_report import idle_extensions
from library.data.subsets import Subset
from library.images.buckets import BucketOptions
from library.sdxl.sizes import Size

SHUFFLED = CaptionRules(shuffle_caption=True)
TAGS = "1girl, solo, red hair"
SENTENCE = "A girl with red hair stands alone in a park, smiling."


def captions_of(*pairs):
    return {
        f"{number:02}": CaptionPair(variants_of(of_l), variants_of(of_g)) for number, (of_l, of_g) in enumerate(pairs)
    }


def notices_of(rules_l=None, rules_g=None, pairs=((TAGS, SENTENCE),), dropout=None):
    plain = CaptionRules()
    return caption_notices(
        captions_of(*pairs), PairRules(rules_l or plain, rules_g or plain, dropout or CaptionDropout())
    )


def test_ordinary_captions_and_rules_need_no_notice():
    assert notices_of() == []
    assert notices_of(SHUFFLED, dropout=CaptionDropout(0.1, 0.05, 0.05)) == []


@pytest.mark.parametrize(
    ("dropout", "sentence"),
    [
        (CaptionDropout(), None),
        (
            CaptionDropout(0.1, 0.05, 0.05),
            "captions dropped: both 10 %, L alone 5 %, G alone 5 % (L in all 15 %, G 15 %)",
        ),
        (
            CaptionDropout(caption_dropout_rate_g=0.025),
            "captions dropped: both 0 %, L alone 0 %, G alone 2.5 % (L in all 0 %, G 2.5 %)",
        ),
        (
            CaptionDropout(caption_dropout_every_n_epochs_l=3),
            "captions dropped: L in epochs 3, 6, ...",
        ),
    ],
)
def test_the_table_of_dropout_is_one_sentence(dropout, sentence):
    assert dropout_sentence(dropout) == sentence


def test_dropout_without_the_unconditional_case_is_worth_a_notice():
    (notice,) = notices_of(dropout=CaptionDropout(caption_dropout_rate_l=0.1))
    assert "unconditional" in notice
    assert notices_of(dropout=CaptionDropout(0.1, 0.1)) == []
    every_n = CaptionDropout(caption_dropout_rate_l=0.1, caption_dropout_every_n_epochs=5)
    assert notices_of(dropout=every_n) == []


def test_shuffled_sentences_are_noticed_with_the_flag_that_leaves_them_alone():
    (notice,) = notices_of(SHUFFLED, SHUFFLED)
    assert notice.startswith("G captions look like sentences")
    assert "--shuffle_caption_l shuffles L alone" in notice
    (notice,) = notices_of(SHUFFLED, pairs=((SENTENCE, TAGS),))
    assert "--shuffle_caption_g shuffles G alone" in notice


@pytest.mark.parametrize(
    ("captions", "is_noticed"),
    [
        ([SENTENCE, TAGS], False),
        ([SENTENCE, SENTENCE, TAGS], True),
        (["A girl. She smiles.", "A dog. It barks."], True),
        (["one two three four five six seven eight"], False),
        (["a, one two three four five six seven eight nine"], True),
        ([], False),
    ],
)
def test_more_than_half_of_the_captions_have_to_look_like_sentences(captions, is_noticed):
    notices = notices_of(rules_g=SHUFFLED, pairs=[("", caption) for caption in captions])
    assert bool(notices) == is_noticed


def test_lines_that_are_never_used_are_counted():
    pairs = [("a\nb", "x"), ("c\nd", "y"), ("e", "z\nz")]
    first, second = notices_of(pairs=pairs)
    assert first.startswith("2 L captions have several lines; only the first is used.")
    assert "--enable_wildcard_l" in first
    assert second.startswith("1 G captions have several lines")
    wild = CaptionRules(enable_wildcard=True)
    assert notices_of(wild, wild, pairs=pairs) == []


def test_both_ways_of_keeping_tags_are_noticed():
    both = CaptionRules(shuffle_caption=True, keep_tokens=2, keep_tokens_separator="|||")
    (notice,) = notices_of(both)
    assert "--keep_tokens=2" in notice and "|||" in notice


@pytest.mark.parametrize(
    ("rules", "flag"),
    [
        (CaptionRules(keep_tokens=1), "--keep_tokens "),
        (CaptionRules(shuffle_caption=True, protected_tags=frozenset({"a"})), "--protected_tags "),
        (CaptionRules(shuffle_caption=True, token_warmup_min=3), "--token_warmup_min "),
    ],
)
def test_settings_that_have_nothing_to_act_on_are_named(rules, flag):
    (notice,) = notices_of(rules)
    assert notice.startswith(f"L: {flag}has no effect without")


def test_the_ending_of_caption_files_has_nothing_to_act_on_where_captions_are_metadata(tmp_path):
    plain = Subset(tmp_path, tmp_path / "meta.json", BucketOptions().rule(Size(1024, 1024)))
    assert list(idle_extensions([plain, replace(plain, metadata_file=None, extension_l=".tags")])) == []
    (notice,) = idle_extensions([replace(plain, extension_g=".txt")] * 2)
    assert notice.startswith("--caption_extension has no effect on captions of '")


def test_what_sd_scripts_would_train_as_text_is_counted():
    (notice,) = notices_of(CaptionRules(keep_tokens_separator="|||"), pairs=[("a ||| b", ""), ("c", "")])
    assert notice == "'|||' is removed from 1 L captions; sd-scripts would train it as text."
    (notice,) = notices_of(SHUFFLED, pairs=[("a,,b", ""), ("c, d", ""), ("", ""), ("e,", "")])
    assert notice == "2 L captions have empty tags, which are left out; sd-scripts would keep them."


def test_lines_that_are_drawn_together_must_be_as_many():
    wild = CaptionRules(enable_wildcard=True)
    pairs = captions_of(("a\nb", "x\ny"), ("a\nb", "x"))
    with pytest.raises(UserError, match=r"1 images have different numbers .*'01' \(2 and 1\)"):
        require_paired_lines(pairs, PairRules(wild, wild, shared=True))
    require_paired_lines(pairs, PairRules(wild, wild))
    require_paired_lines(pairs, PairRules(wild, CaptionRules(), shared=True))
    require_paired_lines(captions_of(("a\nb", "x\ny")), PairRules(wild, wild, shared=True))
