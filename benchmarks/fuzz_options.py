"""Give every script pairs of absurd option values: each ends with success, or with status 2 and one line of error.

    python benchmarks/fuzz_options.py [--seconds 600] [--seed 0]

Each case is one command line, or one file of options, of a script: what every run needs, and two options with values
from a list of absurd ones. It is parsed and checked. Commands of the trainer that pass are also run for one step, on
the tiny SDXL and in a process that ends after a minute. The result goes to benchmarks/results/fuzz_options.{json,txt}.
Needs POSIX.
"""

import argparse
import contextlib
import io
import itertools
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere, find library/

import tomli_w
import torch
from PIL import Image

import sdxl_train
from benchmarks.fuzz_outcomes import outcome_in_process, outcome_of
from benchmarks.result_files import RESULTS, machine_line, write_result
from demo.random_sdxl import TINY, write_random_sdxl
from finetune import prepare_buckets_latents, sdxl_merge_captions_g_to_metadata, sdxl_merge_captions_l_to_metadata
from library.config.errors import exits_on_user_error
from library.config.kohya_spellings import PREPARE_SPELLINGS, TRAINER_SPELLINGS
from library.config.options import Option, options_of, parse_options
from library.config.spellings import Spellings
from library.training.run_options import TrainingOptions

ABSURD = (
    *("", " ", "0", "-0", "1", "-1", "2", "7", "0.5", "-0.5", "1.5", "1e-300", "1e300", "1e400", "-1e400", "nan"),
    *("inf", "-inf", "None", "none", "null", "true", "false", "True", "yes", "on", "0x10", "1_000", "٣", "½"),
    *("1e", "--", "-", "-x", str(2**31), str(2**32), str(2**63), str(2**64), str(10**12), str(10**18), "9" * 400),
    *("9" * 5000, "1" + "0" * 309, "a", "ä", "猫", "\U0001f600", "a b", " a ", "a,b", ",", ";", "'", '"', "a\nb"),
    *("a\tb", "a\x1b[2Jb", "\u202eabc", "a\0b", "\ud800", "a" * 300, "a" * 5000, ".", "..", "../..", "/", "//"),
    *("/dev/null", "~", "C:\\a", "NUL", "con.txt", "*", "?", "a/b", "images", "images/01.png", "meta_lat.json"),
    *("model.safetensors", "nothing", "[]", "{}", "[1]", "1,1", "64,64", "0,0", "-64,64", "64,64,64"),
    *("10000000,64", "64x64", "1024,1024", "a=1", "a=", "=1", "betas=1", "betas=(1,2)", "betas=[]"),
    *("weight_decay=nan", "foreach=True", "fused=True", "amsgrad=False,", "lr=1", "eps=None"),
    *("a=__import__('os')", "a=" + "(" * 200, "latest", "stop", "euler_a", "l2", "bf16", "fp16", "no", "all"),
    *("AdamW8bit", "Prodigy", "Adafactor", "torch.optim.SGD", "torch.optim.Muon", "torch.nn.Linear", "os.system"),
    *("setup.X", "a.b.C", "cosine", "constant_with_warmup", "ckpt", "diffusers", ",".join(["1e-6"] * 23)),
    *(",".join(["nan"] * 23), "tensorboard"),
)
FILE_VALUES: tuple[object, ...] = (
    *(True, False, 0, 1, -1, 10**18, 2**63 - 1, 0.5, 1e300, float("nan"), float("inf")),
    *([], [[]], [1, "a"], ["a=1"], [""], {}, {"a": 1}, ["a", True], "None", "", "1", "0.5", "true"),
)
_ESCAPES = ("/", "\\", "~", "..")
"""In values that could name a path outside of the folder: such commands are checked, not run."""
_NOT_RUN = ("--torch_compile", "--config_file")  # the first compiles for minutes
_SECONDS_OF_A_RUN = 60.0
_ENDS = ("--output_config",)  # writes a file and ends: no command to check


