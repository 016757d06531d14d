"""Prompt files: what their lines and tables mean, and how each mistake in them is reported."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from library.config.errors import UserError
from library.samples.prompts import SAMPLERS, SamplePrompt, read_prompt_file

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "prompt_lines.json").read_text(encoding="utf-8"))
TRAINING_RESOLUTION = 512  # what the reference took where a line gave no size
CAT = SamplePrompt("a cat", "a cat", shared=True)


def read(folder: Path, text: str | bytes, name: str = "my prompts.txt") -> list[SamplePrompt]:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return read_prompt_file(path)


# -- what is understood -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", GOLDEN["lines"], ids=lambda case: case["line"])
def test_a_line_means_what_the_reference_made_of_it(case: dict, tmp_path: Path):
    [prompt] = read(tmp_path, case["line"])
    [call] = case["calls"]
    # The one difference: without --e the reference leaves encoder L without a text, here it reads the G prompt.
    assert prompt.shared == (" --e " not in case["line"])
    assert prompt.prompt_l == (call["prompt"] if prompt.shared else call["prompt_l"])
    assert prompt.prompt_g == call["prompt"]
    assert prompt.negative_g == prompt.negative_l == (call["negative_prompt"] or "")
    assert (prompt.width or TRAINING_RESOLUTION) == call["width"]
    assert (prompt.height or TRAINING_RESOLUTION) == call["height"]
    assert prompt.num_inference_steps == call["num_inference_steps"]
    assert prompt.guidance_scale == call["guidance_scale"]
    [file_name] = case["files"]  # ends in the seed, where there is one
    assert ("" if prompt.seed is None else f"_{prompt.seed}") == file_name.removesuffix(".png").partition("_00")[2][7:]


def test_every_option_of_a_line_is_read(tmp_path: Path):
    line = "a cat --e photo --n ugly --ng dull --nl blurred --w 1024 --h 832 --d 7 --l 5.5 --s 20 --ss Euler_A"
    full = SamplePrompt("a cat", "photo", "dull", "blurred", 1024, 832, 7, 5.5, 20, "euler_a", line=1, shared=False)
    assert read(tmp_path, line) == [full]
    assert read(tmp_path, f"{line} --gr 0.7") == [replace(full, guidance_rescale=0.7)]


@pytest.mark.parametrize("line", ["a cat --n ugly --nl blurred", "a cat --nl blurred --n ugly"])
def test_a_negative_of_one_encoder_wins_over_the_negative_of_both(line: str, tmp_path: Path):
    [prompt] = read(tmp_path, line)
    assert (prompt.negative_g, prompt.negative_l) == ("ugly", "blurred")


def test_an_empty_l_prompt_is_not_the_g_prompt(tmp_path: Path):
    [prompt] = read(tmp_path, "a cat --e --s 20")
    assert (prompt.prompt_l, prompt.shared, prompt.num_inference_steps) == ("", False, 20)


def test_an_l_prompt_alone_leaves_the_g_prompt_empty(tmp_path: Path):
    [prompt] = read(tmp_path, "--e photographic")
    assert (prompt.prompt_g, prompt.prompt_l, prompt.shared) == ("", "photographic", False)


@pytest.mark.parametrize("text", ["a cat -- a dog", "a cat, 3--4 years", "cat--e", "it ended --", "well-known --- cat"])
def test_dashes_that_are_no_option_stay_in_the_prompt(text: str, tmp_path: Path):
    assert read(tmp_path, text) == [SamplePrompt(text, text, shared=True)]


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_blank_lines_and_comments_are_skipped_and_lines_keep_their_number(line_end: str, tmp_path: Path):
    prompts = read(tmp_path, line_end.join(["# images", "", "a cat", "  # more", "a dog ", ""]))
    assert [(prompt.prompt_g, prompt.line) for prompt in prompts] == [("a cat", 3), ("a dog", 5)]


@pytest.mark.parametrize(
    ("name", "text"),
    [("p.txt", "a cat"), ("p.toml", '[[prompt]]\nprompt = "a cat"'), ("p.json", '[{"prompt": "a cat"}]')],
)
def test_a_byte_order_mark_is_not_part_of_the_file(name: str, text: str, tmp_path: Path):
    assert read(tmp_path, b"\xef\xbb\xbf" + text.encode(), name) == [CAT]


SPELLED_OUT = {
    "prompt": "a cat",
    "prompt_l": "photo",
    "negative_prompt": "ugly",
    "negative_prompt_l": "blurred",
    "width": 1030,
    "height": 832,
    "seed": 7,
    "scale": 5,
    "sample_steps": 20,
    "sample_sampler": "euler_a",
}
FULL = SamplePrompt("a cat", "photo", "ugly", "blurred", 1024, 832, 7, 5.0, 20, "euler_a")


def test_a_json_list_holds_tables_and_lines(tmp_path: Path):
    text = json.dumps([SPELLED_OUT, "a cat --s 20", {"prompt_g": "a cat", "num_inference_steps": 20}])
    full, line, table = read(tmp_path, text, "p.json")
    assert full == FULL
    assert line == SamplePrompt("a cat", "a cat", num_inference_steps=20, line=2, shared=True)
    assert table == SamplePrompt("a cat", "a cat", num_inference_steps=20, line=3, shared=True)


def test_spaces_around_a_text_say_nothing_in_a_table_either(tmp_path: Path):
    text = json.dumps([{"prompt": " a cat\n", "prompt_l": "photo "}, "a cat --e photo"])
    table, line = read(tmp_path, text, "p.json")
    assert (table.prompt_g, table.prompt_l) == (line.prompt_g, line.prompt_l) == ("a cat", "photo")


def test_a_toml_list_holds_one_image_per_table(tmp_path: Path):
    table = "[[prompt]]\n" + "\n".join(f"{key} = {json.dumps(value)}" for key, value in SPELLED_OUT.items())
    assert read(tmp_path, table + '\n[[prompt]]\nprompt = "a dog"', "P.TOML") == [
        FULL,
        SamplePrompt("a dog", "a dog", line=2, shared=True),
    ]


def test_toml_subsets_inherit_under_either_spelling_of_a_setting(tmp_path: Path):
    text = """
        [prompt]
        prompt = "a cat"
        guidance_scale = 5.0
        negative_prompt = "ugly"
        [[prompt.subset]]
        [[prompt.subset]]
        prompt_g = "a dog"
        scale = 3
        negative_prompt_l = "blurred"
    """
    cat, dog = read(tmp_path, text, "p.toml")
    assert (cat.prompt_g, cat.guidance_scale, cat.negative_g, cat.negative_l) == ("a cat", 5.0, "ugly", "ugly")
    assert (dog.prompt_g, dog.guidance_scale, dog.negative_g, dog.negative_l) == ("a dog", 3.0, "ugly", "blurred")


def test_a_single_toml_table_is_one_image(tmp_path: Path):
    assert read(tmp_path, '[prompt]\nprompt = "a cat"', "p.toml") == [CAT]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_name_can_be_asked_for_in_any_case(sampler: str, tmp_path: Path):
    for written in (sampler, sampler.upper(), sampler.title()):
        [prompt] = read(tmp_path, f"a cat --ss {written}")
        assert prompt.sampler == sampler


@pytest.mark.parametrize(
    ("written", "sampler"),
    [
        ("Euler a", "euler_a"),
        ("euler_ancestral", "euler_a"),
        ("DPM++ 2M", "dpmsolver++"),
        ("DPM2 a", "dpm_2_a"),
        ("PLMS", "pndm"),
        ("k_euler_a", "k_euler_a"),
    ],
)
def test_a_sampler_can_be_named_as_other_programs_do(written: str, sampler: str, tmp_path: Path):
    [prompt] = read(tmp_path, f"a cat --ss {written} --s 20")
    assert prompt.sampler == sampler


# -- how people write -------------------------------------------------------------------------------------------------

FOX = SamplePrompt("a fox", "a fox", shared=True)


@pytest.mark.parametrize("nothing", ["-", "--", "—", '""', "''"])
def test_a_dash_for_a_text_means_none(nothing: str, tmp_path: Path):
    assert read(tmp_path, f"a fox --n {nothing} --w 512") == [replace(FOX, width=512)]
    assert read(tmp_path, f"a fox --e {nothing}") == [replace(FOX, prompt_l="", shared=False)]


@pytest.mark.parametrize("dash", ["—", "–", "―", "−", "--", "–-"])
def test_a_long_dash_before_the_name_of_an_option_is_two_dashes(dash: str, tmp_path: Path):
    line = f"a fox {dash}n blurry {dash}w 512 {dash}ss euler"
    assert read(tmp_path, line) == [replace(FOX, negative_g="blurry", negative_l="blurry", width=512, sampler="euler")]


@pytest.mark.parametrize("text", ["a fox — red", "a fox —red", "a fox —l'eau", "a fox –seed of doubt", "a — n"])
def test_a_long_dash_before_anything_else_is_text(text: str, tmp_path: Path):
    assert read(tmp_path, text) == [SamplePrompt(text, text, shared=True)]


@pytest.mark.parametrize("line", ["a fox —width 512", "a fox —w512", "a fox —w=512", "a fox —W=512"])
def test_a_long_dash_before_a_misspelt_option_is_named(line: str, tmp_path: Path):
    with pytest.raises(UserError, match=r"there is no option --.* Did you mean --w, a space and a value\?"):
        read(tmp_path, line)


@pytest.mark.parametrize("value", ['"{}"', "'{}'", "“{}”", "{},", '"{}",', "{};"])
def test_quotes_round_a_value_and_a_comma_behind_it_say_nothing(value: str, tmp_path: Path):
    [prompt] = read(tmp_path, f"a fox --w {value.format(512)} --l {value.format(5.5)} --ss {value.format('euler_a')}")
    assert prompt == replace(FOX, width=512, guidance_scale=5.5, sampler="euler_a")


def test_words_after_two_dashes_are_named_with_the_way_to_write_them(tmp_path: Path):
    with pytest.raises(UserError) as caught:
        read(tmp_path, "a t-shirt --red and blue --w 512")
    assert "there is no option --red. The options are --e" in str(caught.value)
    assert "Write '-- red' or '-red' for text." in str(caught.value)
    assert read(tmp_path, "a t-shirt -- red and blue --w 512")[0].prompt_g == "a t-shirt -- red and blue"
    assert read(tmp_path, "a t-shirt -red and blue --w 512")[0].prompt_g == "a t-shirt -red and blue"


def test_null_in_json_is_a_setting_left_out(tmp_path: Path):
    nulls = {"prompt": "a fox", "prompt_l": None, "negative_prompt": None, "width": None, "seed": None, "sampler": None}
    assert read(tmp_path, json.dumps([nulls]), "p.json") == [FOX]


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("a cat --foo bar", "no option --foo. The options are --e --n --ng --nl --w --h --d --l --gr --s --ss."),
        ("a cat --steps 20", "no option --steps. Did you mean --s, a space and a value?"),
        ("a cat --w512", "no option --w512. Did you mean --w, a space and a value?"),
        ("a cat --l=7", "no option --l=7. Did you mean --l, a space and a value?"),
        ("a cat --e=style", "no option --e=style. Did you mean --e, a space and a value?"),
        ("a cat --w wide", "--w is 'wide'. It must be a whole number of pixels from 64 to 8192."),
        ("a cat --w", "--w is ''. It must be a whole number of pixels"),
        ("a cat --h 63", "--h is '63'. It must be a whole number of pixels from 64"),
        ("a cat --W 100000", "--W is '100000'. It must be a whole number of pixels from 64 to 8192."),
        ("a cat --w 512.5", "--w is '512.5'."),
        ("a cat --s 0", "--s is '0'. It must be a whole number from 1 to 1000."),
        ("a cat --l nan", "--l is 'nan'. It must be a number from 0"),
        ("a cat --d -1", "--d is '-1'. It must be a whole number from 0"),
        ("a cat --d 18446744073709551616", "--d is '18446744073709551616'."),
        ("a cat --ss euler_b", "--ss is 'euler_b'. Did you mean euler_a? It must be one of ddim, pndm"),
        ("a cat --w 512 --W 640", "--W is given twice."),
        ("--n ugly --s 20", "there is no prompt. Write the text of the image"),
    ],
)
def test_a_mistake_in_a_line_is_named_with_file_and_line(line: str, expected: str, tmp_path: Path):
    with pytest.raises(UserError) as caught:
        read(tmp_path, f"# images\n\na dog\n{line}\n")
    assert str(caught.value).startswith(f"'{tmp_path / 'my prompts.txt'}', line 4: ")
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("p.txt", "", "has no prompt."),
        ("p.txt", "# only\n\n", "has no prompt."),
        ("p.txt", b"a cat\n\xe9t\xe9\n", "line 2 is not UTF-8 text."),
        ("p.txt", "a cat".encode("utf-16"), "line 1 is not UTF-8 text."),
        ("p.docx", "a cat", "Its name must end in .txt, .toml, .json."),
        ("p.json", '[\n{"prompt": "a cat"},\n]', "line 3 is not valid JSON"),
        ("p.json", '{"prompt": "a cat"}', "is not a list."),
        ("p.json", "[]", "has no prompt."),
        ("p.json", "[5]", "prompt 1 is not a table."),
        (
            "p.json",
            '["a cat", {"prompt": "a cat", "wdith": 512}]',
            "prompt 2: there is no setting 'wdith'. Did you mean",
        ),
        (
            "p.json",
            '[{"prompt": "a cat", "scale": 5, "guidance_scale": 6}]',
            "prompt 1: 'guidance_scale' repeats a setting",
        ),
        ("p.json", '[{"prompt": "a cat", "width": true}]', "prompt 1: 'width' is 'True'."),
        ("p.json", '[{"prompt": "a cat", "width": 512.0}]', "prompt 1: 'width' is '512.0'."),
        ("p.json", f'[{{"prompt": "a cat", "scale": 1{"0" * 400}}}]', "It must be a number from 0 to 1000."),
        ("p.json", '[{"prompt": 5}]', "prompt 1: 'prompt' is '5'. It must be a text in quotes."),
        ("p.json", '[{"width": 512}]', "prompt 1: there is no prompt."),
        ("p.json", '[{"prompt": "a cat", "prompt_l": "\\ud83d photo"}]', "prompt 1: character 1 is no UTF-8."),
        ("p.json", '["a cat \\ud83d"]', "prompt 1: character 7 is no UTF-8."),
        ("p.json", '["a\\u0000cat"]', "prompt 1: character 2 is NUL."),
        ("p.toml", "[prompt", "is not valid TOML"),
        ("p.toml", '[prompts]\nprompt = "a cat"', "has 'prompts' at its top."),
        ("p.toml", "", "has no prompt at its top."),
        ("p.toml", '[prompt]\nsubset = "a cat"', "'subset' is not a list of tables."),
        ("p.toml", "[prompt]\nsteps = 5", "[prompt]: there is no setting 'steps'."),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_the_place(
    name: str, text: str | bytes, expected: str, tmp_path: Path
):
    with pytest.raises(UserError) as caught:
        read(tmp_path, text, name)
    assert str(tmp_path / name) in str(caught.value)
    assert expected in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"cannot read the prompt file '.*no such\.txt'"):
        read_prompt_file(tmp_path / "no such.txt")
