"""What a saved graph may contain: closed lists of functions, methods, attributes and layers.

Nothing is looked up by a name from a file but in these lists, so a file can call nothing else. A
name that this release of torch does not have is left out of its list.
"""

from __future__ import annotations

import builtins
import math
import operator
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..conversion.inputs import network_input

__all__ = ["ATTRIBUTES", "FUNCTIONS", "LAYERS", "METHODS", "NAME_OF_FUNCTION"]


def _words(text: str) -> list[str]:
    return text.split()


# Operations on tensors that torch has as functions, as methods, or both.
_TENSORS = _words(
    """
abs absolute acos acosh add addbmm addcdiv addcmul addmm addmv addr all allclose amax amin aminmax
angle any arccos arccosh arcsin arcsinh arctan arctan2 arctanh argmax argmin argsort asin asinh atan
atan2 atanh baddbmm bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift
bitwise_xor bmm broadcast_to bucketize ceil chunk clamp clamp_max clamp_min clip clone conj
copysign cos cosh count_nonzero cross cummax cummin cumprod cumsum deg2rad detach diag diag_embed
diagonal diff div divide dot eq equal erf erfc erfinv exp exp2 expm1 fix flatten flip fliplr flipud
float_power floor floor_divide fmax fmin fmod frac gather ge greater greater_equal gt hardshrink
heaviside hypot index_add index_copy index_fill index_select inner isclose isfinite isinf isnan
isneginf isposinf kron kthvalue le lerp less less_equal lgamma log log10 log1p log2 log_softmax
logaddexp logaddexp2 logcumsumexp logical_and logical_not logical_or logical_xor logit logsumexp lt
masked_fill masked_scatter masked_select matmul max maximum mean median min minimum mm mode
moveaxis movedim msort mul multiply mv nan_to_num nanmean nanmedian nanquantile nansum narrow ne
neg negative norm not_equal numel outer permute positive pow prelu prod quantile rad2deg ravel
real reciprocal relu remainder renorm repeat_interleave reshape roll rot90 round rsqrt rsub
scatter scatter_add scatter_reduce searchsorted select sgn sigmoid sign signbit sin sinc sinh
softmax sort split sqrt square squeeze std sub subtract sum swapaxes swapdims t take
take_along_dim tan tanh tensor_split tile topk transpose tril triu true_divide trunc unbind
unflatten unsqueeze var vdot where xlogy
    """
)
_ONLY_FUNCTIONS = _words(
    """
_assert adaptive_avg_pool1d adaptive_max_pool1d alpha_dropout arange as_tensor atleast_1d
atleast_2d atleast_3d avg_pool1d batch_norm bilinear block_diag broadcast_tensors cartesian_prod
cat cdist celu channel_shuffle clamp column_stack concat concatenate conv1d conv2d conv3d
conv_transpose1d conv_transpose2d conv_transpose3d cosine_similarity dropout dstack einsum
embedding empty_like eye full full_like group_norm hstack instance_norm is_floating_point layer_norm
linspace max_pool1d max_pool2d max_pool3d meshgrid native_layer_norm ones ones_like
pairwise_distance pixel_shuffle pixel_unshuffle polar relu_ rms_norm selu softmax split_with_sizes
stack std_mean sym_float sym_int sym_max sym_min sym_not tensor tensordot threshold trapezoid
var_mean vstack zeros zeros_like
    """
)
_FUNCTIONAL = _words(
    """
adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
adaptive_max_pool3d affine_grid avg_pool1d avg_pool2d avg_pool3d batch_norm bilinear celu conv1d
conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d cosine_similarity elu embedding
fold gelu glu grid_sample group_norm hardshrink hardsigmoid hardswish hardtanh instance_norm
interpolate layer_norm leaky_relu linear local_response_norm log_softmax logsigmoid lp_pool1d
lp_pool2d lp_pool3d max_pool1d max_pool2d max_pool3d mish multi_head_attention_forward normalize
one_hot pad pairwise_distance pixel_shuffle pixel_unshuffle prelu relu relu6 rms_norm
scaled_dot_product_attention selu sigmoid silu softmax softmin softplus softshrink softsign tanh
tanhshrink threshold unfold upsample upsample_bilinear upsample_nearest
    """
)
_ONLY_METHODS = _words(
    """
bfloat16 bool byte char contiguous cpu dim double element_size expand expand_as float get half int
item long new_empty new_full new_ones new_tensor new_zeros repeat reshape_as short size stride
sum_to_size to type type_as unfold view view_as
    """
)
_OPERATORS = _words(
    """
abs add and_ concat contains eq floordiv ge getitem gt iadd iand ifloordiv imul invert ior isub
itruediv le lshift lt matmul mod mul ne neg not_ or_ pos pow rshift sub truediv truth xor
    """
)
_MATH = _words("ceil exp floor isqrt log log2 prod sqrt trunc")
_SPECIAL = _words("entr erf erfc expit expm1 exp2 gammaln log1p log_softmax logit softmax xlogy")

# Of values in a graph: a tensor's, or a shape's.
ATTRIBUTES = frozenset(_words("H T data device dtype imag is_cuda itemsize mH mT ndim real shape"))


