"""The workflow in a sample's PNG: read as ComfyUI reads it, checked against the definitions of ComfyUI's nodes."""

import json
import re
import struct
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from library.samples.picture_files import PictureRecord, save_picture
from library.samples.prompts import SAMPLERS, SamplePrompt

RECORD = PictureRecord(
    prompt=SamplePrompt("a cat, sofa", "film grain", "ugly", "blurred", guidance_scale=7.0, num_inference_steps=28),
    sampler="euler_a",
    width=832,
    height=1216,
    seed=42,
    step=500,
    model_name="my model",
)

# Inputs in the order of `INPUT_TYPES` and outputs of `RETURN_TYPES`, from ComfyUI's nodes.py and nodes_clip_sdxl.py.
SIZES = ["width", "height", "crop_w", "crop_h", "target_width", "target_height"]
DEFINITIONS = {  # kind: {socket: type}, widgets, outputs
    "CheckpointLoaderSimple": ({}, ["ckpt_name"], ["MODEL", "CLIP", "VAE"]),
    "CLIPTextEncodeSDXL": ({"clip": "CLIP"}, [*SIZES, "text_g", "text_l"], ["CONDITIONING"]),
    "EmptyLatentImage": ({}, ["width", "height", "batch_size"], ["LATENT"]),
    "KSampler": (
        {"model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING", "latent_image": "LATENT"},
        ["seed", "control_after_generate", "steps", "cfg", "sampler_name", "scheduler", "denoise"],
        ["LATENT"],
    ),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, [], ["IMAGE"]),
    "SaveImage": ({"images": "IMAGE"}, ["filename_prefix"], []),
}
COMFYUI_SAMPLERS = {
    *("euler", "euler_ancestral", "heun", "dpm_2", "dpm_2_ancestral", "lms", "dpmpp_2m", "ipndm", "ddim"),
}
COMFYUI_SCHEDULERS = {"normal", "karras", "exponential", "sgm_uniform", "simple", "ddim_uniform"}
DYNAMIC = {"text_g", "text_l"}


def plain_texts(path: Path) -> dict[str, str]:
    """The `tEXt` chunks of a PNG, as ComfyUI's page reads them."""
    data, offset, texts = path.read_bytes(), 8, {}
    while offset < len(data):
        length, kind = struct.unpack(">I4s", data[offset : offset + 8])
        if kind == b"tEXt":
            name, _, text = data[offset + 8 : offset + 8 + length].partition(b"\0")
            texts[name.decode("latin-1")] = text.decode("latin-1")
        offset += 12 + length
    return texts


def as_the_page_expands(text: str) -> str:
    """`processDynamicPrompt` of ComfyUI's page, which draws the first of {a|b}."""
    text = re.sub(r"/\*[\s\S]*?\*/|//.*", "", text)
    done, at = "", 0
    while at < len(text):
        if text[at] == "\\":
            done, at = done + text[at : at + 2], at + 2
        elif text[at] == "{":
            end = at + 1
            while end < len(text) and text[end] != "}":
                end += 2 if text[end] == "\\" else 1
            done, at = done + as_the_page_expands(text[at + 1 : end].split("|")[0]), end + 1
        else:
            done, at = done + text[at], at + 1
    return re.sub(r"\\([{}|])", r"\1", done)


