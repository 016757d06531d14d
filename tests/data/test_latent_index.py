"""What is remembered of latents: files of known size and time are not read, whatever has changed is noticed."""

import json
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from library.config.errors import UserError
from library.data import latent_entries, latent_index
from library.data.columns import Texts
from library.data.fingerprints import Fingerprints
from library.data.latent_cache import cache_path, read_cache, read_with_place
from library.data.latent_entries import Entries, states_of
from library.data.latent_index import index_path, read_index
from library.sdxl.sizes import Size
from tests.data.conftest import TrainingFolder
from tests.data.test_single_reads import counting_reads

LONG_AGO = 1_700_000_000_000_000_000


@pytest.fixture
def old_set(folder):
    """A folder of three images with latents, none of them young, and the options of a set of them, read once."""
    for name in "abc":
        age(folder.add(f"{name}.png"), folder.add_cache(folder.images / f"{name}.png"))
    folder.read(list("abc"))
    return folder


def age(*paths, whole_second=False):
    """Let files be old; files of other names have other times, unless these are whole seconds."""
    for path in paths:
        time = LONG_AGO if whole_second else LONG_AGO + int.from_bytes(path.name.encode()[:3])
        os.utime(path, ns=(time, time))


def read_counting(folder: TrainingFolder, **flags):
    """The set, and which of its images and latents were opened for it."""
    options = folder.options(list("abc"), **flags)
    with counting_reads() as reads:
        images = folder.read_with(options, "vae")
    return images, sorted(os.path.basename(path) for path in reads if path.endswith((".npz", ".png")))  # noqa: PTH119


def test_a_second_start_opens_neither_images_nor_latents_and_finds_the_same(old_set):
    images, opened = read_counting(old_set)
    assert opened == []
    shutil.rmtree(old_set.path / "meta.json.index")
    again, opened = read_counting(old_set)
    assert opened == ["a.npz", "a.png", "b.npz", "b.png", "c.npz", "c.png"]
    assert [replace_place(image) for image in images] == [replace_place(image) for image in again]
    assert dict(Fingerprints(images)) == dict(Fingerprints(again))


def replace_place(image):
    return replace(image, place=None), image.place["offsets"].tolist()


def test_work_at_a_second_start_is_a_state_of_each_file_however_many_there_are(folder, monkeypatch):
    counts, states_of_files = {}, latent_entries.states_of_files
    for number in (10, 40):
        keys = [f"{key:02}" for key in range(number)]
        for key in keys:
            age(folder.add(f"{key}.png"), folder.add_cache(folder.images / f"{key}.png"))
        options = folder.options(keys)
        folder.read_with(options, "vae")
        stats = []
        monkeypatch.setattr(
            latent_entries, "states_of_files", lambda paths, to=stats: to.extend(paths) or states_of_files(paths)
        )
        with counting_reads() as reads:
            folder.read_with(options, "vae")
        monkeypatch.undo()
        counts[number] = sum(reads.values()), len(stats)
    assert counts[10][0] == counts[40][0]
    assert [stats for _, stats in counts.values()] == [20, 80]


@pytest.mark.parametrize("change", ["image", "latents", "moved", "missing"])
def test_what_has_changed_since_is_noticed(old_set, capsys, change):
    image, cache = old_set.images / "b.png", old_set.images / "b.npz"
    if change == "image":
        old_set.add("b.png", old_set.bucket)
    elif change == "latents":
        old_set.add_cache(image, image_digest="other")
    elif change == "moved":
        (old_set.images / "c.npz").replace(cache)
    else:
        cache.unlink()
    capsys.readouterr()
    images, opened = read_counting(old_set)
    assert images[0].has_latents and not images[1].has_latents
    assert images[2].has_latents == (change != "moved")
    assert "a.npz" not in opened
    assert ("b.npz' does not fit: the image has changed" in capsys.readouterr().err) == (change != "missing")


def test_an_edit_of_the_same_size_and_time_is_found_when_all_are_checked(old_set, capsys):
    image = old_set.images / "b.png"
    content = image.read_bytes()
    image.write_bytes(content[:-20] + bytes(20))
    age(image)
    images, opened = read_counting(old_set)
    assert images.all_have_latents and opened == []  # what docs/reliability.md says of the index
    images, opened = read_counting(old_set, check_latents=True)
    assert [image.has_latents for image in images] == [True, False, True]
    assert "b.npz' does not fit: the image has changed" in capsys.readouterr().err


