"""A sample image as a ComfyUI workflow, which opens with its two captions apart."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from library.samples.prompts import SamplePrompt
from library.samples.sampler_names import names_of
from library.sdxl.prediction import FLOW, SDXL_PREDICTION, VELOCITY, Prediction

_OUTPUTS = {
    "CheckpointLoaderSimple": ("MODEL", "CLIP", "VAE"),
    "CLIPTextEncodeSDXL": ("CONDITIONING",),
    "EmptyLatentImage": ("LATENT",),
    "ModelSamplingDiscrete": ("MODEL",),
    "ModelSamplingSD3": ("MODEL",),
    "RescaleCFG": ("MODEL",),
    "KSampler": ("LATENT",),
    "VAEDecode": ("IMAGE",),
    "SaveImage": (),
}
"""The types that ComfyUI's nodes return, in the order of their output slots."""

_FORMAT_VERSION = 0.4  # of the graph's JSON
_AFTER_SEED = "fixed"  # the widget behind a seed: what becomes of it after an image


@dataclass(frozen=True)
class _Node:
    """One node: where it lies on the canvas, which outputs (node, slot) its inputs take, and its widgets, in order."""

    id: int
    kind: str
    position: tuple[int, int]
    size: tuple[int, int]
    inputs: Mapping[str, tuple[int, int]]
    widgets: Mapping[str, Any]


def comfyui_texts(
    prompt: SamplePrompt,
    *,
    sampler: str,
    width: int,
    height: int,
    seed: int,
    checkpoint: str,
    prediction: Prediction = SDXL_PREDICTION,
) -> dict[str, str]:
    """Return the two PNG texts from which ComfyUI rebuilds a graph: `prompt` (what is queued) and `workflow` (canvas).

    `checkpoint` is the file name of the model, which predicts `prediction`. Both are JSON in ASCII, since ComfyUI reads
    them from `tEXt` chunks. Parentheses are weights to ComfyUI and plain text here, so they are escaped; on the canvas
    braces are too.
    """
    nodes = _nodes(prompt, sampler, width, height, seed, checkpoint, _changes_of_model(prompt, prediction))
    return {"prompt": json.dumps(_queued(nodes)), "workflow": json.dumps(_canvas(nodes))}


def _changes_of_model(prompt: SamplePrompt, prediction: Prediction) -> list[tuple[str, dict[str, Any]]]:
    """Return the nodes, kind and widgets, that the model passes through on its way to the sampler."""
    changes: list[tuple[str, dict[str, Any]]] = []
    if prediction.kind == FLOW:
        changes.append(("ModelSamplingSD3", {"shift": prediction.flow_shift}))
    elif prediction != SDXL_PREDICTION:
        sampling = "v_prediction" if prediction.kind == VELOCITY else "eps"
        changes.append(("ModelSamplingDiscrete", {"sampling": sampling, "zsnr": prediction.has_zero_terminal_snr}))
    if prompt.guidance_rescale:
        changes.append(("RescaleCFG", {"multiplier": prompt.guidance_rescale}))
    return changes


