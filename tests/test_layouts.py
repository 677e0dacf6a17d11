"""Currents wherever they lie in memory: the same bits, nothing copied, outputs laid out alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import (
    DTYPES,
    Backend,
    assert_close,
    assert_same_bits,
    currents,
    dtype_id,
    generator,
    moved,
    spy,
)
from torch import Tensor

from snnkernels import IFNode
from snnkernels.functional import if_count, if_multi_step, if_packed, if_rate, if_run
from snnkernels.kernels import backends, layouts, params

T, SHAPE = 9, (3, 4, 5, 6)


def batch_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def channels_last(x: Tensor) -> Tensor:
    flat = x.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    return flat.unflatten(0, x.shape[:2])


def channels_last_batch_first(x: Tensor) -> Tensor:
    return channels_last(x.transpose(0, 1)).transpose(0, 1)


def padded_rows(x: Tensor) -> Tensor:
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 3), float("nan"), dtype=x.dtype)
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


def channel_slice(x: Tensor) -> Tensor:
    wide = torch.full((x.shape[0], x.shape[1], x.shape[2] + 2, *x.shape[3:]), float("nan"))
    wide = wide.to(x.dtype)
    wide[:, :, 1:-1] = x
    return wide[:, :, 1:-1]


def every_other_step(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, 0)[::2]


IN_PLACE = {
    f.__name__: f
    for f in (
        batch_first,
        channels_last,
        channels_last_batch_first,
        padded_rows,
        channel_slice,
        every_other_step,
    )
}


@pytest.mark.parametrize("name", IN_PLACE)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("form", ["number", "channel", "position", "full"])
def test_same_bits_wherever_it_lies(
    level: Backend, name: str, dtype: torch.dtype, form: str
) -> None:
    plain = currents(T, *SHAPE, seed=3, dtype=dtype)
    g = generator(5)
    sizes = {"number": (), "channel": SHAPE[1:2], "position": SHAPE[1:], "full": SHAPE}[form]
    draw = lambda: moved(0.5 + torch.randint(0, 5, sizes, generator=g) / 8, level.device)  # noqa: E731
    given = {"v": draw(), "v_threshold": draw(), "amplitude": draw(), "channel_dim": 1}
    outputs = ("spikes", "packed", "count", "v_seq")
    x = IN_PLACE[name](plain)
    laid = x.to(level.device) if level.device != "cpu" else x
    if level.device != "cpu":
        laid = torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=level.device).copy_(x)
    assert not laid.is_contiguous()
    want = if_run(moved(plain, level.device), **given, outputs=outputs)
    got = if_run(laid, **given, outputs=outputs)
    for field in ("spikes", "count", "v_seq", "v"):
        assert_same_bits(getattr(got, field), getattr(want, field))
    assert torch.equal(got.packed.words, want.packed.words)
    # Plain kernels, one output each.
    for arguments in ({}, {"spike_dtype": torch.uint8}):
        a, v, _ = if_multi_step(laid, **given, **arguments)
        assert_same_bits(a, if_multi_step(moved(plain, level.device), **given, **arguments)[0])
        assert_same_bits(v, want.v)
    del given["amplitude"]
    assert_same_bits(if_count(laid, **given)[0], want.count)
    assert torch.equal(if_packed(laid, **given)[0].words, want.packed.words)


@pytest.mark.parametrize("name", IN_PLACE)
@pytest.mark.parametrize("gpu", [False, True])
def test_nothing_is_copied(monkeypatch: pytest.MonkeyPatch, name: str, gpu: bool) -> None:
    """The kernels are handed the address of x itself, forward and backward."""
    seen: list[tuple[str, bytes]] = []
    watcher = spy("watcher", lambda kernel, p, device: seen.append((kernel, p)), gpu)
    monkeypatch.setitem(backends._MAKERS, "watcher", lambda: watcher)
    monkeypatch.setitem(backends._made, "watcher", watcher)
    x = IN_PLACE[name](currents(T, *SHAPE)).requires_grad_()
    with backends.use_backend("watcher"):
        spikes, _, _ = if_multi_step(x)
        spikes.backward(torch.ones_like(spikes))
    assert [kernel.split("_")[0] for kernel, _ in seen] in (
        ["forward", "backward"],
        ["general", "backward"],
    )
    import numpy as np

    dtypes = {
        "forward": params.IF_FORWARD,
        "general": params.IF_GENERAL,
        "backward": params.IF_BACKWARD,
        "backward_general": params.IF_BACKWARD_GENERAL,
    }
    for kernel, packed in seen:
        record = np.frombuffer(packed, dtypes[kernel])
        record = record if kernel in ("forward", "backward") else record["base"]
        assert int(record["x"][0]) == x.data_ptr()


def written_into(store: Tensor, out: Tensor, x: Tensor, **how: Any) -> None:
    """``out``, part of ``store``, gets the right spikes and ``store`` nothing else."""
    store.fill_(7)
    spikes, v, v_seq = if_multi_step(x, 0.5, out=out, store_v_seq=True, **how)
    want = if_multi_step(x.contiguous(), 0.5, store_v_seq=True, **how)
    assert spikes.data_ptr() == out.data_ptr()
    for got, expected in zip((spikes, v, v_seq), want, strict=True):
        assert_same_bits(got, expected)
    out.fill_(7)
    assert bool((store == 7).all())


@pytest.mark.parametrize("name", [*IN_PLACE, "contiguous", "expanded", "neurons_first", "gaps"])
@pytest.mark.parametrize("into", [*IN_PLACE, "contiguous", "neurons_first", "gaps"])
def test_out_wherever_it_lies(backend: Backend, name: str, into: str) -> None:
    forms = {
        **IN_PLACE,
        "contiguous": lambda t: t.clone(memory_format=torch.contiguous_format),
        "expanded": lambda t: t[:1].expand(t.shape),
        "neurons_first": lambda t: t.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0),
        "gaps": lambda t: t.repeat_interleave(2, 4)[..., ::2],
    }
    x = forms[name](moved(currents(T, *SHAPE), backend.device))
    out = forms[into](torch.zeros(T, *SHAPE, device=backend.device))
    store = out if out._base is None else out._base
    assert store.untyped_storage().data_ptr() == out.untyped_storage().data_ptr()
    written_into(store, out, x)
    # In the layout of a user with the batch first.
    spikes = if_multi_step(x.transpose(0, 1), 0.5, out=out.fill_(7).transpose(0, 1), layout="N,T")[
        0
    ]
    assert_same_bits(spikes.transpose(0, 1), if_multi_step(x.contiguous(), 0.5)[0])
    assert spikes.data_ptr() == out.data_ptr()


def test_out_of_a_constant_current(backend: Backend) -> None:
    for x in (currents(3, 4), currents(4, 3).t(), currents(3, 8)[:, ::2], currents(3, 8)[:, 2:6]):
        x = moved(x, backend.device)
        store = torch.zeros(5, 3, 8, device=backend.device)
        for out in (store[..., ::2], store[..., :4], store.view(-1)[:60].view(5, 3, 4)):
            store.fill_(7)
            spikes = if_multi_step(x, 0.5, T=5, out=out)[0]
            assert_same_bits(spikes, if_multi_step(x.contiguous(), 0.5, T=5)[0])
            assert spikes.data_ptr() == out.data_ptr()
            out.fill_(7)
            assert bool((store == 7).all())


def test_out_that_shares_memory() -> None:
    base = torch.rand(3, 4 * 64)
    for x, out in (
        (base[1:3, :64], base[0:2, 1:65]),
        (base[:2], base[:2]),
        (base[:2, 1:], base[:2, :-1]),
        (base.view(-1)[::2][:64].view(2, 32), base.view(-1)[:64].view(2, 32)),
    ):
        with pytest.raises(ValueError, match="out shares memory with x_seq"):
            if_multi_step(x, out=out)
    # Interleaved, but disjoint.
    x, out = base.view(-1)[0:64:2].view(2, 16), base.view(-1)[1:65:2].view(2, 16)
    want = if_multi_step(x.clone())[0]
    assert_same_bits(if_multi_step(x, out=out)[0], want)
    with pytest.raises(ValueError, match="out shares memory with itself"):
        if_multi_step(torch.rand(4, 3), out=torch.zeros(3).expand(4, 3))


def test_out_of_a_compiled_function() -> None:
    def call(x: Tensor, out: Tensor) -> Tensor:
        return if_multi_step(x, 0.5, out=out)[0]

    x, out = currents(T, 6), torch.zeros(T, 6)
    made = torch.compile(call, backend="aot_eager", fullgraph=True)(x, out)
    assert_same_bits(made, if_multi_step(x, 0.5)[0])
    assert_same_bits(out, made)


@pytest.mark.parametrize("layout", ["N,T", "T*N", "N*T"])
@pytest.mark.parametrize("out", [3, torch.zeros(6), torch.zeros(5, 4, 2)], ids=str)
def test_bad_out_in_any_layout(layout: str, out: Any) -> None:
    x = torch.zeros(6, 4, 2)
    with pytest.raises((ValueError, TypeError), match="out "):
        if_multi_step(x, out=out, layout=layout, T=None if layout == "N,T" else 3)


def test_dense_outputs_lie_as_their_input() -> None:
    for f in (batch_first, channels_last, channels_last_batch_first):
        x = f(currents(T, *SHAPE))
        spikes, v, v_seq = if_multi_step(x, store_v_seq=True)
        assert spikes.stride() == x.stride() == v_seq.stride()
        # v is dense, in the order of x.
        order = sorted(range(len(SHAPE)), key=lambda d: -x.stride(d + 1))
        assert v.permute(order).is_contiguous()
        # And comes back without a copy.
        found = layouts.of(x, False)
        assert found.view(v).is_contiguous()


def test_every_back_end_lays_its_outputs_out_alike(backend: Backend) -> None:
    plain = moved(currents(T, *SHAPE), backend.device)
    reverse = plain.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0)
    for x in (plain, reverse, *(f(plain) for f in IN_PLACE.values())):
        run = if_run(x, outputs=("spikes", "count", "v_seq", "charge_seq"), count_at=(3, 5))
        with backends.use_backend("reference"):
            want = if_run(x, outputs=("spikes", "count", "v_seq", "charge_seq"), count_at=(3, 5))
        for a, b in zip(run, want, strict=True):
            assert a is b is None or a.stride() == b.stride()


def test_unreadable_layouts_are_copied_not_refused(backend: Backend) -> None:
    plain = moved(currents(T, 3, 8), backend.device)
    for x in (
        plain.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        plain.repeat_interleave(2, -1)[..., ::2],
        plain[:, :1].expand(T, 3, 8),
    ):
        assert_same_bits(if_multi_step(x)[0], if_multi_step(x.contiguous())[0])


def test_repeated_over_time_is_a_constant_current(backend: Backend) -> None:
    row = moved(currents(3, 50), backend.device)
    x = row.expand(T, 3, 50)
    assert x.stride(0) == 0
    a, b = if_multi_step(x, 0.5), if_multi_step(row, 0.5, T=T)
    assert_same_bits(a[0], b[0])
    assert_same_bits(a[1], b[1])
    leaf = row.clone().requires_grad_()
    weights = moved(currents(T, 3, 50, seed=1), backend.device)
    (one,) = torch.autograd.grad((if_multi_step(leaf.expand(T, 3, 50))[0] * weights).sum(), leaf)
    (two,) = torch.autograd.grad((if_multi_step(leaf, T=T)[0] * weights).sum(), leaf)
    assert_close(one, two, 1e-6)


@pytest.mark.parametrize("name", IN_PLACE)
@pytest.mark.parametrize("grad", ["alike", "contiguous", "expanded", *IN_PLACE])
def test_gradients_wherever_they_lie(kernel: Backend, name: str, grad: str) -> None:
    plain = moved(currents(T, *SHAPE, seed=1), kernel.device)
    g = moved(currents(T, *SHAPE, seed=2), kernel.device)
    if grad == "expanded":
        g = g[:1].expand(T, *SHAPE)
    th = moved(torch.tensor([0.75, 1.0, 1.25, 1.5]), kernel.device)

    def gradients(x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_(), th.clone().requires_grad_()]
        spikes, v, _ = if_multi_step(leaves[0], "half", leaves[1], channel_dim=1)
        return torch.autograd.grad((spikes, v), leaves, (g, g[0].contiguous()))

    want = gradients(plain, g.contiguous())
    x = IN_PLACE[name](plain.cpu())
    laid = torch.empty_strided(x.shape, x.stride(), device=kernel.device).copy_(x)
    if grad in IN_PLACE:
        h = IN_PLACE[grad](g.cpu())
        g = torch.empty_strided(h.shape, h.stride(), device=kernel.device).copy_(h)
    elif grad == "alike":
        h = IN_PLACE[name](g.cpu())
        g = torch.empty_strided(h.shape, h.stride(), device=kernel.device).copy_(h)
    got = gradients(laid, g)
    assert_same_bits(got[0], want[0])
    assert_close(got[1], want[1], 1e-6)


# ---- named layouts -------------------------------------------------------------------------------


def arranged(x: Tensor, layout: str) -> tuple[Tensor, dict[str, Any]]:
    """``[T, N, ...]`` as ``layout`` has it, and what says so."""
    if layout == "T,N":
        return x, {}
    if layout == "N,T":
        return x.transpose(0, 1).contiguous(), {"layout": layout}
    merged = x if layout == "T*N" else x.transpose(0, 1).contiguous()
    return merged.flatten(0, 1), {"layout": layout, "T": x.shape[0]}


@pytest.mark.parametrize("layout", ["T,N", "N,T", "T*N", "N*T"])
def test_named_layouts(backend: Backend, layout: str) -> None:
    plain = moved(currents(T, *SHAPE), backend.device)
    th = moved(torch.tensor([0.75, 1.0, 1.25, 1.5]), backend.device)
    given: dict[str, Any] = {"v": "half", "v_threshold": th, "channel_dim": 1}
    x, how = arranged(plain, layout)
    want, v, v_seq = if_multi_step(plain, **given, store_v_seq=True)
    got, last, seq = if_multi_step(x, **given, **how, store_v_seq=True)
    assert got.is_contiguous()
    assert_same_bits(got, arranged(want, layout)[0])
    assert_same_bits(seq, arranged(v_seq, layout)[0])
    assert_same_bits(last, v)
    assert_same_bits(if_count(x, **given, **how)[0], if_count(plain, **given)[0])
    assert_same_bits(if_rate(x, **given, **how)[0], if_rate(plain, **given)[0])
    packed = if_packed(x, **given, **how)[0]
    assert packed.shape == (T, *SHAPE)
    assert_same_bits(packed.unpack(), want)
    if layout != "T,N":
        out = torch.empty_like(x)
        assert if_multi_step(x, **given, **how, out=out)[0].data_ptr() == out.data_ptr()
        assert_same_bits(out, got)


@pytest.mark.parametrize("layout", ["T,N", "N,T", "T*N", "N*T"])
def test_nodes_with_layouts(backend: Backend, layout: str) -> None:
    plain = moved(currents(12, 3, 4), backend.device)
    node = IFNode(v_init="half", layout=layout, **({"T": 6} if "*" in layout else {}))
    want = IFNode(v_init="half")(plain)
    first, second = (arranged(half, layout)[0] for half in plain.split(6))
    got = [node(first), node(second)]
    for mine, theirs in zip(got, want.split(6), strict=True):
        assert_same_bits(mine, arranged(theirs, layout)[0])
    x = first.clone().requires_grad_()
    node.reset()
    node(x).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape


REFUSED: list[tuple[Tensor, dict[str, Any], str]] = [
    (torch.zeros(4, 2), {"layout": "TN"}, "layout='TN' is unknown; allowed: T,N, N,T"),
    (torch.zeros(4), {"layout": "N,T"}, "needs \\[N, T, ...\\], x_seq has 1 dimensions"),
    (torch.zeros(4, 2), {"layout": "N,T", "T": 2}, "T is for a constant current"),
    (torch.zeros(5, 2), {"layout": "T*N", "T": 2}, "does not hold T=2 steps"),
    (torch.zeros(4, 2), {"layout": "T*N", "T": 0}, "T=0 must be at least 1"),
]


@pytest.mark.parametrize(("x", "how", "says"), REFUSED, ids=lambda v: str(v)[:40])
def test_bad_layouts(x: Tensor, how: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        if_multi_step(x, **how)


def test_merged_layouts_need_the_number_of_steps() -> None:
    with pytest.raises(TypeError, match="layout='T\\*N' needs T, the number of steps"):
        if_multi_step(torch.zeros(4, 2), layout="T*N")
