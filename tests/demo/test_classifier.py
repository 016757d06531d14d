"""The classifier reads drawings rightly, and the figures count what they say."""

from demo.classifier import accuracies, drawn_examples, read_images, reading_of
from demo.figures import Figures, agreement, mean_figures


def test_drawings_that_it_has_never_seen_are_read_rightly(classifier):
    pictures, scenes = drawn_examples(60, seed=12345)
    # Of a thousand drawings 98 % or more of the answers are right (demo/README.md); of 60, four may be wrong.
    assert all(part > 0.93 for part in accuracies(classifier, pictures, scenes).values())


def test_one_picture_is_read_the_same_alone_and_among_others(classifier):
    pictures, _ = drawn_examples(5, seed=3)
    assert read_images(classifier, pictures)[2:3] == read_images(classifier, pictures[2:3])


def test_agreement_counts_the_four_questions_of_content_and_not_the_style():
    _, (one, other) = drawn_examples(2, seed=0)
    reading = reading_of(one)
    assert agreement(reading, reading) == 1
    same = sum(getattr(one, name) == getattr(other, name) for name in ("shape", "colour", "place", "background"))
    assert agreement(reading, reading_of(other)) == same / 4


def test_means_are_taken_figure_by_figure():
    assert mean_figures([Figures(0, 1, 0.5, 0), Figures(1, 1, 0, 0.5)]) == Figures(0.5, 1, 0.25, 0.25)
