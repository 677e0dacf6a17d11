"""The engine: converted networks lowered to plans that run several times faster.

On CPUs spikes stay packed between layers, 64 channels in a word. A layer of the plan is one kernel
(csrc/spike_conv_cpu.h): it adds the weights of those inputs that fired, all steps of a tap of the
window one after another, so that the weights of a neuron that fires often stay in L1; its neurons
run on the currents before those leave L1, and write the next layer's words. Nothing is done where
there is no spike, and few neurons fire at a step.
"""

from __future__ import annotations

from .plan import ALL_PASSES, Plan, lower

__all__ = ["ALL_PASSES", "Plan", "lower"]
