"""A tagger whose outputs are known: functions of the mean colour of what it sees."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SIDE = 16
SHARPNESS = 40.0
LABELS = [  # name, category, weights of blue, green and red, the value at which the probability is one half
    ("general", 9, (0, 0, 0), 0.0),
    ("sensitive", 9, (0, 0, 1), 0.9),
    ("questionable", 9, (0, 0, 0), 1.0),
    ("explicit", 9, (0, 0, 0), 1.0),
    ("red_light", 0, (0, 0, 1), 0.5),
    ("green_light", 0, (0, 1, 0), 0.5),
    ("blue_light", 0, (1, 0, 0), 0.5),
    ("^_^", 0, (1 / 3, 1 / 3, 1 / 3), 0.3),
    ("a,b;c", 0, (0, 0, 0), 1.0),
    ("red_riding_hood_(wolf)_(tales)", 4, (0, 0, 1), 0.8),
    ("blue_beard_(tales)", 4, (1, 0, 0), 0.8),
]


def write_tagger(
    folder: Path,
    *,
    batch: int | str = "N",
    channels_first: bool = False,
    num_outputs: int = len(LABELS),
    ends_in_sigmoid: bool = True,
) -> Path:
    """Write model.onnx and selected_tags.csv; the first labels are those of the model where `num_outputs` are fewer."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = np.array([row[2] for row in LABELS[:num_outputs]], np.float32).T * SHARPNESS / 255
    least = np.array([row[3] for row in LABELS[:num_outputs]], np.float32) * SHARPNESS
    shape = [batch, 3, SIDE, SIDE] if channels_first else [batch, SIDE, SIDE, 3]
    nodes = [
        helper.make_node("ReduceMean", ["image", "axes"], ["mean"], keepdims=0),
        helper.make_node("MatMul", ["mean", "weights"], ["weighed"]),
        helper.make_node("Sub", ["weighed", "least"], ["scores"]),
        helper.make_node("Sigmoid" if ends_in_sigmoid else "Identity", ["scores"], ["tags"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tagger",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("tags", TensorProto.FLOAT, [batch, num_outputs])],
        [
            numpy_helper.from_array(np.array([2, 3] if channels_first else [1, 2], np.int64), "axes"),
            numpy_helper.from_array(weights, "weights"),
            numpy_helper.from_array(least, "least"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, str(folder / "model.onnx"))
    rows = ["tag_id,name,category,count", *(f'{n},"{row[0]}",{row[1]},1' for n, row in enumerate(LABELS))]
    (folder / "selected_tags.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def probabilities_of(colour: Sequence[int]) -> list[float]:
    """What the model says of an image of one colour (red, green, blue) that fills the square."""
    blue_green_red = [value / 255 for value in reversed(colour)]
    sums = [sum(w * v for w, v in zip(row[2], blue_green_red, strict=True)) - row[3] for row in LABELS]
    return [1 / (1 + math.exp(-SHARPNESS * each)) for each in sums]