@dataclass(frozen=True)
class Script:
    """A script with what its commands need, and how its options are checked without running it."""

    name: str
    module: ModuleType
    needed: Sequence[str]
    spellings: Spellings
    conflicts: Callable[..., Iterator[str]] | None = None

    @property
    def options(self) -> list[Option]:
        """All its options but the positional ones."""
        return [each for cls in self.module.OPTION_CLASSES for each in options_of(cls) if not each.is_positional]

    @property
    def flags(self) -> list[str]:
        """Its flags, and those that it knows from other trainers."""
        known = [name for each in self.options for name in (each.flag, *each.aliases)]
        return sorted({*known, *self.spellings.replaced, *self.spellings.refused} - set(_ENDS))

    def check(self, argv: Sequence[str]) -> int:
        """Parse and check a command line as the script does; return the exit status."""

        @exits_on_user_error
        def main(argv: Sequence[str] | None = None) -> int:
            more: dict[str, Any] = {} if self.conflicts is None else {"conflicts": self.conflicts}
            parse_options(self.module.OPTION_CLASSES, argv, description="", spellings=self.spellings, **more)
            return 0

        return main(argv)


def scripts() -> list[Script]:
    """Return the four scripts, to be run in the folder of `make_folder`."""
    needed = [
        *("--pretrained_model_name_or_path=model.safetensors", "--in_json=meta_lat.json", "--train_data_dir=images"),
        *("--output_dir=output", "--max_data_loader_n_workers=0", "--resolution=64,64", "--min_bucket_reso=64"),
    ]
    prepare = ["images", "meta_cap.json", "meta_lat.json", "model.safetensors", "--max_resolution=64,64"]
    return [
        Script("sdxl_train.py", sdxl_train, needed, TRAINER_SPELLINGS, _conflicts),
        Script("prepare_buckets_latents.py", prepare_buckets_latents, prepare, PREPARE_SPELLINGS),
        Script("merge G", sdxl_merge_captions_g_to_metadata, ["images", "meta_cap.json"], Spellings()),
        Script("merge L", sdxl_merge_captions_l_to_metadata, ["images", "meta_cap.json"], Spellings()),
    ]


def _conflicts(*classes: object) -> Iterator[str]:
    return TrainingOptions(*classes).conflicts()  # type: ignore[arg-type]


def make_folder(folder: Path) -> None:
    """Make a model, an image, captions and latents in `folder`."""
    (folder / "images").mkdir(parents=True)
    Image.new("RGB", (64, 64), "red").save(folder / "images" / "01.png")
    for suffix in (".txt", ".caption"):
        (folder / "images" / f"01{suffix}").write_text("a", encoding="utf-8")
    write_random_sdxl(folder / "model.safetensors", TINY, torch.float16, seed=0)
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        for script in (sdxl_merge_captions_g_to_metadata, sdxl_merge_captions_l_to_metadata):
            assert script.main(["images", "meta_cap.json"]) == 0
        argv = ["images", "meta_cap.json", "meta_lat.json", "model.safetensors", "--max_resolution=64,64"]
        assert prepare_buckets_latents.main([*argv, "--min_bucket_reso=64"]) == 0


# -- cases ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One command of a script: what every one needs, and the words that make it absurd."""

    script: Script
    absurd: list[str]

    @property
    def argv(self) -> list[str]:
        """The whole command line."""
        return [*self.script.needed, *self.absurd]

    @property
    def can_be_run(self) -> bool:
        """Whether it is one of the trainer that writes nothing outside of the folder and ends soon."""
        is_harmless = not any(
            word.startswith(_NOT_RUN) or any(each in word for each in _ESCAPES) for word in self.absurd
        )
        return self.script.module is sdxl_train and is_harmless


def cases(draw: random.Random, of: Sequence[Script]) -> Iterator[Case]:
    """Yield commands without end: a pair of options with absurd values, on the command line or in a file."""
    flags = {script.name: script.flags for script in of}
    while True:
        for script in of:
            pair = draw.sample(flags[script.name], 2)
            if script.module is sdxl_train and draw.random() < 0.3:
                yield Case(script, [_file_of(pair, draw)])
            else:
                yield Case(script, [word for flag in pair for word in _written(flag, draw)])


