"""The bench of captions measures what training does: it runs, and one of its sets is shuffled and dropped."""

import json

from benchmarks import captions


def test_the_bench_writes_the_figures_of_batches_and_of_both_starts(tmp_path, capsys):
    assert captions.main(["--num_images=6", "--num_rounds=1", f"--results={tmp_path}"]) == 0
    batches, starts = (
        json.loads((tmp_path / f"captions_{part}_cpu.json").read_text(encoding="utf-8"))[part]
        for part in ("batch", "start")
    )
    assert batches.keys() == captions.BATCHES.keys()
    assert starts["plain"].keys() == starts["varied"].keys() and "tokenize" in starts["plain"]
    said = capsys.readouterr().out
    assert "captions dropped: both 10 %, L alone 5 %" in said
    assert (tmp_path / "captions_start_cpu.txt").read_text(encoding="utf-8") in said