def test_files_of_whole_seconds_that_change_places_are_noticed(old_set):
    caches = [old_set.images / f"{name}.npz" for name in "abc"]
    old_set.add_cache(old_set.images / "b.png", image_digest="of c")
    age(*caches, whole_second=True)
    old_set.read(list("abc"))
    assert read_counting(old_set)[1] == ["b.npz", "b.png"]  # which does not fit
    caches[1].rename(caches[2].with_suffix(".moved"))
    caches[0].rename(caches[1])
    caches[2].with_suffix(".moved").rename(caches[0])
    images, opened = read_counting(old_set)
    assert opened == ["a.npz", "a.png", "b.npz", "b.png"]
    assert [image.has_latents for image in images] == [False, False, True]


def test_files_that_were_young_when_they_were_read_are_read_again(old_set):
    old_set.add_cache(old_set.images / "b.png")
    assert read_counting(old_set)[1] == ["b.npz", "b.png"]  # another time
    assert read_counting(old_set)[1] == ["b.npz", "b.png"]  # it may have been written twice within that time
    age(old_set.images / "b.npz")
    read_counting(old_set)
    assert read_counting(old_set)[1] == []


@pytest.mark.parametrize("part", ["about", "entries", "names", "ends"])
@pytest.mark.parametrize("damage", ["cut", "bit", "gone", "text"])
def test_a_damaged_index_is_named_and_made_again(old_set, capsys, part, damage):
    index = old_set.path / "meta.json.index"
    [path] = index.glob(f"{part}*")
    content = path.read_bytes()
    changed = {
        "cut": content[: len(content) // 2],
        "bit": content[:-30] + bytes([content[-30] ^ 4]) + content[-29:],
        "text": b"[]",
    }
    path.unlink()
    if damage != "gone":
        path.write_bytes(changed[damage])
    capsys.readouterr()
    assert len(read_counting(old_set)[1]) == 6
    assert "the index '" in capsys.readouterr().err
    assert read_counting(old_set)[1] == []


def test_an_index_of_another_version_is_made_again(old_set, capsys):
    about = old_set.path / "meta.json.index" / "about.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"format": 99}))
    assert len(read_counting(old_set)[1]) == 6
    assert "another version" in capsys.readouterr().err


def test_a_set_that_was_moved_with_its_times_keeps_its_index(old_set, tmp_path):
    moved = TrainingFolder(tmp_path / "elsewhere")
    shutil.copytree(old_set.path, moved.path)
    assert read_counting(moved)[1] == []


def test_latents_of_another_vae_are_stale_by_the_index_too(old_set, capsys):
    images = old_set.read_with(old_set.options(["a"]), "other")
    assert not images[0].has_latents
    assert "a.npz' does not fit: it was made with another VAE" in capsys.readouterr().err


def test_a_part_of_a_set_leaves_the_entries_of_the_others(old_set):
    old_set.add_cache(old_set.images / "a.png")
    old_set.read(["a"])
    assert sorted(read_index(old_set.path / "meta.json.index").names) == ["a.npz", "b.npz", "c.npz"]


def test_of_a_folder_with_an_index_only_older_columns_are_removed(old_set):
    index = old_set.path / "meta.json.index"
    (index / "mine.npy").write_bytes(b"numbers")
    old_set.add_cache(old_set.images / "a.png")
    old_set.read(list("abc"))
    assert len(list(index.glob("*-*.npy"))) == 3
    assert (index / "mine.npy").read_bytes() == b"numbers"


def test_an_index_that_cannot_be_written_is_reported(old_set, capsys):
    index = old_set.path / "meta.json.index"
    shutil.rmtree(index)
    index.write_text("a file in its place")
    images, _ = read_counting(old_set)
    assert images.all_have_latents
    assert "made again" in capsys.readouterr().err


def test_starts_that_write_an_index_at_once_lose_no_entry_of_each_other(old_set):
    """Several threads, which lock each other out as processes do, have read different images and write them."""
    index, names = old_set.path / "meta.json.index", "abcdef"
    shutil.rmtree(index)
    barrier = threading.Barrier(len(names))

    def save(name):
        image = old_set.add(f"{name}.png")
        cached, place = read_with_place(old_set.add_cache(image))
        columns = (Texts.of([str(path)]) for path in (cache_path(image), image, ""))
        entries = Entries(index, old_set.images, *columns)
        entries.note(0, cached, place, states_of(image, None))
        barrier.wait()
        entries.save()

    with ThreadPoolExecutor(len(names)) as threads:
        list(threads.map(save, names))
    assert sorted(read_index(index).names) == [f"{name}.npz" for name in names]
    assert len(list(index.glob("*-*.npy"))) == 3


def test_an_index_that_is_replaced_while_it_is_read_is_read_as_it_is_then(old_set, capsys, monkeypatch):
    index, load = old_set.path / "meta.json.index", np.load
    whole = read_index(index)

    def replaced_before(path, **named):
        monkeypatch.setattr(np, "load", load)
        latent_index.write_index(index, whole.names, whole.entries, whole.texts)
        return load(path, **named)

    monkeypatch.setattr(np, "load", replaced_before)
    capsys.readouterr()
    assert read_index(index).names == whole.names
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("flip", [False, True])
def test_a_visit_reads_the_numbers_of_the_file(old_set, flip):
    random = np.random.default_rng(1)
    flipped = random.normal(size=(4, 6, 10)).astype(np.float32)
    cache = old_set.add_cache(old_set.images / "a.png", latents_flipped=flipped)
    (image,) = old_set.read(["a"])
    np.testing.assert_array_equal(image.sample(flipped=flip)[0], read_cache(cache).in_direction(flipped=flip))
    old_set.add_cache(old_set.images / "a.png", image_digest="other", latents_flipped=flipped)
    with pytest.raises(Exception, match="was replaced while training: it holds latents of another image"):
        image.sample(flipped=flip)


def test_a_flipped_bit_in_a_known_file_is_not_trained_on(old_set):
    cache = old_set.images / "b.npz"
    image = old_set.read(["b"])[0]
    content = bytearray(cache.read_bytes())
    content[int(image.place["offsets"][0]) + 100] ^= 1
    cache.write_bytes(content)
    age(cache)
    image = old_set.read(["b"])[0]
    assert image.has_latents  # its size and its time are those of the index
    with pytest.raises(UserError, match=r"b\.npz' is not a usable latent cache \(Bad CRC-32"):
        image.sample(flipped=False)


def test_the_index_of_images_without_metadata_is_in_their_folder(folder):
    from tests.training_images import subset_of

    assert index_path(subset_of()).name == "meta.json.index"
    assert index_path(subset_of(dataset_class="a.B", dataset=0)).name == "meta.json.index"


def test_images_of_many_sizes_are_taken_over_as_they_were_read(folder):
    """Latents of one kind, of images that were cropped elsewhere, with and without a true crop, and of a stranger."""
    keys = [f"{number:02}" for number in range(12)]
    for number, key in enumerate(keys):
        facts = {"original_size": Size(100 + number, 60), "resized_size": Size(80 + number, 48)}
        if number % 3 == 1:
            facts = {"resized_size": None, "crop_ltrb": (0.5, number, 79.5, 48.0)}
        if number % 3 == 2:
            facts = {"resized_size": None, "image_digest": None, "original_size": Size(100 + number // 6, 60)}
        age(folder.add(f"{key}.png"), folder.add_cache(folder.images / f"{key}.png", **facts))
    for legacy in (False, True):
        options = folder.options(keys, legacy_crop_coords=legacy)
        shutil.rmtree(folder.path / "meta.json.index", ignore_errors=True)
        read = folder.read_with(options, "vae")
        with counting_reads() as reads:
            again = folder.read_with(options, "vae")
        assert not any(path.endswith((".png", ".npz")) for path in reads)
        assert list(map(replace_place, read)) == list(map(replace_place, again))


def test_rows_with_the_same_values_are_found_though_their_hashes_meet(monkeypatch):
    columns = [np.array([3, 1, 3, 2, 1]), np.array([0, 5, 0, 5, 5])]
    expected = [[0, 2], [1, 4], [3]]
    assert sorted(rows.tolist() for rows in latent_entries._alike(columns)) == expected
    monkeypatch.setattr(latent_entries, "_MULTIPLIER", np.uint64(0))
    assert sorted(rows.tolist() for rows in latent_entries._alike(columns)) == expected
