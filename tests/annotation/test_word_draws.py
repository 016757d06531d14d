"""Words are drawn by their probability, from numbers that depend on seed, image and place alone."""

import torch

from library.annotation.word_draws import WordDraws, drawn_number

SCORES = torch.log(torch.tensor([0.0, 0.5, 0.2, 0.3]))


def drawn(seed, keys, num_words):
    draws = WordDraws(seed, keys)
    return [
        draws(torch.zeros(len(keys), 1), SCORES.expand(len(keys), -1)).argmax(-1).tolist() for _ in range(num_words)
    ]


def test_the_words_of_an_image_do_not_depend_on_its_neighbours():
    together = drawn(3, ["a", "b", "c"], 20)
    alone = drawn(3, ["b"], 20)
    assert [row[1] for row in together] == [row[0] for row in alone]
    assert alone != drawn(4, ["b"], 20)


def test_words_come_as_often_as_is_probable():
    words = [word for row in drawn(0, [str(number) for number in range(1000)], 4) for word in row]
    shares = [words.count(word) / len(words) for word in range(4)]
    assert shares[0] == 0  # never what is impossible
    assert all(abs(share - expected) < 0.03 for share, expected in zip(shares, [0, 0.5, 0.2, 0.3], strict=True))


def test_a_number_is_below_one():
    assert all(0 <= drawn_number(1, "key", position) < 1 for position in range(1000))
