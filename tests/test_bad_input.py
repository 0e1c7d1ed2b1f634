"""Bad input to the ops gets one sentence naming the argument, its value and what is accepted, before anything runs."""
# ruff: noqa: E501 (a table)

import math

import pytest
import torch

import hdit_kernels
from hdit_kernels import AxialRope

na, packed = hdit_kernels.neighborhood_attention, hdit_kernels.neighborhood_attention_qkvpacked
rope_op, geglu = hdit_kernels.cosine_rope, hdit_kernels.geglu
linear_geglu, norm = hdit_kernels.linear_geglu, hdit_kernels.ada_rms_norm
r = torch.randn
q, k, v = r(2, 8, 9, 3, 16), r(2, 8, 9, 3, 16), r(2, 8, 9, 3, 16)
angles = AxialRope(r(8, 3, 2), r(9, 3, 2))
ones = torch.ones(3)
keys, values, mask = r(2, 4, 3, 16), r(2, 4, 3, 16), torch.ones(2, 8, 9, dtype=torch.bool)

BAD = [
    # rank, type, dtype, device, sizes of q, k, v
    (lambda: na(q[0], k[0], v[0]), ValueError, r"q must have 5 axes .*got shape \(8, 9, 3, 16\)"),
    (lambda: na(q[None], k[None], v[None]), ValueError, "q must have 5 axes"),
    (lambda: na(q.numpy(), k, v), TypeError, "q must be a tensor .*got ndarray"),
    (lambda: na(q, None, v), TypeError, "k must be a tensor .*got NoneType"),
    (lambda: na(q.long(), k, v), TypeError, "q must be float32.*got torch.int64"),
    (lambda: na(q.to(torch.complex64), k, v), TypeError, "q must be float32.*got torch.complex64"),
    (lambda: na(q, k.double(), v), TypeError, "k must have q's dtype torch.float32.*got torch.float64"),
    (lambda: na(q, k, v.bfloat16()), TypeError, "v must have q's dtype"),
    (lambda: na(q, k.to("meta"), v), ValueError, "k must be on q's device cpu; got meta"),
    (lambda: na(q, k[:, :7], v), ValueError, r"k must have q's shape \(2, 8, 9, 3, 16\); got \(2, 7, 9, 3, 16\)"),
    (lambda: na(q, k[..., :2, :], v), ValueError, "k must have q's shape"),
    (lambda: na(q, k, v[..., :2, :]), ValueError, r"v must be \(2, 8, 9, 3\) \+ \(dim,\)"),
    (lambda: na(q[..., :0], k[..., :0], v), ValueError, "q must have dim ≥ 1"),
    # the window
    (lambda: na(q, k, v, 9), ValueError, "kernel_size · dilation must not exceed the 8 rows .*got kernel_size 9"),
    (lambda: na(q, k, v, (3, 10)), ValueError, "must not exceed the 9 columns"),
    (lambda: na(q, k, v, 3, 1, 4), ValueError, "exceed the 8 rows .*kernel_size 3 · dilation 4 = 12"),
    (lambda: na(q, k, v, 0), ValueError, "kernel_size must be at least 1; got 0 along the rows"),
    (lambda: na(q, k, v, 3, (1, 0)), ValueError, "stride must be at least 1; got 0 along the columns"),
    (lambda: na(q, k, v, 3, 1, -1), ValueError, "dilation must be at least 1; got -1"),
    (lambda: na(q, k, v, 3, 4), ValueError, "stride must be between 1 and kernel_size = 3 along the rows; got 4"),
    (lambda: na(q, k, v, 3.0), TypeError, r"kernel_size must be one int or a \(rows, columns\) pair.*got 3.0"),
    (lambda: na(q, k, v, True), TypeError, "kernel_size must be one int.*got True"),
    (lambda: na(q, k, v, (3, 3, 3)), TypeError, r"kernel_size must be .*got \(3, 3, 3\)"),
    (lambda: na(q, k, v, 3, is_causal=1), TypeError, "is_causal must be one bool.*got 1"),
    (lambda: na(q, k, v, 3, wrap=(False, True)), ValueError, r"wrap must be False.*got \(False, True\)"),
    (lambda: na(q, k, v, 3, wrap=2), TypeError, "wrap must be one bool.*got 2"),
    # scales
    (lambda: na(q, k, v, 3, scale=1), TypeError, "scale must be a float or None; got 1"),
    (lambda: na(q, k, v, 3, scale=math.nan), ValueError, "scale must be finite; got nan"),
    (lambda: na(q, k, v, 3, scale=-math.inf), ValueError, "scale must be finite; got -inf"),
    (lambda: na(q, k, v, 3, scale=torch.tensor(1.0)), TypeError, "scale must be a float or None"),
    (lambda: na(q, k, v, 3, cosine_scale=10.0), TypeError, r"cosine_scale must be .*\(3,\); got float"),
    (lambda: na(q, k, v, 3, cosine_scale=r(2)), ValueError, r"cosine_scale must be \(heads,\) = \(3,\); got shape \(2,\)"),
    (lambda: na(q, k, v, 3, cosine_scale=r(3, 1)), ValueError, r"got shape \(3, 1\)"),
    (lambda: na(q, k, v, 3, cosine_scale=torch.arange(3)), TypeError, "cosine_scale must be .*got torch.int64"),
    (lambda: na(q, k, v, 3, cosine_scale=ones.to("meta")), ValueError, "cosine_scale must be on q's device"),
    # positions
    (lambda: na(q, k, v, 3, rope=angles[0]), TypeError, r"rope must be an AxialRope.*got Tensor"),
    (lambda: na(q, k, v, 3, rope=AxialRope(*angles[::-1])), ValueError, r"rope.height_angles must be .*\(8, 3, 2\); got \(9"),
    (lambda: na(q, k, v, 3, rope=AxialRope(r(8, 3, 2), r(9, 3, 1))), ValueError, r"rope.width_angles .*got \(9, 3, 1\)"),
    (lambda: na(q, k, v, 3, rope=AxialRope(r(8, 3), r(9, 3))), ValueError, "rope.height_angles must be"),
    (lambda: na(q, k, v, 3, rope=AxialRope(r(8, 3, 5), r(9, 3, 5))), ValueError, "at most dim/4 = 4 .*got r = 5"),
    (lambda: na(q, k, v, 3, rope=AxialRope(*(a.bfloat16() for a in angles))), TypeError, "rope.height_angles .*bfloat16"),
    (lambda: na(*(t.double() for t in (q, k, v)), 3, rope=angles), TypeError, "float64 with float64 q.*got torch.float32"),
    (lambda: na(q, k, v, 3, rope=AxialRope(angles[0], angles[1].clone().requires_grad_())), ValueError,
     "rope.width_angles must not require grad"),
    # more keys, masks
    (lambda: na(q, k, v, 3, additional_keys=keys), ValueError, "additional_values must be given with its partner"),
    (lambda: na(q, k, v, 3, additional_values=values), ValueError, "additional_keys must be given with its partner"),
    (lambda: na(q, k, v, 3, additional_keys=keys[:1], additional_values=values), ValueError, r"additional_keys .*\(1, 4"),
    (lambda: na(q, k, v, 3, additional_keys=keys, additional_values=values[:, :3]), ValueError, "additional_values must"),
    (lambda: na(q, k, v, 3, additional_keys=keys.double(), additional_values=values), TypeError, "additional_keys must be a"),
    (lambda: na(q, k, v, 3, key_mask=mask.float()), TypeError, "key_mask must be a bool tensor .*got torch.float32"),
    (lambda: na(q, k, v, 3, key_mask=mask[:1]), ValueError, r"key_mask must be \(B, H, W\) = \(2, 8, 9\).*got \(1, 8, 9\)"),
    (lambda: na(q, k, v, 3, backend="gpu"), ValueError, "backend must be None or one of .*got 'gpu'"),
    # packed
    (lambda: packed(q), ValueError, r"qkv must be .*\(B, H, W, 3, heads, dim\); got \(2, 8, 9, 3, 16\)"),
    (lambda: packed(r(2, 8, 9, 2, 3, 16)), ValueError, "qkv must be"),
    (lambda: packed([q, k, v]), ValueError, "qkv must be .*got list"),
    (lambda: packed(torch.ones(2, 8, 9, 3, 3, 16, dtype=torch.int8)), TypeError, "qkv must be float32.*got torch.int8"),
    (lambda: packed(r(2, 8, 9, 3, 3, 16), 11), ValueError, "kernel_size · dilation must not exceed"),
    # the prologue alone
    (lambda: rope_op(q, k, None, angles), TypeError, "cosine_scale must be given"),
    (lambda: rope_op(q, k, ones, None), TypeError, "rope must be given"),
    (lambda: rope_op(q, k[:, :, :4], ones, angles), ValueError, "k must have q's shape"),
    (lambda: rope_op(q, k, r(4), angles), ValueError, "cosine_scale must be"),
    # activations and norms
    (lambda: geglu(r(3, 7)), ValueError, r"x must have a last axis of even, positive size; got shape \(3, 7\)"),
    (lambda: geglu(r(3, 0)), ValueError, "x must have a last axis of even"),
    (lambda: geglu(torch.tensor(1.0)), ValueError, "x must have a last axis of even"),
    (lambda: geglu(torch.ones(2, dtype=torch.int32)), TypeError, "x must be float32.*got torch.int32"),
    (lambda: geglu([1.0, 2.0]), TypeError, "x must be a tensor; got list"),
    (lambda: linear_geglu(r(3, 7), r(6, 8)), ValueError, r"weight must be \(2n, 7\); got \(6, 8\)"),
    (lambda: linear_geglu(r(3, 7), r(5, 7)), ValueError, r"weight must be \(2n, 7\); got \(5, 7\)"),
    (lambda: linear_geglu(r(3, 7), r(6, 7), r(5)), ValueError, r"bias must be \(6,\); got \(5,\)"),
    (lambda: linear_geglu(r(3, 7), r(6, 7).double()), TypeError, "weight and bias must have x's dtype"),
    (lambda: linear_geglu(r(3, 7), None), TypeError, "weight must be a tensor"),
    (lambda: norm(r(2, 5, 8), r(3, 8)), ValueError, r"scale must be \(2, 8\) or \(8,\) .*got \(3, 8\)"),
    (lambda: norm(r(2, 5, 8), r(2, 5, 8)), ValueError, "scale must be"),
    (lambda: norm(r(8), r(1, 8)), ValueError, r"scale must be \(8,\)"),
    (lambda: norm(r(2, 8), r(8), -1e-6), ValueError, "eps must be a finite number ≥ 0; got -1e-06"),
    (lambda: norm(r(2, 8), r(8), math.nan), ValueError, "eps must be a finite number ≥ 0; got nan"),
    (lambda: norm(r(2, 8), r(8), None), ValueError, "eps must be"),
    (lambda: norm(r(2, 8), torch.ones(8, dtype=torch.long)), TypeError, "scale must be float32"),
    (lambda: norm(r(2, 8), r(8).to("meta")), ValueError, "scale must be on x's device cpu; got meta"),
    (lambda: norm(r(2, 0), r(0)), ValueError, "x must be"),
]  # fmt: skip


