"""The state of whole networks, by SpikingJelly's names: reset, cut off, single or many steps."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

__all__ = ["detach_net", "reset_net", "set_step_mode"]

# SpikingJelly's wrappers, whose modules keep their step mode: the wrapper calls them its own way.
_KEEP = {
    "StepModeContainer", "MultiStepContainer", "SeqToANNContainer", "TLastMultiStepContainer",
    "TLastSeqToANNContainer", "ElementWiseRecurrentContainer", "LinearRecurrentContainer",
}  # fmt: skip


def reset_net(net: nn.Module) -> None:
    """Resets every module in ``net`` that has a ``reset()``, as SpikingJelly's does.

    Args:
        net: ours, somebody else's, or a mixture; ``net`` itself included.

    Raises:
        TypeError: ``net`` is no module.
        Exception: what a module's own ``reset()`` raises.
    """
    _call(net, "reset")


def detach_net(net: nn.Module) -> None:
    """Cuts the state of every module in ``net`` that has a ``detach()`` from earlier calls' graphs.

    Membranes keep their values; gradients end there (truncated back-propagation through time).

    Args:
        net: ours, somebody else's, or a mixture; ``net`` itself included.

    Raises:
        TypeError: ``net`` is no module.
        Exception: what a module's own ``detach()`` raises.
    """
    _call(net, "detach")


def set_step_mode(net: nn.Module, step_mode: str) -> None:
    """Sets ``step_mode`` of every module in ``net`` that has one, as SpikingJelly's does.

    Modules inside SpikingJelly's containers (``SeqToANNContainer``, ``MultiStepContainer``, ...)
    keep theirs, as there. Nothing is changed if a module says (``supported_step_mode()``) that it
    does not offer ``step_mode``.

    Args:
        net: ours, somebody else's, or a mixture; ``net`` itself included.
        step_mode: ``"s"``: a call is one step, ``[*shape]``; ``"m"``: many, ``[T, *shape]``.

    Raises:
        TypeError: ``net`` is no module.
        ValueError: ``step_mode`` is neither, or a module does not offer it; it is named.
    """
    if step_mode not in ("s", "m"):
        raise ValueError(f"step_mode={step_mode!r} is unknown; allowed are 's' and 'm'")
    found = [(name, m) for name, m in _settable(net) if hasattr(m, "step_mode")]
    for name, module in found:
        offered = getattr(module, "supported_step_mode", None)
        if callable(offered) and step_mode not in (modes := tuple(offered())):
            raise ValueError(
                f"{_called(name, module)} does not offer step_mode={step_mode!r}; "
                f"it offers {', '.join(map(repr, modes))}. No step mode was changed"
            )
    for name, module in found:
        try:
            module.step_mode = step_mode  # type: ignore[assignment]
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(
                f"{_called(name, module)} does not take step_mode={step_mode!r}: {error}"
            ) from error


def _call(net: nn.Module, method: str) -> None:
    """Call ``method`` of every module that has it."""
    for _, module in _named(net):
        found = getattr(module, method, None)
        if callable(found):
            found()


def _named(net: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if not isinstance(net, nn.Module):
        raise TypeError(f"net must be a torch.nn.Module, got {type(net).__name__}")
    return net.named_modules()


def _settable(net: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Named modules without what is inside of wrappers."""
    closed: list[str] = []
    for name, module in _named(net):
        if any(name.startswith(prefix) for prefix in closed):
            continue
        yield name, module
        if _KEEP & {cls.__name__ for cls in type(module).__mro__}:
            closed.append(f"{name}." if name else "")


def _called(name: str, module: nn.Module) -> str:
    return f"{name or 'the network'} ({type(module).__name__})"
