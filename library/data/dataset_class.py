"""Images and captions from a Python class of the user, as metadata."""

import importlib
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from library.config.errors import UserError
from library.data.metadata import Metadata, check_entry
from library.data.metadata_lines import path_and_entry

_EXPECTED = "Name a class, or a function, as package.module.Class; it is called with --train_data_dir."


def metadata_of_class(name: str, folder: Path) -> Metadata:
    """Return what the class `name` (package.module.Class), called with `folder`, yields, as metadata.

    Modules are looked for beside the script, in PYTHONPATH, and at last in the current folder. Raise `UserError` if
    there is no such class, if an item is not what a line of JSONL metadata may hold, or if there is none.
    """
    items = _class(name)(folder)
    if not isinstance(items, Iterable):
        raise UserError(f"--dataset_class: '{name}' yields nothing: it is {type(items).__name__}.", _EXPECTED)
    metadata: Metadata = {}
    for number, item in enumerate(items):
        where = f"'{name}', item {number}"
        key, entry = path_and_entry(dict(item) if isinstance(item, Mapping) else item, where)
        if key in metadata:
            raise UserError(f"{where}: an earlier item has the same image path '{key}'.", "Yield each image once.")
        check_entry(entry, where)
        metadata[key] = entry
    if not metadata:
        raise UserError(f"--dataset_class: '{name}' yields no images.", "Check what it does with --train_data_dir.")
    return metadata


def _class(name: str) -> Any:
    module_name, _, class_name = name.rpartition(".")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module_name), class_name) if module_name else None
    except (ImportError, AttributeError) as error:
        raise UserError(f"--dataset_class: '{name}' cannot be imported: {error}.", _EXPECTED) from error
    if not callable(found):
        raise UserError(f"--dataset_class: '{name}' is no class.", _EXPECTED)
    return found
