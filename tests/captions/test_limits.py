"""What fits into an encoder's limit, counted without torch."""

import json
import subprocess
import sys
from pathlib import Path

from library.captions.limits import reading
from library.captions.rules import CaptionRules

REPOSITORY = Path(__file__).parents[2]
GOLDEN = json.loads((REPOSITORY / "tests" / "golden" / "tokens.json").read_text(encoding="utf-8"))

# Prints the ids of each caption in so many chunks, how many tokens are counted, and which heavy libraries that took.
COUNT = """
import json, sys
from library.captions.limits import reading
from library.captions.rules import CaptionRules
from library.sdxl.tokenizers import PAD_L, token_ids, tokenize
found = []
for caption, num_chunks in json.load(sys.stdin):
    num_tokens = reading(caption, CaptionRules(max_token_length=75 * num_chunks)).num_tokens
    found.append([tokenize(caption, PAD_L, num_chunks).ids, num_tokens == len(token_ids(caption))])
heavy = {"torch", "transformers", "diffusers", "accelerate", "numpy", "PIL"} & sys.modules.keys()
print(json.dumps([found, sorted(heavy), len(sys.modules)]))
"""


def test_tokens_are_the_trainers_for_every_golden_row_without_its_libraries():
    rows = [
        (GOLDEN["captions"][int(index)], int(num_tokens) // 75, ids)
        for num_tokens, of_encoder in GOLDEN["ids"].items()
        for index, ids in of_encoder["L"].items()
    ]
    ended = subprocess.run(
        [sys.executable, "-c", COUNT],
        cwd=REPOSITORY,
        input=json.dumps([row[:2] for row in rows]),
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=True,
    )
    found, heavy, num_modules = json.loads(ended.stdout)
    assert heavy == []
    assert num_modules < 450
    assert found == [[ids, True] for _, _, ids in rows]
    assert len(rows) == 42 + 9 + 9


def test_the_words_that_do_not_fit_are_told_apart():
    text = " ".join(f"word{number}" for number in range(60))  # two or three tokens each
    read = reading(text, CaptionRules())
    assert read.kept + read.cut == text
    assert read.num_tokens > read.limit == 75
    assert reading(read.kept, CaptionRules()).num_tokens <= 75
    first_cut = read.cut.split()[0]
    assert reading(f"{read.kept} {first_cut}", CaptionRules()).num_tokens > 75
    assert reading("a short text", CaptionRules()).cut == ""
    assert reading("one " + "x" * 400, CaptionRules()).kept == "one"
