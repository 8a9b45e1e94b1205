"""Weights stored in fp16 or bf16 stay what they are until OpenVINO packs them for its kernels.

OpenVINO computes no fp16 on most CPUs. Left alone it turns every such weight into fp32, and then once more
into the layout of its kernels: four times the bytes of the file. Marked as compressed, a weight is read from
the (mapped) file straight into its layout: as many bytes as the file has in bf16, twice as many in fp32.
"""

from __future__ import annotations

import openvino as ov
from openvino import opset8 as ops

__all__ = ["keep_half_weights"]

# How OpenVINO knows a Convert that it should not fold: only that the entry is there counts.
_MARK = "decompression_0"


def keep_half_weights(model: ov.Model) -> None:
    """Rewrite ``model`` in place to compute in fp32 on half-precision weights, each behind a marked Convert.

    What it is run in is said at compilation; a graph written in fp16 or bf16 loses nothing by that.
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