def _nodes(
    prompt: SamplePrompt,
    sampler: str,
    width: int,
    height: int,
    seed: int,
    checkpoint: str,
    changes: list[tuple[str, dict[str, Any]]],
) -> tuple[_Node, ...]:
    loader, positive, negative, latent, drawing, decoder, saving = range(1, 8)
    model, clip, vae = ((loader, slot) for slot in range(3))
    changing = []
    for number, (kind, widgets) in enumerate(changes):
        changing.append(
            _Node(saving + 1 + number, kind, (0, 600 + 160 * number), (320, 110), {"model": model}, widgets)
        )
        model = (changing[-1].id, 0)
    sizes = {"width": width, "height": height, "crop_w": 0, "crop_h": 0, "target_width": width, "target_height": height}
    wanted = {"text_g": _literal(prompt.prompt_g), "text_l": _literal(prompt.prompt_l)}
    unwanted = {"text_g": _literal(prompt.negative_g), "text_l": _literal(prompt.negative_l)}
    conditions = {"model": model, "positive": (positive, 0), "negative": (negative, 0), "latent_image": (latent, 0)}
    sampling = {
        "seed": seed,
        "steps": prompt.num_inference_steps,
        "cfg": prompt.guidance_scale,
        "sampler_name": names_of(sampler).comfyui,
        "scheduler": names_of(sampler).comfyui_schedule,
        "denoise": 1.0,
    }
    return (
        _Node(loader, "CheckpointLoaderSimple", (0, 0), (320, 100), {}, {"ckpt_name": checkpoint}),
        _Node(positive, "CLIPTextEncodeSDXL", (380, 0), (420, 340), {"clip": clip}, sizes | wanted),
        _Node(negative, "CLIPTextEncodeSDXL", (380, 400), (420, 340), {"clip": clip}, sizes | unwanted),
        _Node(
            latent, "EmptyLatentImage", (0, 400), (320, 110), {}, {"width": width, "height": height, "batch_size": 1}
        ),
        _Node(drawing, "KSampler", (860, 0), (320, 270), conditions, sampling),
        _Node(decoder, "VAEDecode", (1240, 0), (210, 50), {"samples": (drawing, 0), "vae": vae}, {}),
        _Node(saving, "SaveImage", (1240, 110), (320, 360), {"images": (decoder, 0)}, {"filename_prefix": "sample"}),
        *changing,
    )


def _literal(text: str) -> str:
    """Return the text with its parentheses escaped: unescaped ones are weights."""
    return text.replace("(", r"\(").replace(")", r"\)")


def _queued(nodes: tuple[_Node, ...]) -> dict[str, Any]:
    """Return the graph as ComfyUI queues it: nodes by id, each input a value or [node, slot]."""
    return {
        str(node.id): {
            "class_type": node.kind,
            "inputs": {
                **node.widgets,
                **{name: [str(source), slot] for name, (source, slot) in node.inputs.items()},
            },
        }
        for node in nodes
    }


def _canvas(nodes: tuple[_Node, ...]) -> dict[str, Any]:
    """Return the graph as ComfyUI's canvas saves it: nodes with slots, and links that both of their ends name."""
    kinds = {node.id: node.kind for node in nodes}
    links = [
        [source, slot, node.id, index, _OUTPUTS[kinds[source]][slot]]
        for node in nodes
        for index, (source, slot) in enumerate(node.inputs.values())
    ]
    numbered = [[number, *link] for number, link in enumerate(links, start=1)]
    return {
        "last_node_id": max(kinds),
        "last_link_id": len(numbered),
        "nodes": [_node_on_canvas(node, order, numbered) for order, node in enumerate(nodes)],
        "links": numbered,
        "groups": [],
        "config": {},
        "extra": {},
        "version": _FORMAT_VERSION,
    }


def _node_on_canvas(node: _Node, order: int, links: list[list[Any]]) -> dict[str, Any]:
    arriving = {index: (number, kind) for number, _, _, target, index, kind in links if target == node.id}
    return {
        "id": node.id,
        "type": node.kind,
        "pos": node.position,
        "size": node.size,
        "flags": {},
        "order": order,
        "mode": 0,
        "inputs": [
            {"name": name, "type": arriving[index][1], "link": arriving[index][0]}
            for index, name in enumerate(node.inputs)
        ],
        "outputs": [
            {
                "name": kind,
                "type": kind,
                "links": [number for number, source, slot, *_ in links if (source, slot) == (node.id, index)],
                "slot_index": index,
            }
            for index, kind in enumerate(_OUTPUTS[node.kind])
        ],
        "properties": {"Node name for S&R": node.kind},
        "widgets_values": _widget_values(node),
    }


def _widget_values(node: _Node) -> list[Any]:
    values: list[Any] = []
    for name, value in node.widgets.items():
        values.append(_without_choices(value) if name in ("text_g", "text_l") else value)
        if name == "seed":
            values.append(_AFTER_SEED)
    return values


def _without_choices(text: str) -> str:
    """Return the text so that the canvas hands it on as it is, which else draws from {a|b} and drops // comments."""
    escaped = text.replace("{", r"\{").replace("}", r"\}")
    # A choice of one: what stands in the braces is all that can be drawn.
    return escaped.replace("//", "/{/}").replace("/*", "/{*}")
