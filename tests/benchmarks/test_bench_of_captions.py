"""The bench of captions measures what training does: it runs, and one of its sets is shuffled and dropped."""

import json

from benchmarks import captions


def test_the_bench_writes_the_figures_of_batches_and_of_both_starts(tmp_path, capsys):
    assert captions.main(["--num_images=6", "--num_rounds=1", f"--results={tmp_path}"]) == 0
    figures = json.loads((tmp_path / "captions_cpu.json").read_text(encoding="utf-8"))
    assert figures["ms_of_a_batch"].keys() == captions.BATCHES.keys()
    parts = [list(start) for start in figures["start_s"].values()]
    assert parts[0] == parts[1] and "tokenize" in parts[0]
    said = capsys.readouterr().out
    assert "captions dropped: both 10 %, L alone 5 %" in said
    assert (tmp_path / "captions_cpu.txt").read_text(encoding="utf-8") in said
