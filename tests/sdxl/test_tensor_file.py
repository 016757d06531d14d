"""Files of named tensors: what safetensors and torch make of ours, and what we make of broken ones."""

import json
import pickle
import weakref
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library.config.errors import UserError
from library.sdxl.tensor_file import TensorToWrite, open_tensors, write_pickle, write_safetensors

MIXED = {
    "zero_dimensions.logit_scale": torch.tensor(4.6, dtype=torch.float16),
    "odd.number.of.bytes": torch.arange(7, dtype=torch.uint8),
    "wide": torch.linspace(-1, 1, 15, dtype=torch.float64).reshape(3, 5),
    "single": torch.linspace(-1, 1, 15).reshape(5, 3),
    "half": torch.linspace(-1, 1, 3, dtype=torch.float16),
    "brain": torch.linspace(-1, 1, 3, dtype=torch.bfloat16),
    "long": torch.arange(4),
    "int": torch.arange(3, dtype=torch.int32),
    "empty": torch.empty(0, 4),
    "transposed": torch.arange(6.0).reshape(2, 3).T,
    "ラベル": torch.ones(1),
}


def to_write(tensors):
    """The tensors as a writer takes them, made when their turn comes."""
    return [TensorToWrite(name, tuple(t.shape), t.dtype, partial(torch.clone, t)) for name, t in tensors.items()]


def assert_same(tensors, expected):
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == expected[name].dtype, name
        assert tensor.shape == expected[name].shape, name
        assert torch.equal(tensor, expected[name]), name


def header_of(path):
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), length, len(content)


@pytest.mark.parametrize("metadata", [{}, {"modelspec.title": '猫 "quoted"', "note": ""}])
def test_safetensors_reads_what_is_written(tmp_path, metadata):
    path = tmp_path / "mixed.safetensors"
    write_safetensors(path, to_write(MIXED), metadata)
    assert_same(load_file(path), MIXED)
    with safe_open(path, framework="pt") as file:
        assert (file.metadata() or {}) == metadata


@pytest.mark.parametrize("name", ["model.sft", "model", "model.ckpt"])
def test_a_safetensors_file_of_another_name_is_known_by_its_first_bytes(tmp_path, name):
    path = tmp_path / name
    write_safetensors(path, to_write(MIXED), {"note": "1"})
    with open_tensors(path) as reader:
        assert_same({each: reader.get(each) for each in reader.shapes}, MIXED)
        assert reader.metadata == {"note": "1"}


def test_every_tensor_begins_at_a_multiple_of_its_element_size(tmp_path):
    path = tmp_path / "mixed.safetensors"
    write_safetensors(path, to_write(MIXED), {})
    header, length, num_bytes = header_of(path)
    del header["__metadata__"]
    assert length % 8 == 0
    assert all(header[name]["data_offsets"][0] % MIXED[name].dtype.itemsize == 0 for name in header)
    spans = sorted(entry["data_offsets"] for entry in header.values())
    assert [begin for begin, _ in spans] == [0, *(end for _, end in spans[:-1])]
    assert spans[-1][1] == num_bytes - 8 - length


def test_tensors_are_written_in_the_precision_asked_for(tmp_path):
    path = tmp_path / "half.safetensors"
    exact = torch.tensor([1.0, 1 / 3, 1e-5])
    write_safetensors(path, [TensorToWrite("weight", (3,), torch.bfloat16, lambda: exact)], {})
    assert_same(load_file(path), {"weight": exact.bfloat16()})


def test_each_tensor_is_made_once_and_only_after_the_one_before_it_is_gone(tmp_path):
    alive = []
    made = []

    def make(name):
        assert not any(memory() is not None for memory in alive)
        memory = np.ones(1000, dtype=np.float32)
        alive.append(weakref.ref(memory))
        made.append(name)
        return torch.from_numpy(memory)

    names = ["first", "second", "third"]
    tensors = [TensorToWrite(name, (1000,), torch.float16, partial(make, name)) for name in names]
    write_safetensors(tmp_path / "model.safetensors", tensors, {})
    assert made == names


