"""A network as ONNX, compared with torch; the packages for it are an optional extra."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dml_dist.errors import ConfigError, RunError
from dml_dist.export.bundle import INPUT, OUTPUT, Embedder

EXTRA = ("onnx", "onnxscript", "onnxruntime")
"""Packages of the optional extra `export`; torch's exporter needs the first two."""

TOLERANCE = 1e-4
"""Largest difference of ONNX's and torch's float32 embeddings, over the largest coordinate."""


def require_extra() -> None:
    """Refuse to go on without the packages of the extra.

    Raises:
        ConfigError: If one is missing; it names the extra.
    """
    for package in EXTRA:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ConfigError(
                f"required the package {package} to export a network as ONNX, got {error}; "
                "install the extra: pip install 'dml-dist[export]'"
            ) from None


def export_onnx(embedder: Embedder, images: Tensor, path: Path) -> dict[str, Any]:
    """Write a network as ONNX with any batch size, and compare it with torch.

    Args:
        embedder: On the CPU, float32, in evaluation mode.
        images: (B, 3, H, W) float32, B >= 2; batches of B and of 1 are compared.
        path: The file.

    Returns:
        opset, largest_difference and tolerance, for the manifest.

    Raises:
        RunError: If torch cannot export it, or the embeddings differ by more than the tolerance.
    """
    batch = torch.export.Dim("batch", min=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's, about itself
            program = torch.onnx.export(
                embedder,
                (images,),
                dynamo=True,
                dynamic_shapes={INPUT: {0: batch}},
                input_names=[INPUT],
                output_names=[OUTPUT],
                verbose=False,
            )
        assert program is not None
        program.save(str(path))
    except Exception as error:  # The exporter raises many classes, some private.
        raise RunError(
            f"required a network that torch can export as ONNX, got {type(error).__name__}: "
            f"{str(error)[:600]}; a custom backbone may not branch on values of its input"
        ) from error
    difference = _difference(embedder, images, path)
    if not difference <= TOLERANCE:
        raise RunError(
            f"required ONNX embeddings within {TOLERANCE:g} of torch's (over the largest "
            f"coordinate), got a difference of {difference:.2e}; do not use this network outside "
            "of torch"
        )
    return {
        "input": INPUT,
        "output": OUTPUT,
        "opset": program.model.opset_imports[""],
        "largest_difference": difference,
        "tolerance": TOLERANCE,
    }


@torch.no_grad()
def _difference(embedder: Embedder, images: Tensor, path: Path) -> float:
    """Return the largest difference of coordinates between ONNX and torch, over the largest one."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    worst = 0.0
    for part in (images, images[:1]):
        expected = embedder(part).numpy()
        found = session.run([OUTPUT], {INPUT: part.numpy()})[0]
        size = float(np.abs(expected).max()) or 1.0
        worst = max(worst, float(np.abs(found - expected).max()) / size)
    return worst
