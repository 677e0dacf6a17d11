"""ONNX: the rate form of a converted network."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import torch

from ..conversion.errors import ConversionError
from ..conversion.inputs import leaves
from ..conversion.network import ConvertedNetwork
from ..files import write_bytes
from ..hub.exporting import export, quiet_torch
from .rates import rate_form

__all__ = ["to_onnx"]


def to_onnx(
    snn: ConvertedNetwork,
    path: str | Path,
    example: Any,
    *,
    T: int | None = None,
    dynamic_batch: bool = True,
    opset_version: int | None = None,
) -> Path:
    """Write the *rate form* of a converted network as an ONNX file of standard operators.

    ONNX has no spiking neurons. What is written is one pass on counts: every neuron is
    ``clip(floor((T z + v_init) / θ), 0, T)`` of its mean current z, the answer of
    ``method="parallel"`` (:func:`snnkernels.interop.rates.rate_form`), and not the T steps of the
    spiking network, whose currents come unevenly. Runtimes sum in other orders, so a count may
    differ by one where a current lies at the edge of a level, within rounding.

    Args:
        snn: of :func:`snnkernels.convert`, its neurons plain (opi, qcfs, light, parallel, ...;
            ttfs and bit_serial as well).
        path: of the file; one that is there is replaced when the new one is whole.
        example: inputs, ``[B, *]``; of several a tuple by position or a dict by name.
        T: number of steps that the counts are of; None: that of the conversion.
        dynamic_batch: the file takes any batch (needs an example of at least 2), else that of
            ``example``.
        opset_version: of ONNX; None: torch's default.

    Returns:
        The path.

    Raises:
        ConversionError: the network has no rate form, or torch cannot export it; says why.
        ImportError: onnx or onnxscript is not installed.
        TypeError, ValueError: an argument is not allowed.
        OSError: the file cannot be written.
    """
    if not isinstance(snn, ConvertedNetwork):
        raise TypeError(f"snn must be a ConvertedNetwork, got {type(snn).__name__}")
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"to_onnx needs {error.name or 'onnx'}: pip install 'snnkernels[onnx]'"
        ) from error
    newest = onnx.defs.onnx_opset_version()
    if opset_version is not None and not 1 <= opset_version <= newest:
        raise ValueError(f"opset_version={opset_version!r} must be within 1..{newest}")
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path={str(path)!r}: there is no folder {path.parent}")
    # Operators of torch alone: of ours the exporter knows nothing.
    program = export(rate_form(snn), example, T=T, dynamic_batch=dynamic_batch, operators="torch")
    with torch.no_grad():
        outputs = [name.partition(".")[2] for name, _ in leaves(_answer(program))]
    names = [name or "output" for name in outputs]
    count = sum(s.kind.name == "USER_INPUT" for s in program.graph_signature.input_specs)
    given = list(snn.inputs) if count == len(snn.inputs) else None
    with tempfile.TemporaryDirectory(prefix="snnkernels-") as folder:
        part = f"{folder}/net.onnx"
        try:
            with quiet_torch():
                torch.onnx.export(
                    program, (), part, input_names=given, output_names=names, dynamo=True,
                    opset_version=opset_version, external_data=False, verbose=False,
                )  # fmt: skip
        except Exception as error:
            raise ConversionError(
                f"torch.onnx cannot write this network: {type(error).__name__}: {error}"
            ) from error
        model = onnx.load(part)
    _check_opset(model, opset_version)
    if dynamic_batch:
        _name_batch(model)
    onnx.checker.check_model(model, full_check=True)
    write_bytes(path, model.SerializeToString())
    return path


def _check_opset(model: Any, wanted: int | None) -> None:
    """The exporter keeps its own version, and only logs it, where it cannot convert the file."""
    found = {i.domain: i.version for i in model.opset_import}.get("")
    if wanted is not None and found != wanted:
        raise ValueError(
            f"opset_version={wanted}: torch.onnx can write this network in version {found} only; "
            "use that, or leave opset_version out"
        )


def _name_batch(model: Any) -> None:
    """Call the size of the batch by a name instead of torch's symbol."""
    symbols = {d.dim_param for i in model.graph.input for d in i.type.tensor_type.shape.dim[:1]}
    symbols.discard("")
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            for symbol in symbols if dim.dim_param else ():
                dim.dim_param = re.sub(rf"\b{re.escape(symbol)}\b", "batch", dim.dim_param)


def _answer(program: Any) -> Any:
    """What the program gives for its own example."""
    args, kwargs = program.example_inputs
    return program.module()(*args, **kwargs)
