"""ONNX export, verified against torch; its packages are an optional extra."""

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
"""Largest allowed difference between ONNX and torch, relative to the largest coordinate."""


def require_extra() -> None:
    """Check that the packages of the extra are installed.

    Raises:
        ConfigError: If one is missing; it names the extra.
    """
    for package in EXTRA:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ConfigError(
                f"export to ONNX needs the package {package}, which cannot be imported ({error}); "
                "run `pip install 'dml-dist[export]'`"
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
            f"torch cannot export this network as ONNX ({type(error).__name__}: "
            f"{str(error)[:600]}); a custom backbone must not branch on values of its input"
        ) from error
    difference = _difference(embedder, images, path)
    if not difference <= TOLERANCE:
        raise RunError(
            f"ONNX embeddings differ from torch's by {difference:.2e} of the largest coordinate, "
            f"more than the tolerance {TOLERANCE:g}; use this network with torch only"
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
    """Return the largest difference between ONNX and torch, relative to the largest coordinate."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    worst = 0.0
    for part in (images, images[:1]):
        expected = embedder(part).numpy()
        found = session.run([OUTPUT], {INPUT: part.numpy()})[0]
        size = float(np.abs(expected).max()) or 1.0
        worst = max(worst, float(np.abs(found - expected).max()) / size)
    return worst