def _written(flag: str, draw: random.Random) -> list[str]:
    value = draw.choice(ABSURD)
    return draw.choice(([f"{flag}={value}"], [f"{flag}={value}"], [flag, value], [flag], [flag, value, value]))


def _file_of(pair: Sequence[str], draw: random.Random) -> str:
    """Write a file of options, TOML or JSON; return the flag that names it."""
    values = {flag[2:]: draw.choice(FILE_VALUES if draw.random() < 0.5 else ABSURD) for flag in pair}
    if draw.random() < 0.5:
        Path("options.json").write_text(json.dumps(values), encoding="utf-8")
        return "--config_file=options.json"
    text = tomli_w.dumps(values)
    Path("options.toml").write_bytes(text.encode("utf-8", errors="replace"))
    return "--config_file=options.toml"


def fuzz(
    folder: Path, *, seed: int, seconds: float = float("inf"), num_cases: int = sys.maxsize, with_runs: bool = True
) -> dict[str, object]:
    """Try cases in `folder` for a time or a number; return the counts and what is wrong with some."""
    make_folder(folder)
    started = time.monotonic()
    counts: Counter[str] = Counter()
    findings: list[dict[str, object]] = []
    with contextlib.chdir(folder):
        kept = {path: path.stat().st_size for path in Path().rglob("*") if path.is_file()}
        for case in itertools.islice(cases(random.Random(seed), scripts()), num_cases):
            if time.monotonic() - started > seconds:
                break
            outcomes = {"checked": outcome_of(case.script.check, case.argv)}
            if with_runs and case.can_be_run and outcomes["checked"].name == "success":
                argv = [*case.argv, "--max_train_steps=1"]
                outcomes["run"] = outcome_in_process(case.script.module.main, argv, seconds=_SECONDS_OF_A_RUN)
            for kind, outcome in outcomes.items():
                counts[f"{case.script.name}, {kind}: {outcome.name}"] += 1
                if outcome.name not in ("success", "refused", "help"):
                    findings.append({"argv": case.argv, "outcome": outcome.name, "details": outcome.details[-3000:]})
            if {path: path.stat().st_size for path in kept if path.exists()} != kept:
                raise RuntimeError(f"{case.argv} changed a file that it only reads")
            shutil.rmtree("output", ignore_errors=True)
    return {
        "seconds": round(time.monotonic() - started),
        "seed": seed,
        "num_commands": sum(count for name, count in counts.items() if "checked" in name),
        "num_runs": sum(count for name, count in counts.items() if ", run:" in name),
        "outcomes": dict(sorted(counts.items())),
        "findings": findings,
    }


def table_of(result: dict[str, object], machine: str) -> str:
    """Return the figures as text."""
    outcomes, findings = result["outcomes"], result["findings"]
    assert isinstance(outcomes, dict) and isinstance(findings, list)
    lines = [
        machine,
        "",
        f"{result['num_commands']} commands with two absurd options each, {result['num_runs']} of them run, "
        f"{result['seconds']} s, seed {result['seed']}",
        f"{len(findings)} ended otherwise than by success or by status 2 and one line of error",
        "",
        *(f"{count:7d}  {name}" for name, count in outcomes.items()),
    ]
    return "\n".join([*lines, *("", *map(str, findings))] if findings else lines)


def main() -> int:
    """Fuzz for the time that the command line says; return 1 if anything was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    from benchmarks.ceilings import machine

    with tempfile.TemporaryDirectory() as folder:
        result = fuzz(Path(folder) / "set", seed=arguments.seed, seconds=arguments.seconds)
    table = table_of(result, machine_line(machine()))
    write_result(RESULTS / "fuzz_options", result, table)
    print(table)
    return 1 if result["findings"] else 0


if __name__ == "__main__":
    sys.exit(main())
