"""Cut an OpenVINO model in two: what depends on the picture, and what does not.

Over a stream most inputs of the UNet never change: timestep, text, style. What follows from them alone
(time embeddings, the keys and values of every cross-attention layer) is many operations too small to
keep a processor busy. Computed once a style and step, it costs nothing.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import openvino as ov
from openvino import opset8 as ops

__all__ = ["STEADY", "split_steady"]

STEADY = "steady."  # how the tensors between the two parts are called


def split_steady(model: ov.Model, steady: Collection[str]) -> tuple[ov.Model, ov.Model] | None:
    """``(prepare, core)``, or None where nothing depends on ``steady`` inputs alone.

    ``prepare`` takes the steady inputs and gives ``steady.0``, ``steady.1``, ...; ``core`` takes those and
    the other inputs and gives the outputs of ``model``, which is used up. Shapes must be static.
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
    """Shapes are static by now; as constants they tie nothing to the input they were read from."""
    for op in model.get_ordered_ops():
        if op.get_type_name() == "ShapeOf":
            dtype = op.output(0).get_element_type().to_dtype()
            shape = np.array(list(op.input_value(0).get_shape()), dtype)
            op.output(0).replace(ops.constant(shape).output(0))


def _border(model: ov.Model, steady: set[str]) -> list[tuple[ov.Output, list[ov.Input]]]:
    """Outputs that follow from steady inputs alone, with the inputs of other operations that read them."""
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
    """``constant``, ``steady`` (constants and steady inputs behind it) or ``moving``."""
    match op.get_type_name():
        case "Parameter":
            return "steady" if op.get_friendly_name() in steady else "moving"
        case "Result":
            return "moving"
        case _:
            behind = {kinds[value.get_node().get_friendly_name()] for value in op.input_values()}
            return "moving" if "moving" in behind else ("steady" if "steady" in behind else "constant")