@pytest.mark.parametrize("i", range(len(BAD)))
def test_one_sentence_says_what_is_wrong(i):
    call, kind, pattern = BAD[i]
    with pytest.raises(kind, match=pattern) as caught:
        call()
    sentence = str(caught.value)
    assert "\n" not in sentence and len(sentence) < 250


def test_what_stands_next_to_each_refusal_is_accepted():
    """The limits themselves, so that a check that is too strict fails here."""
    na(q, k, v, (8, 9)), na(q, k, v, 2, 2, 4), na(q, k, v, 3, 3), na(q, k, v, [3, 1], is_causal=[True, False])
    na(q, k, v, 3, rope=AxialRope(r(8, 3, 4), r(9, 3, 4).double()), cosine_scale=ones.bfloat16())
    na(q.bfloat16(), k.bfloat16(), v.bfloat16(), 3, rope=angles, cosine_scale=ones, scale=0.5)
    na(q, k, v[..., :1], 3, additional_keys=keys, additional_values=values[..., :1], key_mask=mask)
    na(q, k, v, 3, additional_keys=keys[:, :0], additional_values=values[:, :0])
    norm(r(2, 5, 8), r(2, 8).double(), 0), norm(r(8), r(8)), norm(r(3, 8), r(3, 8), 1)
    geglu(r(2)), linear_geglu(r(7), r(2, 7), r(2)), rope_op(q, k, ones, angles)
    packed(r(2, 8, 9, 3, 1, 1), 7, 7)