def test_safetensors_own_files_are_read_with_shapes_and_metadata(tmp_path):
    path = tmp_path / "reference file.safetensors"
    expected = {name: tensor.contiguous() for name, tensor in MIXED.items()}
    save_file(expected, path, {"author": "é"})
    with open_tensors(path) as reader:
        assert reader.metadata == {"author": "é"}
        assert reader.shapes == {name: tuple(tensor.shape) for name, tensor in expected.items()}
        assert_same({name: reader.get(name) for name in reader.shapes}, expected)


@pytest.mark.parametrize("wrap", [lambda tensors: tensors, lambda tensors: {"state_dict": tensors, "epoch": 3}])
def test_pickles_are_read_with_and_without_a_state_dict_around_the_tensors(tmp_path, wrap):
    path = tmp_path / "model.ckpt"
    torch.save(wrap(MIXED), path)
    with open_tensors(path) as reader:
        assert reader.metadata == {}
        assert_same({name: reader.get(name) for name in reader.shapes}, MIXED)


def test_a_written_pickle_holds_the_tensors_as_state_dict_and_gives_its_metadata_back(tmp_path):
    path = tmp_path / "model.ckpt"
    write_pickle(path, to_write(MIXED), {"modelspec.title": "猫"})
    assert_same(torch.load(path, weights_only=True)["state_dict"], MIXED)
    with open_tensors(path) as reader:
        assert reader.metadata == {"modelspec.title": "猫"}


class Trap:
    """Pickles as an order to make a folder: what a malicious checkpoint does, made harmless."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return Path.mkdir, (self.folder,)


def save_before_zip_files(content, path):
    """What torch wrote before release 1.6: a bare pickle."""
    torch.save(content, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    ("save", "problem"),
    [(torch.save, "could run code when it is opened"), (save_before_zip_files, "not a whole checkpoint")],
)
def test_a_pickle_with_code_in_it_is_refused_and_the_code_not_run(tmp_path, save, problem):
    path, trace = tmp_path / "evil.ckpt", tmp_path / "was here"
    save({"state_dict": {"weight": torch.ones(1)}, "callback": Trap(trace)}, path)
    with pytest.raises(UserError, match=rf"evil\.ckpt' .*{problem}.* a \.safetensors file"), open_tensors(path):
        pass
    assert not trace.exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt", ".pt"])
@pytest.mark.parametrize(
    "content", [b"", b"<!DOCTYPE html><html>", bytes(1000), b"PK\x03\x04" + bytes(99), pickle.dumps({"a": 1})]
)
def test_a_file_that_is_no_checkpoint_is_an_error_that_names_it(tmp_path, suffix, content):
    path = tmp_path / f"page{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"page\{suffix}'"), open_tensors(path):
        pass


@pytest.mark.parametrize(("suffix", "write"), [(".safetensors", write_safetensors), (".ckpt", write_pickle)])
def test_a_file_cut_short_is_an_error_that_names_it(tmp_path, suffix, write):
    path = tmp_path / f"cut{suffix}"
    write(path, to_write(MIXED), {})
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match=rf"cut\{suffix}'"), open_tensors(path):
        pass


@pytest.mark.parametrize("name", ["missing.safetensors", "folder"])
def test_where_there_is_no_file_the_error_says_so(tmp_path, name):
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=rf"there is no file '.*{name}'"), open_tensors(tmp_path / name):
        pass


@pytest.mark.parametrize(("suffix", "write"), [(".safetensors", write_safetensors), (".ckpt", write_pickle)])
def test_a_tensor_that_cannot_be_made_leaves_the_old_file_as_it_was(tmp_path, suffix, write):
    def fail():
        raise MemoryError

    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"old")
    tensors = [*to_write(MIXED), TensorToWrite("last", (1,), torch.float16, fail)]
    with pytest.raises(MemoryError):
        write(path, tensors, {})
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(("suffix", "write"), [(".safetensors", write_safetensors), (".ckpt", write_pickle)])
def test_a_full_disk_is_an_error_that_names_the_file_and_leaves_the_old_one(tmp_path, full_disk, suffix, write):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"old")
    large = to_write({"large": torch.zeros(1_000_000)})
    with pytest.raises(UserError, match=rf"cannot write '.*model\{suffix}': File too large"), full_disk:
        write(path, large, {})
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
