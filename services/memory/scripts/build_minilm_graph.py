"""Writes the ONNX graph of all-MiniLM-L6-v2 whose tensors are external data inside the package's own `model.safetensors`.

The graph (some 20 KB) holds no weights, only their offsets, so nothing is converted or cached: ONNX Runtime maps the weights from
the installed package. Two runs give identical bytes; a test regenerates the file and compares. Needs the development dependency
`onnx`.

Sources: the BERT encoder (Devlin et al., 2019, arXiv 1810.04805) with mean pooling and normalisation (Reimers & Gurevych, 2019,
arXiv 1908.10084); operators of ONNX opset 17 and ONNX Runtime's contrib set `com.microsoft` 1; the layout of https://github.com/huggingface/safetensors.

    python services/memory/scripts/build_minilm_graph.py
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

from onnx import ModelProto, NodeProto, TensorProto, helper

from tessera.memory.adapters.minilm import GRAPH_PATH, package_folder

LAYERS, HEADS, HIDDEN = 6, 12, 384
EPSILON = 1e-12
WEIGHTS = "model.safetensors"


def external_tensors(weights: Path) -> dict[str, TensorProto]:
    """The float tensors of a safetensors file as external data, by name."""
    with weights.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    floats = {name: entry for name, entry in header.items() if entry.get("dtype") == "F32" and not name.startswith("pooler")}
    return {name: external_tensor(name, entry["shape"], entry["data_offsets"], base=8 + length) for name, entry in floats.items()}


def external_tensor(name: str, shape: list[int], offsets: list[int], base: int) -> TensorProto:
    """One tensor of the file, by its place in it."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", WEIGHTS), ("offset", str(base + offsets[0])), ("length", str(offsets[1] - offsets[0]))):
        tensor.external_data.add(key=key, value=value)
    return tensor


def constants() -> list[TensorProto]:
    """The few numbers that the graph itself holds."""
    whole = {"zero": [0], "one": [1], "two": [2]}
    return [helper.make_tensor(name, TensorProto.INT64, [1], value) for name, value in whole.items()] + [
        helper.make_tensor("least", TensorProto.FLOAT, [], [1e-9])
    ]


def embedding_nodes() -> list[NodeProto]:
    """Token ids to the first hidden state, and the mask as the attention wants it."""
    part = "embeddings"
    return [
        helper.make_node("Shape", ["input_ids"], ["shape"]),
        helper.make_node("Slice", ["shape", "one", "two", "zero"], ["length"]),
        helper.make_node("Slice", [f"{part}.position_embeddings.weight", "zero", "length", "zero"], ["position"]),
        helper.make_node("Gather", [f"{part}.word_embeddings.weight", "input_ids"], ["word"]),
        helper.make_node("Gather", [f"{part}.token_type_embeddings.weight", "token_type_ids"], ["type"]),
        helper.make_node("Add", ["word", "type"], ["word_type"]),
        helper.make_node("Add", ["word_type", "position"], ["summed"]),
        helper.make_node(
            "LayerNormalization", ["summed", f"{part}.LayerNorm.weight", f"{part}.LayerNorm.bias"], ["hidden.0"], axis=-1, epsilon=EPSILON
        ),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.INT32),
    ]


def layer_nodes(index: int) -> list[NodeProto]:
    """One encoder layer."""
    part, out = f"encoder.layer.{index}", f"layer.{index}"
    attention, projections = f"{part}.attention", ("query", "key", "value")
    return [
        helper.make_node("Concat", [f"{attention}.self.{name}.weight" for name in projections], [f"{out}.qkv"], axis=0),
        helper.make_node("Transpose", [f"{out}.qkv"], [f"{out}.qkv_t"], perm=[1, 0]),
        helper.make_node("Concat", [f"{attention}.self.{name}.bias" for name in projections], [f"{out}.qkv_bias"], axis=0),
        microsoft(
            "Attention",
            [f"hidden.{index}", f"{out}.qkv_t", f"{out}.qkv_bias", "mask"],
            f"{out}.context",
            num_heads=HEADS,
            mask_filter_value=-3.4e38,
        ),
        *dense(f"{out}.context", f"{attention}.output.dense.weight", f"{out}.projected"),
        skip_normalised(f"{out}.projected", f"hidden.{index}", f"{attention}.output", f"{out}.attended"),
        *dense(f"{out}.attended", f"{part}.intermediate.dense.weight", f"{out}.wide"),
        microsoft("BiasGelu", [f"{out}.wide", f"{part}.intermediate.dense.bias"], f"{out}.activated"),
        *dense(f"{out}.activated", f"{part}.output.dense.weight", f"{out}.narrow"),
        skip_normalised(f"{out}.narrow", f"{out}.attended", f"{part}.output", f"hidden.{index + 1}"),
    ]


def dense(source: str, weight: str, target: str) -> list[NodeProto]:
    """A product with a weight that is stored output by input."""
    return [
        helper.make_node("Transpose", [weight], [f"{target}.weight"], perm=[1, 0]),
        helper.make_node("MatMul", [source, f"{target}.weight"], [target]),
    ]


def skip_normalised(source: str, skip: str, part: str, target: str) -> NodeProto:
    """Bias, residual and layer normalisation in one."""
    norm = f"{part}.LayerNorm"
    return microsoft(
        "SkipLayerNormalization", [source, skip, f"{norm}.weight", f"{norm}.bias", f"{part}.dense.bias"], target, epsilon=EPSILON
    )


def microsoft(operator: str, inputs: list[str], output: str, **attributes: float) -> NodeProto:
    """A node of ONNX Runtime's contrib set."""
    return helper.make_node(operator, inputs, [output], domain="com.microsoft", **attributes)  # type: ignore[arg-type]


def pooling_nodes() -> list[NodeProto]:
    """Masked mean over the tokens, scaled to unit length."""
    return [
        helper.make_node("Cast", ["attention_mask"], ["mask_float"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask_float", "two"], ["mask_wide"]),
        helper.make_node("Mul", [f"hidden.{LAYERS}", "mask_wide"], ["kept"]),
        helper.make_node("ReduceSum", ["kept", "one"], ["total"], keepdims=0),
        helper.make_node("ReduceSum", ["mask_wide", "one"], ["count"], keepdims=0),
        helper.make_node("Max", ["count", "least"], ["divisor"]),
        helper.make_node("Div", ["total", "divisor"], ["mean"]),
        helper.make_node("LpNormalization", ["mean"], ["embedding"], axis=-1, p=2),
    ]


def build(weights: Path) -> ModelProto:
    """The whole graph: token ids, type ids and mask (int64, batch x length) to unit vectors (float32, batch x 384)."""
    nodes = embedding_nodes() + [node for index in range(LAYERS) for node in layer_nodes(index)] + pooling_nodes()
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "length"])
        for name in ("input_ids", "token_type_ids", "attention_mask")
    ]
    outputs = [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", HIDDEN])]
    tensors = external_tensors(weights)
    initializers = [*constants(), *(tensors[name] for name in sorted(tensors))]
    graph = helper.make_graph(nodes, "all-MiniLM-L6-v2", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8, producer_name="tessera")


if __name__ == "__main__":
    GRAPH_PATH.write_bytes(build(package_folder() / WEIGHTS).SerializeToString(deterministic=True))
