"""Each further kind of model captions photographs, and is asked in its manner."""

import pytest

from finetune import make_captions as script
from tests.annotation.conftest import PHOTOGRAPHS, captions_in, run
from tests.annotation.more_captioners import KINDS
from tests.annotation.tiny_captioners import WORDS
from tests.reliability.refusal import said_on_refusal

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_model_captions_photographs(kind, photographs, tmp_path, capsys):
    model = KINDS[kind](tmp_path / "model")
    flags = [f"--model_name_or_path={model}", "--max_new_tokens=6", "--min_new_tokens=3", "--batch_size=2"]
    assert run(script, photographs, *flags) == 0, capsys.readouterr().err
    written = captions_in(photographs, ".caption")
    assert sorted(written) == [f"{name}.caption" for name in PHOTOGRAPHS]
    words = {word for text in written.values() for word in text.split()}
    assert words <= {*WORDS, "ASSISTANT:", "Describe"}
    assert f"({kind}) on" in capsys.readouterr().out
    assert run(script, photographs, *flags, "--overwrite", "--do_sample", "--mixed_precision=bf16") == 0


def test_a_task_that_florence_does_not_know_and_a_prompt_for_a_model_that_takes_none(photographs, tmp_path, capsys):
    flags = [str(photographs), "--prompt=<CAPTION> and more"]
    florence, vit = KINDS["florence2"](tmp_path / "f"), KINDS["vision-encoder-decoder"](tmp_path / "v")
    said = said_on_refusal(script, [*flags, f"--model_name_or_path={florence}"], capsys)
    assert "florence2 cannot be asked '<CAPTION> and more'" in said
    said = said_on_refusal(script, [*flags, f"--model_name_or_path={vit}"], capsys)
    assert "vision-encoder-decoder takes no text, and --prompt is set" in said