def as_the_page_queues(workflow: dict) -> dict:
    """The nodes that ComfyUI queues for a canvas: links resolved, widgets named in the order of the definitions."""
    links = {link[0]: link for link in workflow["links"]}
    queued = {}
    for node in workflow["nodes"]:
        _, widgets, _ = DEFINITIONS[node["type"]]
        values = dict(zip(widgets, node["widgets_values"], strict=True))
        values.pop("control_after_generate", None)
        inputs = {name: as_the_page_expands(value) if name in DYNAMIC else value for name, value in values.items()}
        for slot in node["inputs"]:
            _, source, output, *_ = links[slot["link"]]
            inputs[slot["name"]] = [str(source), output]
        queued[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return queued


def as_weights_are_read(text: str) -> str:
    """The text of which ComfyUI makes tokens, where no part of it is weighted."""
    assert not re.search(r"(?<!\\)[()]", text), "a weight"
    return text.replace(r"\(", "(").replace(r"\)", ")")


@pytest.fixture
def saved(tmp_path: Path):
    """`saved(record)` is the `prompt` and the `workflow` of a sample that was saved with it."""

    def save(record: PictureRecord) -> tuple[dict, dict]:
        save_picture(tmp_path / "sample.png", Image.new("RGB", (8, 8)), record)
        texts = plain_texts(tmp_path / "sample.png")
        return json.loads(texts["prompt"]), json.loads(texts["workflow"])

    return save


def node_of(prompt: dict, kind: str) -> dict:
    [node] = [node for node in prompt.values() if node["class_type"] == kind]
    return node["inputs"]


def encoder_of(prompt: dict, side: str) -> dict:
    return prompt[node_of(prompt, "KSampler")[side][0]]["inputs"]


def test_the_two_captions_of_both_prompts_stand_apart(saved):
    prompt, _ = saved(RECORD)
    wanted, unwanted = encoder_of(prompt, "positive"), encoder_of(prompt, "negative")
    assert (wanted["text_g"], wanted["text_l"]) == ("a cat, sofa", "film grain")
    assert (unwanted["text_g"], unwanted["text_l"]) == ("ugly", "blurred")


def test_the_settings_are_those_of_the_sample(saved):
    prompt, _ = saved(RECORD)
    sampling = node_of(prompt, "KSampler")
    assert {name: sampling[name] for name in ("seed", "steps", "cfg", "sampler_name", "scheduler", "denoise")} == {
        "seed": 42,
        "steps": 28,
        "cfg": 7.0,
        "sampler_name": "euler_ancestral",
        "scheduler": "normal",
        "denoise": 1.0,
    }
    assert node_of(prompt, "EmptyLatentImage") == {"width": 832, "height": 1216, "batch_size": 1}
    for side in ("positive", "negative"):
        assert [encoder_of(prompt, side)[name] for name in SIZES] == [832, 1216, 0, 0, 832, 1216]
    assert node_of(prompt, "CheckpointLoaderSimple") == {"ckpt_name": "my model.safetensors"}


def test_every_input_of_every_node_is_given_and_of_the_right_type(saved):
    prompt, _ = saved(RECORD)
    for node in prompt.values():
        sockets, widgets, _ = DEFINITIONS[node["class_type"]]
        assert node["inputs"].keys() == {*sockets, *widgets} - {"control_after_generate"}
        for name, kind in sockets.items():
            source, slot = node["inputs"][name]
            assert DEFINITIONS[prompt[source]["class_type"]][2][slot] == kind
    assert [node["class_type"] for node in prompt.values()].count("SaveImage") == 1


def test_the_canvas_is_what_is_queued_and_both_ends_of_each_link_name_it(saved):
    prompt, workflow = saved(RECORD)
    assert as_the_page_queues(workflow) == prompt
    nodes = {node["id"]: node for node in workflow["nodes"]}
    assert workflow["last_node_id"] == max(nodes)
    assert workflow["last_link_id"] == max(link[0] for link in workflow["links"]) == len(workflow["links"])
    for number, source, output, target, index, kind in workflow["links"]:
        assert number in nodes[source]["outputs"][output]["links"]
        assert nodes[source]["outputs"][output]["type"] == kind
        assert nodes[target]["inputs"][index] == {
            "name": list(DEFINITIONS[nodes[target]["type"]][0])[index],
            "type": kind,
            "link": number,
        }
    for node in nodes.values():
        sockets, _, outputs = DEFINITIONS[node["type"]]
        assert [slot["name"] for slot in node["inputs"]] == list(sockets)
        assert [slot["type"] for slot in node["outputs"]] == outputs
    order = {node["id"]: node["order"] for node in nodes.values()}
    assert all(order[source] < order[target] for _, source, _, target, _, _ in workflow["links"])
    places = [(*node["pos"], *node["size"]) for node in nodes.values()]
    overlaps = [
        (one, other)
        for one in places
        for other in places
        if one < other and all(one[i] < other[i] + other[i + 2] and other[i] < one[i] + one[i + 2] for i in (0, 1))
    ]
    assert overlaps == []


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_has_a_name_in_comfyui(sampler: str, saved):
    sampling = node_of(saved(replace(RECORD, sampler=sampler))[0], "KSampler")
    assert sampling["sampler_name"] in COMFYUI_SAMPLERS
    assert sampling["scheduler"] in COMFYUI_SCHEDULERS


@pytest.mark.parametrize(
    "text",
    [
        "",
        "portrait (medium)",
        "((a)) [b] (c:1.3)",
        "{a|b} cat",
        "https://a.b/*c*/ d",
        "a /// b",
        r"a\b",
        '"a", «猫» 🏯',
    ],
)
def test_every_text_arrives_as_it_is(text: str, saved):
    prompt, workflow = saved(replace(RECORD, prompt=SamplePrompt(text, text, text, text)))
    for queued in (prompt, as_the_page_queues(workflow)):
        for side in ("positive", "negative"):
            for name in DYNAMIC:
                assert as_weights_are_read(encoder_of(queued, side)[name]) == text


def test_a_run_without_a_name_is_that_of_kohyas_last_model(saved):
    prompt, _ = saved(replace(RECORD, model_name=""))
    assert node_of(prompt, "CheckpointLoaderSimple") == {"ckpt_name": "last.safetensors"}
