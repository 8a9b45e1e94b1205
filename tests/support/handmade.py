"""A bundle made by hand: graphs of a few nodes, whose output a test can compute on paper.

Encoder: mean of each 8x8 block. Decoder: each latent pixel becomes an 8x8 block. UNet (epsilon):
``sample / 2 + strength * mean(style_tokens)``; of a video-to-video bundle, plus a quarter of the mean of the
window's frames. Style encoder: tokens that all hold the picture's mean.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from std_rt.core.bundle import Bundle, write_bundle
from std_rt.core.schedule import NoiseSchedule, trajectory_timesteps

SIDE = 32  # style picture
TOKENS, DIM, POOLED, SEQUENCE, TEXT = 2, 4, 6, 3, 5
ETA = 0.5


def write_handmade(
    folder: Path,
    *,
    gamma: float = 0.0,
    sequence: int = SEQUENCE,
    guidance: tuple[str, float] = ("none", 1.0),
    negative: float | None = None,
    int8: bool = False,
    window: tuple[int, int] | None = None,
) -> Bundle:
    """Write the bundle to ``folder``, named after it; its negatives are filled with ``negative``.

    ``int8`` adds an int8 form of the UNet: ``sample / 4 + ...``, so that a test sees which form runs.
    """

    def fill(partial: Path) -> dict[str, Any]:
        models = _models(sequence, of_windows=window is not None)
        graphs = {name: _write_graph(partial, name, model) for name, model in models.items()}
        text = {"encoder_hidden_states": (1, sequence, TEXT), "text_embeds": (1, POOLED)}
        stored = {name: np.zeros(shape, np.float32) for name, shape in text.items()}
        if negative is not None:
            shapes = {**text, "style_tokens": (1, TOKENS, DIM)}
            stored |= {
                f"negative_{name}": np.full(shape, negative, np.float32) for name, shape in shapes.items()
            }
        np.savez(partial / "conditioning.npz", **stored)  # type: ignore[arg-type]
        mode, scale = guidance
        manifest = _manifest(folder.name, graphs, gamma) | {"guidance": {"mode": mode, "scale": scale}}
        if window is not None:
            manifest |= {"window": {"frames": window[0], "overlap": window[1]}}
        return manifest | ({"int8": _write_int8(partial, sequence)} if int8 else {})

    return write_bundle(folder, fill)


def _manifest(name: str, graphs: dict[str, Any], gamma: float) -> dict[str, Any]:
    return {
        "name": name,
        "created_with": {"handmade": "1"},
        "size": {"default": [64, 64], "multiple": 8, "min": 16, "max": 512},
        "vae_scale": 8,
        "latent_channels": 3,
        "schedule": _schedule(gamma),
        "guidance": {"mode": "none", "scale": 1.0},
        "style": {
            "image_px": SIDE,
            "tokens": TOKENS,
            "dim": DIM,
            "gives_text_embeds": True,
            "strength_range": [0, 2],
            "layout": {},
        },
        "text": {"mode": "none", "file": "conditioning.npz"},
        "precision": {graph: {"compute": "fp32", "weights": "fp32"} for graph in graphs},
        "graphs": graphs,
        "sources": [{"role": "unet", "id": "handmade", "sha256": "0" * 64, "licence": "Apache-2.0"}],
        "parity": {},
    }


def _schedule(gamma: float) -> dict[str, Any]:
    schedule = NoiseSchedule.scaled_linear()
    steps = {}
    for count in (1, 2, 4):
        timesteps = trajectory_timesteps(ETA, count)
        rows = [
            [c.alpha_t, c.sigma_t, c.alpha_s, c.sigma_s, c.noise]
            for c in schedule.coefficients(timesteps, gamma)
        ]
        steps[str(count)] = {"timesteps": timesteps, "coefficients": rows}
    tau = steps["1"]["timesteps"][0]
    return {
        "prediction_type": "epsilon",
        "eta": ETA,
        "tau": tau,
        "grid": 50,
        "gamma": gamma,
        "default_steps": 4,
        "steps": steps,
    }


def _models(sequence: int, *, of_windows: bool = False) -> dict[str, Any]:
    seen = [
        ("ReduceMean", ["sample", "frames"], "scene", {"keepdims": 1}),
        ("Mul", ["scene", "quarter"], "part", {}),
        ("Add", ["alone", "part"], "noise_pred", {}),
    ]
    unet_inputs = {
        "sample": ["batch", 3, "height", "width"],
        "timestep": ["batch"],
        "encoder_hidden_states": ["batch", sequence, TEXT],
        "text_embeds": ["batch", POOLED],
        "time_ids": ["batch", 6],
        "style_tokens": ["batch", TOKENS, DIM],
        "style_strength": ["batch"],
    }
    return {
        "style_encoder": _model(
            {"style_image": ["batch", 3, SIDE, SIDE]},
            {"style_tokens": ["batch", TOKENS, DIM], "text_embeds": ["batch", POOLED]},
            [
                ("ReduceMean", ["style_image", "axes"], "mean", {"keepdims": 1}),
                ("Reshape", ["mean", "flat"], "column", {}),
                ("Add", ["column", "token_zeros"], "style_tokens", {}),
                ("Reshape", ["mean", "row"], "line", {}),
                ("Add", ["line", "pooled_zeros"], "text_embeds", {}),
            ],
            {
                "axes": np.array([1, 2, 3]),
                "flat": np.array([-1, 1, 1]),
                "row": np.array([-1, 1]),
                "token_zeros": np.zeros((1, TOKENS, DIM), np.float32),
                "pooled_zeros": np.zeros((1, POOLED), np.float32),
            },
        ),
        "vae_encoder": _model(
            {"image": ["batch", 3, "height", "width"]},
            {"latents": ["batch", 3, "h", "w"]},
            [("AveragePool", ["image"], "latents", {"kernel_shape": [8, 8], "strides": [8, 8]})],
            {},
        ),
        "unet": _model(
            unet_inputs,
            {"noise_pred": ["batch", 3, "height", "width"]},
            [
                ("ReduceMean", ["style_tokens", "last_axes"], "mean", {"keepdims": 0}),
                ("Mul", ["mean", "style_strength"], "level", {}),
                ("Reshape", ["level", "flat"], "eps", {}),
                ("Mul", ["sample", "half"], "share", {}),
                ("Add", ["share", "eps"], "alone" if of_windows else "noise_pred", {}),
                *(seen if of_windows else []),
            ],
            {
                "last_axes": np.array([1, 2]),
                "flat": np.array([-1, 1, 1, 1]),
                "half": np.full((), 0.5, np.float32),
                **({"frames": np.array([0]), "quarter": np.full((), 0.25, np.float32)} if of_windows else {}),
            },
        ),
        "vae_decoder": _model(
            {"latents": ["batch", 3, "height", "width"]},
            {"image": ["batch", 3, "h", "w"]},
            [("Resize", ["latents", "", "scales"], "image", {"mode": "nearest"})],
            {"scales": np.array([1, 1, 8, 8], np.float32)},
        ),
    }


def _model(
    inputs: dict[str, list[Any]],
    outputs: dict[str, list[Any]],
    nodes: list[tuple[str, list[str], str, dict[str, Any]]],
    constants: dict[str, np.ndarray],
) -> Any:
    from onnx import TensorProto, helper, numpy_helper

    def ports(shapes: dict[str, list[Any]]) -> list[Any]:
        return [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()
        ]

    made = [helper.make_node(kind, given, [out], **attributes) for kind, given, out, attributes in nodes]
    values = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(made, "handmade", ports(inputs), ports(outputs), values)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def _write_graph(folder: Path, name: str, model: Any) -> dict[str, Any]:
    (folder / f"{name}.onnx").write_bytes(model.SerializeToString())
    (folder / f"{name}.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    return {
        "file": f"{name}.onnx",
        "weights": f"{name}.safetensors",
        "class": "Handmade",
        "config": {},
        "inputs": [_port(port) for port in model.graph.input],
        "outputs": [_port(port) for port in model.graph.output],
    }


def _write_int8(folder: Path, sequence: int) -> dict[str, Any]:
    from onnx import numpy_helper

    unet = _models(sequence)["unet"]
    half = next(tensor for tensor in unet.graph.initializer if tensor.name == "half")
    half.CopyFrom(numpy_helper.from_array(np.full((), 0.25, np.float32), "half"))
    (folder / "unet.int8.onnx").write_bytes(unet.SerializeToString())
    near = {"psnr_db": 40.0, "worst_db": 35.0, "kept_float": []}
    return {"graphs": {"unet": {"file": "unet.int8.onnx", "weights": "unet.safetensors", **near}}}


def _port(port: Any) -> dict[str, Any]:
    axes = port.type.tensor_type.shape.dim
    return {
        "name": port.name,
        "shape": [a.dim_param or a.dim_value for a in axes],
        "dtype": "float32",
        "meaning": "",
    }
