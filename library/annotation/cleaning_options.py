"""The flags of cleaning: which captions, and which rules in which order."""

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from library.annotation.cleaning_rules import RULES, Rule, check_rule
from library.annotation.image_options import extension_problem
from library.annotation.tag_texts import SEPARATOR, split_tags
from library.config.errors import UserError
from library.config.options import option, positional

_SWITCHES = ("underscores_to_spaces", "booru", "deduplicate", "sort")


@dataclass(frozen=True)
class CleaningOptions:
    """Which captions are cleaned."""

    _argument_group_name: ClassVar[str] = "Captions"

    captions: Path = positional("Folder of images with caption files beside them, or a metadata file.")
    encoder: str | None = option(None, "The encoder whose captions are cleaned.", choices=("l", "g"))
    caption_extension: str | None = option(
        None, "Suffix of the caption files. Not given: .txt for L, .caption for G.", aliases=["--caption_extention"]
    )
    other_caption_extension: str | None = option(
        None, "Suffix of the files that --move_tags moves to. Not given: .caption for G, .txt for L."
    )
    recursive: bool = option(False, "Include the images of subfolders.")
    out_json: Path | None = option(None, "Metadata file to write. Not given: the one that is read.")
    caption_separator: str = option(SEPARATOR, "What stands between two tags, spaces included.")
    dry_run: bool = option(False, "Show each caption before and after, and change nothing.")

    def problems(self) -> Iterator[str]:
        """Yield a sentence for each value that cannot work."""
        if self.encoder is None:
            yield "--encoder is missing: --encoder l or --encoder g."
        if not self.captions.exists():
            yield f"there is nothing at '{self.captions}'; pass the folder of the images, or a metadata file."
        for extension in (self.caption_extension, self.other_caption_extension):
            if extension is not None and (problem := extension_problem(extension)):
                yield problem
        if self.out_json is not None and self.captions.is_dir():
            yield "--out_json is for metadata, and a folder is cleaned. Leave it off."
        if not self.caption_separator.strip():
            yield "--caption_separator must hold a character that is no space: tags hold spaces."


@dataclass(frozen=True)
class RuleOptions:
    """What is done, in this order."""

    _argument_group_name: ClassVar[str] = "Rules, in the order in which they are applied"

    rules: Path | None = option(None, "TOML file of rules, applied in its order before those of the flags.")
    find: list[str] = option([], "Texts to replace, each with the text of --replace at the same place.")
    replace: list[str] = option([], 'What to write in their place; "" takes them out.')
    regex: bool = option(False, "The texts of --find are regular expressions, as Python's module re has them.")
    remove_underscore: bool = option(False, "Write spaces for the underscores of tags, but in faces such as ^_^.")
    booru_rules: bool = option(False, "Apply the rules of sd-scripts for booru tags.")
    remove_tags: str = option("", "Tags to remove, separated by commas.")
    move_tags: str = option("", "Tags to move to the captions of the other encoder, separated by commas.")
    deduplicate: bool = option(False, "Keep the first of equal tags.")
    sort: bool = option(False, "Sort the tags by the alphabet.")
    prefix: str = option("", "Text to set before each caption that does not begin with it, spaces included.")

    def problems(self) -> Iterator[str]:
        """Yield a sentence for each value that cannot work."""
        if len(self.find) != len(self.replace):
            yield (
                f"--find has {len(self.find)} texts and --replace {len(self.replace)}: each needs its counterpart; "
                '"" takes a text out.'
            )
            return
        try:
            if not self.in_order(SEPARATOR):
                yield "there is nothing to do: no rule is set. See --help."
        except UserError as error:
            yield str(error)

    def in_order(self, separator: str) -> list[Rule]:
        """Return all rules. Raise `UserError` for one that cannot be applied."""
        rules = [] if self.rules is None else read_rules(self.rules)
        kind = "regex" if self.regex else "replace"
        rules += [Rule(kind, find, replace) for find, replace in zip(self.find, self.replace, strict=True)]
        rules += [Rule("underscores_to_spaces")] if self.remove_underscore else []
        rules += [Rule("booru")] if self.booru_rules else []
        for name, text in (("remove", self.remove_tags), ("move", self.move_tags)):
            rules += [Rule(name, tags=tuple(split_tags(text, separator)))] if text else []
        rules += [Rule(name) for name in ("deduplicate", "sort") if getattr(self, name)]
        rules += [Rule("prefix", replace=self.prefix)] if self.prefix else []
        for rule in rules:
            check_rule(rule, f"--{rule.kind}" if rule.kind not in ("replace", "regex") else "--find")
        return rules


@dataclass(frozen=True)
class UndoOptions:
    """Which cleaning is undone."""

    _argument_group_name: ClassVar[str] = "Undo"

    undo: Path = option(Path(), "Undo file of a cleaning: every byte that it changed is restored.")

    def problems(self) -> Iterator[str]:
        """Yield a sentence for each value that cannot work."""
        if not self.undo.is_file():
            yield f"--undo: there is no file '{self.undo}'; check the path."


def read_rules(path: Path) -> list[Rule]:
    """Return the rules of a TOML file, each a table `[[rule]]`. Raise `UserError` naming the rule that is wrong."""
    try:
        content = tomllib.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror or error}.", "Check the path of --rules.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"'{path}' is no TOML file: {error}.", "Correct it, or save it as UTF-8.") from error
    tables = content.get("rule")
    if set(content) != {"rule"} or not isinstance(tables, list):
        raise UserError(f"'{path}': expected tables [[rule]] and nothing else.", "Write one for each rule.")
    rules = []
    for number, table in enumerate(tables, start=1):
        where = f"'{path}', rule {number}"
        rules.append(_rule_of(table, where))
        check_rule(rules[-1], where)
    return rules


def _rule_of(table: Any, where: str) -> Rule:
    if isinstance(table, Mapping):
        keys, texts = set(table), all(isinstance(value, str) for value in table.values())
        if keys in ({"find", "replace"}, {"regex", "replace"}) and texts:
            kind = "regex" if "regex" in table else "replace"
            return Rule(kind, table.get("find", table.get("regex")), table["replace"])
        if keys == {"prefix"} and texts:
            return Rule("prefix", replace=table["prefix"])
        name = next(iter(keys), "")
        if name in ("remove", "move") and keys == {name} and _are_tags(table[name]):
            return Rule(name, tags=tuple(table[name]))
        if name in _SWITCHES and keys == {name} and table[name] is True:
            return Rule(name)
    raise UserError(
        f"{where}: expected find and replace, regex and replace, tags as remove or move, a text as prefix, or "
        f"{', '.join(f'{name} = true' for name in RULES if name in _SWITCHES)}; got {table!r}.",
        "Write one of them in each [[rule]].",
    )


def _are_tags(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(tag, str) and tag.strip() for tag in value)