def _functions() -> dict[str, Callable[..., Any]]:
    places: list[tuple[str, ModuleType, list[str]]] = [
        ("torch", torch, [*_TENSORS, *_ONLY_FUNCTIONS]),
        ("torch.nn.functional", F, _FUNCTIONAL),
        ("torch.special", torch.special, _SPECIAL),
        ("operator", operator, _OPERATORS),
        ("math", math, _MATH),
        ("builtins", builtins, ["getattr"]),
    ]
    found: dict[str, Callable[..., Any]] = {}
    for prefix, module, names in places:
        for name in names:
            function = getattr(module, name, None)
            if callable(function):
                found[f"{prefix}.{name}"] = function
    found["snnkernels.network_input"] = network_input
    return found


FUNCTIONS = _functions()
METHODS = frozenset(
    name for name in (*_TENSORS, *_ONLY_METHODS) if name == "get" or hasattr(torch.Tensor, name)
)
NAME_OF_FUNCTION: dict[Any, str] = {}
for _name, _function in FUNCTIONS.items():
    NAME_OF_FUNCTION.setdefault(_function, _name)

# Arguments of layers that are attributes of the same name.
_CONV = "in_channels out_channels kernel_size stride padding dilation groups padding_mode bias"
_CONV_TRANSPOSE = f"{_CONV} output_padding"
_NORM = "num_features eps momentum affine track_running_stats"
_POOL = "kernel_size stride padding ceil_mode count_include_pad"
_MAX = "kernel_size stride padding dilation return_indices ceil_mode"
_RNN = "input_size hidden_size num_layers bias batch_first dropout bidirectional"

_LAYERS = {
    **{f"Conv{n}d": _CONV for n in "123"},
    **{f"ConvTranspose{n}d": _CONV_TRANSPOSE for n in "123"},
    "Linear": "in_features out_features bias",
    "Bilinear": "in1_features in2_features out_features bias",
    "Embedding": "num_embeddings embedding_dim padding_idx max_norm norm_type scale_grad_by_freq "
    "sparse",
    **{f"BatchNorm{n}d": _NORM for n in "123"},
    **{f"InstanceNorm{n}d": _NORM for n in "123"},
    "LayerNorm": "normalized_shape eps elementwise_affine bias",
    "RMSNorm": "normalized_shape eps elementwise_affine",
    "GroupNorm": "num_groups num_channels eps affine",
    "LocalResponseNorm": "size alpha beta k",
    "AvgPool1d": _POOL,
    "AvgPool2d": f"{_POOL} divisor_override",
    "AvgPool3d": f"{_POOL} divisor_override",
    **{f"MaxPool{n}d": _MAX for n in "123"},
    **{f"AdaptiveAvgPool{n}d": "output_size" for n in "123"},
    **{f"AdaptiveMaxPool{n}d": "output_size return_indices" for n in "123"},
    **{f"LPPool{n}d": "norm_type kernel_size stride ceil_mode" for n in "123"},
    "Flatten": "start_dim end_dim",
    "Unflatten": "dim unflattened_size",
    "Identity": "",
    **{f"{kind}Pad{n}d": "padding" for kind in ("Zero", "Circular") for n in "123"},
    **{f"{kind}Pad{n}d": "padding" for kind in ("Reflection", "Replication") for n in "123"},
    **{f"ConstantPad{n}d": "padding value" for n in "123"},
    "Upsample": "size scale_factor mode align_corners recompute_scale_factor",
    "UpsamplingNearest2d": "size scale_factor",
    "UpsamplingBilinear2d": "size scale_factor",
    "PixelShuffle": "upscale_factor",
    "PixelUnshuffle": "downscale_factor",
    "ChannelShuffle": "groups",
    "Fold": "output_size kernel_size dilation padding stride",
    "Unfold": "kernel_size dilation padding stride",
    "MultiheadAttention": "embed_dim num_heads dropout bias add_bias_kv add_zero_attn kdim vdim "
    "batch_first",
    "LSTM": f"{_RNN} proj_size",
    "GRU": _RNN,
    "RNN": f"{_RNN} nonlinearity",
    "ReLU": "",
    "ReLU6": "",
    "Hardtanh": "min_val max_val",
    "Threshold": "threshold value",
    "Sigmoid": "",
    "Tanh": "",
    "GELU": "approximate",
    "GLU": "dim",
    "SiLU": "",
    "Mish": "",
    "Softplus": "beta threshold",
    "Softsign": "",
    "Softshrink": "lambd",
    "Hardshrink": "lambd",
    "Tanhshrink": "",
    "ELU": "alpha",
    "CELU": "alpha",
    "SELU": "",
    "LeakyReLU": "negative_slope",
    "PReLU": "num_parameters",
    "LogSigmoid": "",
    "Hardsigmoid": "",
    "Hardswish": "",
    "Softmax": "dim",
    "Softmin": "dim",
    "Softmax2d": "",
    "LogSoftmax": "dim",
    "CosineSimilarity": "dim eps",
    "PairwiseDistance": "norm eps keepdim",
}
LAYERS: dict[str, tuple[type[nn.Module], tuple[str, ...]]] = {
    f"torch.nn.{name}": (getattr(nn, name), tuple(fields.split()))
    for name, fields in _LAYERS.items()
    if hasattr(nn, name)
}
