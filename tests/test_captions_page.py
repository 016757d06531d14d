"""docs/captions-and-prompts.md is true: its token counts, its examples, its flags and its list of deviations."""

import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from finetune import prepare_buckets_latents
from library.captions.draws import CaptionDraw
from library.captions.final_captions import CaptionPair, final_texts
from library.captions.options import CaptionOptions, resolve
from library.config.options import options_of, parse_options
from library.data.caption_files import MergeOptions
from library.data.caption_notices import dropout_sentence
from library.samples.prompts import read_prompt_file
from library.sdxl.tokenizers import token_ids
from library.training.run_options import OPTION_CLASSES
from tests.captions.test_golden import DEVIATIONS
from tests.reliability.test_table import TEST, functions_of

PAGE = (Path(__file__).parents[1] / "docs" / "captions-and-prompts.md").read_text(encoding="utf-8")
CODE = re.compile(r"`([^`]+)`")


def tables():
    """Each table of the page: its column names and its rows, as lists of cells."""
    for table in re.findall(r"(?:^\|.*\n)+", PAGE, re.MULTILINE):
        lines = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table.splitlines()]
        yield lines[0], lines[2:]


def rows_of(*columns):
    """The rows of the tables that have these columns, as a dictionary each."""
    found = [
        dict(zip(names, row, strict=True)) for names, rows in tables() if set(columns) <= set(names) for row in rows
    ]
    assert found, columns
    return found


def texts_in(cell):
    """The texts in backticks, as they are meant: a bar has a backslash before it in a table only."""
    return [text.replace("\\|", "|") for text in CODE.findall(cell)]


@pytest.mark.parametrize("row", rows_of("text", "tokens"), ids=lambda row: row["text"])
def test_the_tokens_of_a_text_are_counted_right(row):
    (text,) = texts_in(row["text"])
    assert len(token_ids(text)) == int(row["tokens"])


@pytest.mark.parametrize("row", rows_of("tokens L, G"), ids=lambda row: row["L (`01.txt`)"])
def test_the_tokens_of_the_example_captions_are_counted_right(row):
    ((caption_l,), (caption_g,)) = texts_in(row["L (`01.txt`)"]), texts_in(row["G (`01.caption`)"])
    counted = [len(token_ids(caption)) for caption in (caption_l, caption_g)]
    assert counted == [int(number) for number in row["tokens L, G"].split(", ")]


@pytest.mark.parametrize("row", rows_of("caption", "options", "the encoder reads"), ids=lambda row: row["options"])
def test_an_encoder_reads_what_the_table_of_options_shows(row):
    (caption,), (flags,) = texts_in(row["caption"]), texts_in(row["options"])
    encoder = re.search(r"_([lg])\b", flags)[1]
    (options,) = parse_options([CaptionOptions], shlex.split(flags), description="")
    captions = CaptionPair((caption,), (caption,))
    read = [
        final_texts(captions, resolve([vars(options)]), CaptionDraw(seed=0, epoch=epoch, key="01"))
        for epoch in range(1, 60)
    ]
    assert {texts.text_l if encoder == "l" else texts.text_g for texts in read} == set(
        texts_in(row["the encoder reads"])
    )
    # The other encoder's caption stays as it is.
    assert {texts.text_g if encoder == "l" else texts.text_l for texts in read} == {caption}


def test_the_sentence_about_dropout_is_the_one_that_the_trainer_reports():
    blocks = re.findall(r"^```\n(.*)\n```$", PAGE, re.MULTILINE)
    flags = blocks[blocks.index(next(block for block in blocks if block.startswith("captions dropped"))) - 1]
    (options,) = parse_options([CaptionOptions], shlex.split(flags), description="")
    assert dropout_sentence(resolve([vars(options)]).dropout) in blocks


def test_every_recorded_case_that_differs_from_the_reference_is_listed():
    listed = [number for row in rows_of("recorded cases") for number in re.findall(r"\d+", row["recorded cases"])]
    assert sorted(map(int, listed)) == sorted(DEVIATIONS)


def test_the_table_of_options_has_23_rows():
    assert len({row["what"] for row in rows_of("what", "flags", "for L and G", "test")}) == 23


@pytest.mark.parametrize("row", rows_of("what", "flags", "for L and G", "test"), ids=lambda row: row["what"])
def test_each_row_of_the_table_of_options_names_a_test_that_exists(row):
    assert row["for L and G"].endswith(".")
    named = TEST.fullmatch(row["test"])
    assert named is not None, row["test"]
    assert named["function"] in functions_of(named["path"])


@cache
def known_flags():
    classes = [*OPTION_CLASSES, MergeOptions, *prepare_buckets_latents.OPTION_CLASSES]
    return {option.flag for option_class in classes for option in options_of(option_class)}


def prompt_options():
    """The options of a line of a prompt file, as the page lists them."""
    return [option for row in rows_of("option", "meaning") for option in texts_in(row["option"]) if option[0] == "-"]


def test_every_option_of_prompt_files_that_the_page_lists_is_read(tmp_path):
    values = {"--w": "64", "--h": "64", "--d": "1", "--l": "7", "--s": "20", "--ss": "euler", "--gr": "0.5"}
    line = " ".join(["a cat", *(f"{option} {values.get(option, 'text')}" for option in prompt_options())])
    (tmp_path / "prompt.txt").write_text(line, encoding="utf-8")
    (prompt,) = read_prompt_file(tmp_path / "prompt.txt")
    assert (prompt.prompt_g, prompt.sampler, len(prompt_options())) == ("a cat", "euler", 11)


def test_every_flag_that_the_page_names_exists():
    named = set(re.findall(r"(?<![\w-])--[a-z]\w*", PAGE))
    of_sd_scripts, mistake_that_is_shown = {"--remove_underscore"}, {"--steps"}
    assert named - known_flags() - {*prompt_options()} - of_sd_scripts == mistake_that_is_shown
