"""What a killed run leaves among the images is removed by the next run that writes there."""

from pathlib import Path

from library.config.leftovers import PARTIAL_SUFFIX, remove_leftovers, temporary_path
from library.data.image_columns import FoundImages
from library.data.text_cache import FOLDER_NAME
from library.data.training_set_options import TrainingSetOptions
from library.training.preparation import _folders_written


def test_leftovers_of_cached_texts_are_removed_from_the_folder_of_each_encoder(tmp_path: Path, monkeypatch):
    left = []
    for encoder in ("l-0123-float32", "g-4567-float32"):
        folder = tmp_path / FOLDER_NAME / encoder
        folder.mkdir(parents=True)
        monkeypatch.setattr("os.getpid", lambda: 2**22 + 1)  # no process has this number
        left.append(temporary_path(folder / "a.safetensors", PARTIAL_SUFFIX))
        left[-1].touch()
        monkeypatch.undo()
    options = TrainingSetOptions(train_data_dir=tmp_path, cache_text_encoder_outputs_to_disk=True)
    assert sorted(remove_leftovers(*_folders_written(options, FoundImages.of([])))) == sorted(left)
