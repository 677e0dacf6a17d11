"""The engine's layer against a dense convolution of the same spikes, by the rate of spikes.

    python benchmarks/bench_spike_conv.py

Prediction (operations): a dense 3x3 convolution takes 9 C_in C_out multiply-adds a position and
step, 16 to 32 of them a cycle and core; the layer adds C_out weights for
each spike in the window, 16 a load of the first-level cache, so it should win until about half of
the neurons fire and by their number below that. Ratios of interleaved medians in one process: time
of ``torch.conv2d`` alone (NCHW, channels_last), without neurons, over that of the layer with its
neurons and packed output. Four in ten neurons fire at all, at random steps; images as batch 8,
T = 16. Sums are compared first. Rows go to ``results/spike_conv_cpu.csv``.
"""

from __future__ import annotations

import itertools

import torch
from common import arguments, interleaved, save, start, table

from snnkernels.kernels.spike_conv import spike_conv
from snnkernels.kernels.spike_maps import Layer, SpikeMap, branches_of

LAYERS = ((64, 64, 32, 1), (64, 128, 16, 2), (128, 128, 16, 1), (256, 256, 8, 1), (512, 512, 4, 1))
RATES = (0.02, 0.05, 0.1, 0.2, 0.4)
ALIVE = 0.4
COLUMNS = ("layer", "pool", "rate", "NCHW / ours", "channels_last / ours", "float32 / int16")


def spikes_of(rate: float, T: int, batch: int, channels: int, side: int) -> torch.Tensor:
    """Spikes ``[T, B, C, H, W]`` of which ``rate`` are 1."""
    alive = max(ALIVE, rate)
    chance = (torch.rand(1, batch, channels, side, side) < alive) * (rate / alive)
    return (torch.rand(T, batch, channels, side, side) < chance).float()


def main() -> None:
    """Compares, then times; ``--quick`` takes one small layer."""
    args = start(arguments(__doc__).parse_args())
    batch, T = (2, 4) if args.quick else (8, 16)
    rows = []
    cases = itertools.product(LAYERS[-1:] if args.quick else LAYERS, RATES)
    for (inner, out, side, pool), rate in cases:
        torch.manual_seed(0)
        spikes = spikes_of(rate, T, batch, inner, side * pool)
        weight = torch.randn(out, inner, 3, 3) / 10
        source = SpikeMap.of(spikes)
        theta = torch.ones(out)
        layer = Layer(out // 64, None, theta, theta / 2)
        mine = [
            [(source, b) for b in branches_of(weight, padding=(1, 1), pool=(pool,) * 2, int16=i)]
            for i in (False, True)
        ]
        # A dense layer gets its input pooled: the pool costs it nothing here.
        x = torch.nn.functional.avg_pool2d(spikes.flatten(0, 1), pool, divisor_override=1)
        last = x.contiguous(memory_format=torch.channels_last)
        want = torch.conv2d(x, weight, padding=1).unflatten(0, (T, batch)).permute(0, 1, 3, 4, 2)
        got = spike_conv(mine[0], layer, spikes=False, currents=True)[2]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        times = interleaved(
            {
                "float32": lambda: spike_conv(mine[0], layer),  # noqa: B023
                "int16": lambda: spike_conv(mine[1], layer),  # noqa: B023
                "NCHW": lambda: torch.conv2d(x, weight, padding=1),  # noqa: B023
                "channels_last": lambda: torch.conv2d(last, weight, padding=1),  # noqa: B023
            },
            rounds=args.rounds,
        )
        row: dict[str, object] = {
            "layer": f"{inner}-{out} @ {side}x{side}", "pool": pool, "rate": rate,
            "batch": batch, "T": T,
        }  # fmt: skip
        for name in ("NCHW", "channels_last"):
            row[f"{name} / ours"] = f"{times[name] / times['float32']:.3g}"
        row["float32 / int16"] = f"{times['float32'] / times['int16']:.3g}"
        rows.append(row)
    print(table(rows, COLUMNS))
    print("rows:", save("spike_conv_cpu", rows, folder=args.out))


if __name__ == "__main__":
    main()
