"""The line of a prompt file that draws an image again, from the texts in its PNG."""

import json
from collections.abc import Mapping
from typing import Any

from library.config.errors import UserError
from library.samples.prompts import SamplePrompt, parse_prompt_line

_NOTHING = "-"


def prompt_line(texts: Mapping[str, str]) -> str:
    """Return the line of a prompt file, or where no line can hold the prompt, the entry of a JSON prompt file.

    `texts` are those of a sample image. Raise `UserError` if they do not say how it was drawn.
    """
    settings = _settings(texts)
    line = _line(settings)
    try:
        read = parse_prompt_line(line, "the line")
    except UserError:
        return _entry(settings)
    return line if _as_settings(read) == settings else _entry(settings)


def _settings(texts: Mapping[str, str]) -> dict[str, Any]:
    try:
        width, height = map(int, texts["size"].split("x"))
        return {
            "prompt_g": texts["prompt_g"].strip(),
            "prompt_l": texts["prompt_l"].strip(),
            "negative_g": texts["negative_prompt_g"].strip(),
            "negative_l": texts["negative_prompt_l"].strip(),
            "width": width,
            "height": height,
            "seed": int(texts["seed"]),
            "guidance_scale": float(texts["guidance_scale"]),
            "num_inference_steps": int(texts["steps"]),
            "guidance_rescale": float(texts.get("guidance_rescale", 0)),
            "sampler": texts["sampler"],
        }
    except (KeyError, ValueError) as error:
        raise UserError(f"the image does not say how it was drawn ({error}).") from error


def _line(settings: Mapping[str, Any]) -> str:
    negatives = {"n": settings["negative_g"]}
    if settings["negative_l"] != settings["negative_g"]:
        negatives = {"ng": settings["negative_g"], "nl": settings["negative_l"]}
    options = {
        "e": settings["prompt_l"] or _NOTHING,
        **{name: text for name, text in negatives.items() if text},
        "w": settings["width"],
        "h": settings["height"],
        "d": settings["seed"],
        "l": _number(settings["guidance_scale"]),
        "s": settings["num_inference_steps"],
        **({"gr": _number(settings["guidance_rescale"])} if settings["guidance_rescale"] else {}),
        "ss": settings["sampler"],
    }
    return " ".join([settings["prompt_g"], *(f"--{name} {value}" for name, value in options.items())]).strip()


def _number(value: float) -> str:
    return f"{value:.0f}" if value == int(value) else repr(value)


def _as_settings(prompt: SamplePrompt) -> dict[str, Any]:
    names = ("prompt_g", "prompt_l", "negative_g", "negative_l", "width", "height", "seed", "guidance_scale")
    more = ("num_inference_steps", "guidance_rescale", "sampler")
    return {name: getattr(prompt, name) for name in (*names, *more)}


def _entry(settings: Mapping[str, Any]) -> str:
    names = {"negative_g": "negative_prompt_g", "negative_l": "negative_prompt_l"}
    return json.dumps([{names.get(name, name): value for name, value in settings.items()}], ensure_ascii=False)
