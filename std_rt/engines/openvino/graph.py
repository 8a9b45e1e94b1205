"""Rewrites of an OpenVINO model before it is compiled: half-precision weights kept, steady parts cut off."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import openvino as ov
from openvino import opset8 as ops

__all__ = ["STEADY", "keep_half_weights", "split_steady"]

# Marks a Convert that OpenVINO must not fold; only the presence of the entry counts.
_MARK = "decompression_0"
STEADY = "steady."  # prefix of the tensors between the two parts


def keep_half_weights(model: ov.Model) -> None:
    """Rewrite ``model`` in place to compute in fp32 on half-precision weights, each behind a marked Convert.

    OpenVINO computes no fp16 on most CPUs. Left alone it turns every such weight into fp32, and then once
    more into the layout of its kernels: four times the bytes of the file. Marked as compressed, a weight is
    read from the (mapped) file straight into that layout: as many bytes as the file in bf16, twice as many in
    fp32. The precision to run in is set at compilation; a graph written in fp16 or bf16 loses nothing.
    """
    halves = {ov.Type.f16, ov.Type.bf16}
    changed = False
    for op in model.get_ordered_ops():
        if op.get_type_name() == "Convert" and _is_float_cast(op, halves):
            source = op.input_value(0)
            for reader in list(op.output(0).get_target_inputs()):
                reader.replace_source_output(source)
            changed = True
    for op in model.get_ordered_ops():
        if op.get_type_name() == "Constant" and op.get_element_type() in halves:
            readers = list(op.output(0).get_target_inputs())
            cast = ops.convert(op.output(0), "f32")
            cast.get_rt_info()[_MARK] = ""
            for reader in readers:
                reader.replace_source_output(cast.output(0))
            changed = True
    if changed:
        model.validate_nodes_and_infer_types()


def _is_float_cast(op: ov.Node, halves: set[ov.Type]) -> bool:
    kinds = {op.input_value(0).get_element_type(), op.output(0).get_element_type()}
    return bool(kinds & halves) and kinds <= halves | {ov.Type.f32}


def split_steady(model: ov.Model, steady: Collection[str]) -> tuple[ov.Model, ov.Model] | None:
    """Cut a model into ``(prepare, core)``; None if nothing depends on ``steady`` inputs alone.

    Over a stream most inputs of the UNet never change: timestep, text, style. What depends on them alone
    (time embeddings, the keys and values of every cross-attention layer) is many operations too small to
    keep a processor busy; computed once per style and step, it costs nothing. ``prepare`` takes the steady
    inputs and returns ``steady.0``, ``steady.1``, ...; ``core`` takes those and the other inputs and returns
    the outputs of ``model``, which must not be used afterwards. Shapes must be static.
    """
    _fold_shapes(model)
    parameters = {op.get_friendly_name(): op for op in model.get_parameters()}
    kept = {name for name, op in parameters.items() if op.output(0).get_any_name() in steady}
    if not kept or len(kept) == len(parameters):
        return None
    border = _border(model, kept)
    if not border:
        return None
    results, made = [], []
    for i, (output, targets) in enumerate(border):
        parameter = ops.parameter(output.get_shape(), output.get_element_type(), name=f"{STEADY}{i}")
        parameter.output(0).get_tensor().set_names({f"{STEADY}{i}"})
        for target in targets:
            target.replace_source_output(parameter.output(0))
        result = ops.result(output)
        result.output(0).get_tensor().add_names({f"{STEADY}{i}"})
        results.append(result)
        made.append(parameter)
    prepare = ov.Model(results, [parameters[name] for name in parameters if name in kept], "prepare")
    rest = [op for name, op in parameters.items() if name not in kept]
    return prepare, ov.Model(model.get_results(), [*rest, *made], "core")


def _fold_shapes(model: ov.Model) -> None:
    """Shapes are static by now; as constants they no longer depend on the input they were read from."""
    for op in model.get_ordered_ops():
        if op.get_type_name() == "ShapeOf":
            dtype = op.output(0).get_element_type().to_dtype()
            shape = np.array(list(op.input_value(0).get_shape()), dtype)
            op.output(0).replace(ops.constant(shape).output(0))


def _border(model: ov.Model, steady: set[str]) -> list[tuple[ov.Output, list[ov.Input]]]:
    """Outputs that depend on steady inputs alone, with the inputs of the other operations that read them."""
    kinds: dict[str, str] = {}
    border = []
    for op in model.get_ordered_ops():
        kinds[op.get_friendly_name()] = _kind(op, kinds, steady)
    for op in model.get_ordered_ops():
        if kinds[op.get_friendly_name()] != "steady":
            continue
        for output in op.outputs():
            readers = {target: target.get_node().get_friendly_name() for target in output.get_target_inputs()}
            targets = [target for target, name in readers.items() if kinds[name] == "moving"]
            if targets:
                border.append((output, targets))
    return border


def _kind(op: ov.Node, kinds: dict[str, str], steady: set[str]) -> str:
    """``constant``, ``steady`` (depends on constants and steady inputs alone) or ``moving``."""
    match op.get_type_name():
        case "Parameter":
            return "steady" if op.get_friendly_name() in steady else "moving"
        case "Result":
            return "moving"
        case _:
            behind = {kinds[value.get_node().get_friendly_name()] for value in op.input_values()}
            return "moving" if "moving" in behind else ("steady" if "steady" in behind else "constant")
