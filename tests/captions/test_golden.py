"""Final texts against those that sd-scripts 2026 made with recorded draws; each deviation is named with its reason."""

import json
from pathlib import Path

import pytest

from library.captions.draws import CaptionDraw
from library.captions.final_captions import CaptionPair, final_texts, variants_of
from library.captions.rules import CaptionDropout, CaptionRules, PairRules

RECORDED = json.loads((Path(__file__).parents[1] / "golden" / "caption_processing.json").read_text(encoding="utf-8"))
CASES = RECORDED["cases"]
OF_A_PAIR = ("caption_dropout_rate", "caption_dropout_every_n_epochs")

SUFFIX_LATER = "prefix and suffix are added to the line that was drawn, not to the first and the last one"
EMPTY_PIECE = "a piece that is empty in the end is not joined"
NO_SEPARATOR = "keep_tokens_separator reaches no encoder"
DEVIATIONS = {
    8: (SUFFIX_LATER, "pre dog post"),
    11: (EMPTY_PIECE, "b, a, c"),
    13: (EMPTY_PIECE, ""),
    17: (EMPTY_PIECE, "c, b, a"),
    19: (NO_SEPARATOR, "girl, blue, hair, eyes, smile, sky"),
    20: (NO_SEPARATOR, "a, c, b, d, e, f"),
    62: (SUFFIX_LATER, "best, char a, blue coat, by x, end"),
    63: (SUFFIX_LATER, "best, char a, hat,scarf, snow, house, red coat, tree, by x, end"),
}
"""Number of a case, why it differs, and what is made of it here."""


class RecordedNumbers:
    """The draws of a case as the numbers by which the same is chosen; each can be had once, and for both encoders."""

    def __init__(self, case):
        draws, settings = list(case["draws"]), case["settings"]
        self.numbers = {}
        if settings.get("caption_dropout_rate"):
            self.numbers["caption_dropout"] = [draws.pop(0)["random"]]
        choices = [(index + 0.5) / count for count, index in (draw["choice"] for draw in draws if "choice" in draw)]
        if settings.get("enable_wildcard") and "\n" in case["caption"]:
            self.numbers["line"] = [choices.pop(0)]
        if choices:
            self.numbers["wildcard"] = choices
        for order in (draw["shuffle"] for draw in draws if "shuffle" in draw):
            self.numbers["shuffle"] = [order.index(piece) / len(order) for piece in range(len(order))]
        dropped = [draw["random"] for draw in draws if "random" in draw]
        if dropped:
            self.numbers["tag_dropout"] = dropped
        self.used = set()

    def __call__(self, draw, stream, operation, count):
        assert stream == "both"
        self.used.add(operation)
        recorded = self.numbers.get(operation, [])
        assert len(recorded) == count, operation
        return recorded


def rules_of(case):
    settings = {**RECORDED["defaults"], **case["settings"]}
    dropout = CaptionDropout(**{name: settings.pop(name) for name in OF_A_PAIR})
    rules = CaptionRules(**{name: "" if value is None else value for name, value in settings.items()})
    return PairRules(rules, rules, dropout, shared=True)


def test_all_recorded_cases_are_here():
    assert len(CASES) == 66
    assert {reason for reason, _ in DEVIATIONS.values()} == {SUFFIX_LATER, EMPTY_PIECE, NO_SEPARATOR}


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: f"{number}-{CASES[number]['group']}")
def test_texts_are_those_of_the_reference(number):
    case = CASES[number]
    recorded = RecordedNumbers(case)
    draw = CaptionDraw(0, case["epoch"], "key", 0, case["step"], case["max_train_steps"])
    lines = variants_of(case["caption"])
    texts = final_texts(CaptionPair(lines, lines), rules_of(case), draw, recorded)
    assert texts.text_l == texts.text_g
    assert texts.dropped_l == texts.dropped_g == (case["group"] == "caption_dropout" and not case["text"])
    assert recorded.used == set(recorded.numbers)
    # In June 2026 the reference changed to joining tags with the caption separator; so are they here.
    reference = case.get("text_june_2026", case["text"])
    if number in DEVIATIONS:
        _, ours = DEVIATIONS[number]
        assert texts.text_l == ours != reference
    else:
        assert texts.text_l == reference
