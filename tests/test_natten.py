"""NATTEN's names against an independent brute force: a loop over queries in NumPy, in 1, 2 and 3 dimensions."""

import importlib.metadata
import importlib.util
import math
import sys
import textwrap
import types

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

import hdit_kernels
from hdit_kernels import cases, natten

# (grid, kernel_size, stride, dilation, is_causal): odd grids, every parameter different on every axis
GEOMETRIES = [
    ((9,), (3,), (2,), (2,), (False,)),
    ((11,), (4,), (3,), (2,), (True,)),
    ((7, 9), (3, 4), (1, 3), (2, 1), (False, False)),
    ((5, 8), (2, 3), (2, 1), (2, 2), (True, False)),
    ((5, 4, 7), (3, 2, 3), (1, 2, 1), (1, 2, 2), (False, False, False)),
    ((7, 3, 5), (3, 3, 2), (2, 1, 1), (2, 1, 2), (True, False, False)),
    ((5, 5, 4), (2, 2, 4), (2, 1, 3), (1, 2, 1), (False, True, True)),
]
FUSED = {1: natten.na1d, 2: natten.na2d, 3: natten.na3d}
QK = {1: natten.na1d_qk, 2: natten.na2d_qk, 3: natten.na3d_qk}
AV = {1: natten.na1d_av, 2: natten.na2d_av, 3: natten.na3d_av}


def axis_window(length, kernel, stride, dilation, causal, i):
    """(key, place in the window, relative position) of query i along one dimension, as NATTEN defines them."""
    group, p = i % dilation, i // dilation
    members = list(range(group, length, dilation))
    n = len(members)
    if causal:
        low = max(min(p // stride * stride + stride - 1, n - 1) - kernel + 1, 0)
        high = p + 1
    else:
        low = min(max(min(p // stride * stride + stride // 2, n - 1) - kernel // 2, 0), n - kernel)
        high = low + kernel
    return [(members[j], j - low, j - p) for j in range(low, high)]


def neighbors(geometry, query):
    """(key's coordinates, its place among the K of the window, relative position per axis) for each key of a query."""
    grid, kernel, stride, dilation, causal = geometry
    found = [((), 0, ())]
    for axis in zip(grid, kernel, stride, dilation, causal, query, strict=True):
        found = [
            ((*at, key), place * axis[1] + here, (*relative, offset))
            for at, place, relative in found
            for key, here, offset in axis_window(*axis)
        ]
    return found


def brute_force(geometry, q, k, v, scale, extra_keys=None, extra_values=None, rpb=None):
    """out, lse (heads last) and the logits (B, heads, *grid, K)."""
    grid, kernel, *_ = geometry
    q, k, v, extra_keys, extra_values, rpb = (
        None if t is None else t.detach().double().numpy() for t in (q, k, v, extra_keys, extra_values, rpb)
    )
    batch, heads = q.shape[0], q.shape[-2]
    out, lse = np.zeros((*q.shape[:-1], v.shape[-1])), np.zeros(q.shape[:-1])
    table = np.full((batch, heads, *grid, math.prod(kernel)), -math.inf)
    for b, *at, h in np.ndindex(batch, *grid, heads):
        logits, values = [], []
        for key, place, relative in neighbors(geometry, at):
            logit = scale * (q[(b, *at, h)] @ k[(b, *key, h)])
            if rpb is not None:
                logit += rpb[(h, *(r + n - 1 for r, n in zip(relative, kernel, strict=True)))]
            table[(b, h, *at, place)] = logit
            logits.append(logit)
            values.append(v[(b, *key, h)])
        if extra_keys is not None:
            logits += [scale * (q[(b, *at, h)] @ key) for key in extra_keys[b, :, h]]
            values += list(extra_values[b, :, h])
        weights = np.exp(np.array(logits) - max(logits))
        out[(b, *at, h)] = weights @ np.array(values) / weights.sum()
        lse[(b, *at, h)] = max(logits) + math.log(weights.sum())
    return tuple(torch.from_numpy(t) for t in (out, lse, table))


def draw(grid, heads=2, dim=3, v_dim=4, batch=2, seed=0, dtype=torch.float64):
    """query, key, value, two additional keys and values, heads last."""
    make = torch.Generator().manual_seed(seed)
    shapes = [(*grid, heads, dim)] * 2 + [(*grid, heads, v_dim), (2, heads, dim), (2, heads, v_dim)]
    return [torch.randn(batch, *shape, generator=make, dtype=dtype).requires_grad_() for shape in shapes]


def bias(geometry, heads=2, seed=1):
    make = torch.Generator().manual_seed(seed)
    return torch.randn(heads, *(2 * k - 1 for k in geometry[1]), generator=make, dtype=torch.float64).requires_grad_()


def named(geometry):
    return dict(zip(("kernel_size", "stride", "dilation", "is_causal"), geometry[1:], strict=True))


def close(got, wanted, of=1e-12):
    """Within `of` of the largest finite value; infinite in the same places."""
    got, wanted = got.detach().double(), wanted.detach().double()
    assert got.shape == wanted.shape and torch.equal(got.isinf(), wanted.isinf())
    finite = wanted.isfinite()
    assert (got - wanted)[finite].abs().max() <= of * max(1.0, wanted[finite].abs().max().item())


def first(t):
    return t.movedim(-2, 1)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_fused_equals_brute_force(geometry):
    q, k, v, extra_keys, extra_values = draw(geometry[0])
    call = FUSED[len(geometry[0])]
    out, lse = call(q, k, v, **named(geometry), scale=0.7, return_lse=True)
    wanted = brute_force(geometry, q, k, v, 0.7)
    close(out, wanted[0])
    close(lse, wanted[1])
    extras = dict(additional_keys=extra_keys, additional_values=extra_values)
    out, lse = call(q, k, v, **named(geometry), **extras, return_lse=True)
    wanted = brute_force(geometry, q, k, v, 3**-0.5, extra_keys, extra_values)
    close(out, wanted[0])
    close(lse, wanted[1])


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_bias_by_relative_position(geometry):
    q, k, v, extra_keys, extra_values = draw(geometry[0])
    rpb = bias(geometry)
    extras = dict(additional_keys=extra_keys, additional_values=extra_values, rpb=rpb)
    out, lse = FUSED[len(geometry[0])](q, k, v, **named(geometry), **extras, return_lse=True)
    wanted = brute_force(geometry, q, k, v, 3**-0.5, extra_keys, extra_values, rpb)
    close(out, wanted[0])
    close(lse, wanted[1])


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_unfused_equals_brute_force(geometry):
    geometry = (*geometry[:2], (1,) * len(geometry[0]), *geometry[3:])
    grid, kernel_size, _, dilation, is_causal = geometry
    q, k, v, extra_keys, extra_values = draw(grid)
    rpb = bias(geometry)
    dims = len(grid)
    logits = QK[dims](first(q), first(k), kernel_size, dilation, first(extra_keys), is_causal, rpb)
    out, _, table = brute_force(geometry, q, k, v, 1.0, extra_keys, extra_values, rpb)
    close(logits[..., :-2], table)
    close(logits[..., -2:], torch.einsum("b...nd,bsnd->bn...s", q, extra_keys))
    got = AV[dims](logits.softmax(-1), first(v), kernel_size, dilation, first(extra_values), is_causal)
    close(got, first(out))
    # what the weights say where there is no key does not count
    noisy = torch.where(logits.isinf(), 1e3, logits.softmax(-1).nan_to_num())
    close(AV[dims](noisy, first(v), kernel_size, dilation, first(extra_values), is_causal), first(out))


def test_old_names_take_the_old_order_of_arguments():
    geometry = (7, 6), (3, 3), (1, 1), (2, 2), (False, False)
    q, k, v, *_ = draw(geometry[0])
    rpb = bias(geometry)
    for bias_or_none in (rpb, None):
        out, _, table = brute_force(geometry, q, k, v, 1.0, rpb=bias_or_none)
        logits = natten.natten2dqkrpb(first(q), first(k), bias_or_none, 3, 2)
        close(logits, table)
        close(natten.na2d_qk_with_bias(first(q), first(k), bias_or_none, 3, 2), table)
        close(natten.natten2dav(logits.softmax(-1), first(v), 3, 2), first(out))
    close(natten.natten2dqk(first(q), first(k), 3, 2), table)


@pytest.mark.parametrize("geometry", [GEOMETRIES[1], GEOMETRIES[3], GEOMETRIES[6]], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_gradients(geometry, biased):
    """Of out and lse, with respect to everything, by finite differences along random directions."""
    tensors = draw(geometry[0], heads=1, dim=2, v_dim=1, batch=1)
    rpb = bias(geometry, heads=1) if biased else None

    def call(q, k, v, extra_keys, extra_values, rpb=None):
        extras = dict(additional_keys=extra_keys, additional_values=extra_values)
        return FUSED[len(geometry[0])](q, k, v, **named(geometry), **extras, rpb=rpb, return_lse=True)

    assert gradcheck(call, (*tensors, rpb) if biased else tensors, fast_mode=len(geometry[0]) > 1)


def test_gradients_of_the_unfused_names(monkeypatch):
    """In one piece and in several: the second time a tile holds but one place of the windows."""
    q, k, v, extra_keys, extra_values = (first(t).detach().requires_grad_() for t in draw((4, 5), 1, 2, 1, 1))
    rpb = torch.randn(1, 5, 3, dtype=torch.float64).requires_grad_()

    def call(q, k, v, extra_keys, extra_values, rpb):
        logits = natten.na2d_qk(q, k, (3, 2), (1, 2), extra_keys, (False, True), rpb)
        return natten.na2d_av(logits.softmax(-1), v, (3, 2), (1, 2), extra_values, (False, True))

    whole = call(q, k, v, extra_keys, extra_values, rpb)
    monkeypatch.setattr(natten.page, "TILE", 1)
    assert gradcheck(call, (q, k, v, extra_keys, extra_values, rpb))
    close(call(q, k, v, extra_keys, extra_values, rpb), whole)


def test_backward_keeps_nothing_of_the_size_of_all_windows():
    q, k = (torch.randn(1, 1, 12, 12, 16).requires_grad_() for _ in range(2))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        natten.na2d_qk(q, k, 5)
    assert max(saved, default=0) <= 12 * 12 * 25  # the logits' size, and not 16 times that


def test_defects_of_natten():
    geometry = (5, 6), (3, 3), (1, 1), (1, 1), (False, False)
    q, k, v, *_ = draw(geometry[0])
    close(natten.na2d(q, k, v, 3, scale=0.0), brute_force(geometry, q, k, v, 0.0)[0])  # 0 is a scale, not "default"
    with pytest.raises(ValueError, match="query must be a tensor of shape"):  # 4 axes are not taken for 1-D
        natten.na2d(q[0], k[0], v[0], 3)
    for call, grid in ((natten.na1d, (5,)), (natten.na2d, (5, 6)), (natten.na3d, (4, 5, 6))):
        empty = [t.detach()[:0].requires_grad_() for t in draw(grid)[:3]]
        out, lse = call(*empty, 3, return_lse=True)
        (out.sum() + lse.sum()).backward()
        assert [t.grad.shape for t in empty] == [t.shape for t in empty] and out.shape == (0, *grid, 2, 4)
        logits = QK[len(grid)](first(empty[0]), first(empty[1]), 3)
        AV[len(grid)](logits.softmax(-1), first(empty[2]), 3).sum().backward()
        assert logits.shape == (0, 2, *grid, 3 ** len(grid))
    (_, lse), weight = natten.na2d(q, k, v, 3, return_lse=True), torch.randn(2, 5, 6, 2, dtype=torch.float64)
    (grad,) = torch.autograd.grad((lse * weight).sum(), q)  # not dropped, and right along a direction
    step = torch.randn_like(q) * 1e-5
    ahead, behind = (natten.na2d(q + s, k, v, 3, return_lse=True)[1].detach() for s in (step, -step))
    assert math.isclose(((ahead - behind) * weight).sum() / 2, (grad * step).sum(), rel_tol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biased", [False, True])
def test_lower_precision(dtype, biased):
    geometry = GEOMETRIES[5]
    q, k, v, *_ = draw(geometry[0], dtype=dtype)
    rpb = bias(geometry).detach().to(dtype) if biased else None
    out, lse = natten.na3d(q, k, v, **named(geometry), rpb=rpb, return_lse=True)
    wanted = brute_force(geometry, q, k, v, 3**-0.5, rpb=rpb)
    assert out.dtype is dtype and lse.dtype is torch.float32
    with hdit_kernels.use("reference"):
        rounded = natten.na3d(q, k, v, **named(geometry), rpb=rpb, return_lse=True)
    assert cases.error(out, torch.as_tensor(wanted[0]), rounded[0], dtype) <= 1
    assert cases.error(lse, torch.as_tensor(wanted[1]), rounded[1], dtype if biased else torch.float32) <= 1


def test_unfused_sums_are_made_in_float32(monkeypatch):
    """A place at a time over bfloat16 values, with their weights or those that autocast's softmax gives."""
    monkeypatch.setattr(natten.page, "TILE", 1)
    *_, v, _, extra = (first(t.detach()) for t in draw((7, 8), dtype=torch.bfloat16))
    weights = torch.rand(2, 2, 7, 8, 49 + 2)
    for a in (weights[..., :49].bfloat16(), weights[..., :49]):
        close(natten.na2d_av(a, v, 7), natten.na2d_av(a.double(), v.double(), 7), of=0.51 * 2**-7)
    wanted = natten.na2d_av(weights.double(), v.double(), 7, additional_values=extra.double())
    close(natten.na2d_av(weights, v, 7, additional_values=extra), wanted, of=3 * 2**-7)


def test_autocast_takes_what_old_code_mixes():
    q, k, v, *_ = draw((6, 7), dim=8, v_dim=8, dtype=torch.float32)
    exact = natten.na2d(q, k, v, 3)
    with torch.autocast("cpu", torch.bfloat16):
        logits = natten.natten2dqk(first(q), first(k.bfloat16()), 3, 1) * 8**-0.5
        assert logits.dtype is torch.bfloat16
        out = natten.natten2dav(logits.softmax(-1), first(v.bfloat16()), 3, 1)  # (autocast's softmax is float32)
        rpb = torch.zeros(2, 5, 5)
        for got in (out.movedim(1, -2), natten.na2d(q, k, v, 3), natten.na2d(q, k, v, 3, rpb=rpb)):
            assert got.dtype is torch.bfloat16
            close(got, exact, of=4 * torch.finfo(torch.bfloat16).eps)


def test_merge_of_attentions_over_different_keys():
    """With a query that one of them has no key for, and one that none has."""
    outputs, lses = torch.randn(3, 5, 4, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    lses[0, 1] = lses[:, 2] = -math.inf
    outputs.requires_grad_(), lses.requires_grad_()
    out, lse = natten.merge_attentions(list(outputs), list(lses))
    kept = [0, 1, 3, 4]
    close(out[kept], torch.einsum("kq,kqd->qd", lses.softmax(0)[:, kept], outputs[:, kept]))
    close(lse[kept], lses.exp().sum(0).log()[kept])
    assert (out[2] == 0).all() and lse[2] == -math.inf
    for grad in torch.autograd.grad(out.sum() + lse[kept].sum(), (outputs, lses)):
        assert grad.isfinite().all() and (grad[:, 2] == 0).all()


# ---- arguments ------------------------------------------------------------------------------------------------------


def test_fifth_positional_argument_and_tuning():
    q, k, v, *_ = draw((7, 8))
    plain = natten.na2d(q, k, v, 3)
    for call in (natten.na2d, natten.functional.neighborhood_attention_generic):
        assert torch.equal(call(q, k, v, 3, 1), plain) and torch.equal(call(q, k, v, 3, (1, 1)), plain)
        for value in (2, (1, 2), True):
            with pytest.raises(ValueError, match=r"dilation up to NATTEN 0.17 and is stride since 0.20; got"):
                call(q, k, v, 3, value)
        with pytest.raises(TypeError, match="give their names"):
            call(q, k, v, 3, 1, 2)
    close(natten.na2d(q, k, v, 3, stride=2), hdit_kernels.neighborhood_attention(q, k, v, 3, stride=2))
    ignored = dict.fromkeys(natten.TUNING) | {"q_tile_shape": (8, 8), "run_persistent_kernel": True}
    for backend in (*natten.BACKENDS, None):
        assert torch.equal(natten.na2d(q, k, v, 3, backend=backend, **ignored), plain)
    with hdit_kernels.use("reference"):
        close(natten.na2d(q, k, v, 3, scale=1), hdit_kernels.neighborhood_attention(q, k, v, 3, scale=1.0))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda q, k, v: natten.na2d(q, k, v, 3, backend="fna"), "backend must be None or one of .*'fna'"),
        (lambda q, k, v: natten.na2d(q, k, v, 3, tile=2), "tile is no argument of NATTEN's"),
        (lambda q, k, v: natten.na2d(q, k, v, 8), "must not exceed 7.*dimension 0 .*kernel_size 8"),
        (lambda q, k, v: natten.na2d(q, k, v, 3, stride=4), "nor stride kernel_size.*stride 4"),
        (lambda q, k, v: natten.na2d(q, k, v, (3, 3, 3)), r"kernel_size must be one int or 2 of them; got \(3, 3, 3\)"),
        (lambda q, k, v: natten.na2d(q, k, v, 3, is_causal=1), "is_causal must be one bool or 2 of them; got 1"),
        (lambda q, k, v: natten.na2d(q, k, v, 3, scale=math.nan), "scale must be a finite number or None; got nan"),
        (lambda q, k, v: natten.na2d(q, k, v, 3, rpb=torch.randn(2, 5, 4)), r"rpb must be .*\(2, 5, 5\).*\(2, 5, 4\)"),
        (lambda q, k, v: natten.na3d(q, k, v, 3), r"query must be .*\(B, D, H, W, heads, dim\).*\(2, 7, 8, 2, 3\)"),
        (lambda q, k, v: natten.na2d_qk(q[0], k[0], 3), r"query must be .*\(B, heads, H, W, dim\)"),
        (lambda q, k, v: natten.na2d_qk(q, k.float(), 3), "key must have query's dtype"),
        (lambda q, k, v: natten.na2d_av(q, v, 2), r"attn must be .*\(2, 7, 8, 2, 4\).*\(2, 7, 8, 2, 3\)"),
    ],
)
def test_bad_input_gets_a_sentence(call, message):
    with pytest.raises((ValueError, TypeError), match=message) as error:
        call(*draw((7, 8))[:3])
    assert "\n" not in str(error.value)


# ---- modules --------------------------------------------------------------------------------------------------------


def by_hand(module, x, geometry, scale):
    """The module's output from its parameters, with the brute force in the middle."""
    q, k, v = torch.nn.functional.linear(x, module.qkv.weight, module.qkv.bias).chunk(3, dim=-1)
    q, k, v = (t.unflatten(-1, (module.num_heads, -1)) for t in (q, k, v))
    out, *_ = brute_force(geometry, q, k, v, scale, rpb=module.rpb)
    return torch.nn.functional.linear(out.flatten(-2), module.proj.weight, module.proj.bias)


@pytest.mark.parametrize("geometry", [GEOMETRIES[0], GEOMETRIES[3], GEOMETRIES[5]], ids=str)
def test_modules_of_both_generations(geometry):
    dims = len(geometry[0])
    kind = (natten.NeighborhoodAttention1D, natten.NeighborhoodAttention2D, natten.NeighborhoodAttention3D)[dims - 1]
    x = torch.randn(2, *geometry[0], 6, dtype=torch.float64)
    new = kind(6, 2, **named(geometry), qkv_bias=False, proj_drop=0.5).double().eval()
    assert sorted(new.state_dict()) == ["proj.bias", "proj.weight", "qkv.weight"]
    close(new(x), by_hand(new, x, geometry, 3**-0.5))
    plain = (*geometry[:2], (1,) * dims, *geometry[3:])
    options = dict(dilation=geometry[3], is_causal=geometry[4], qk_scale=0.3, attn_drop=0.4)
    old = kind(dim=6, num_heads=2, kernel_size=geometry[1], **options, rel_pos_bias=True).double().eval()
    assert sorted(old.state_dict()) == ["proj.bias", "proj.weight", "qkv.bias", "qkv.weight", "rpb"]
    close(old(x), by_hand(old, x, plain, 0.3))
    other = kind(dim=6, num_heads=2, kernel_size=geometry[1], **options).double().eval()
    other.load_state_dict(old.state_dict())  # 0.14's checkpoints have an rpb that later constructors do not ask for
    assert torch.equal(other(x), old(x))


def test_module_drops_attention_weights_only_in_training():
    x = torch.randn(1, 6, 6, 4, dtype=torch.float64)
    module = natten.NeighborhoodAttention2D(dim=4, num_heads=1, kernel_size=3, attn_drop=0.5).double()
    torch.manual_seed(0)
    module.proj.weight.data, module.proj.bias.data = torch.eye(4, dtype=torch.float64), torch.zeros(4).double()
    drawn = torch.stack([module(x) for _ in range(400)]).detach()
    spread = drawn.std(0) / 20  # of the mean of 400
    assert spread.min() > 0
    assert ((drawn.mean(0) - module.eval()(x)).abs() < 5 * spread).all()


def test_module_with_dim_pads_a_grid_smaller_than_its_window():
    module = natten.NeighborhoodAttention2D(dim=4, num_heads=2, kernel_size=3, dilation=2).double().eval()
    x = torch.randn(1, 4, 7, 4, dtype=torch.float64)
    padded = torch.cat([x, torch.zeros(1, 2, 7, 4, dtype=torch.float64)], dim=1)
    geometry = (6, 7), (3, 3), (1, 1), (2, 2), (False, False)
    close(module(x), by_hand(module, padded, geometry, 2**-0.5)[:, :4])
    with pytest.raises(ValueError, match="must not exceed 4"):
        natten.NeighborhoodAttention2D(embed_dim=4, num_heads=2, kernel_size=3, dilation=2).double()(x)
    with pytest.raises(ValueError, match="fourth positional argument must be 1"):
        natten.NeighborhoodAttention2D(4, 2, 3, 2)


# ---- in natten's place ----------------------------------------------------------------------------------------------

# As k-diffusion's image_transformer_v2 calls it in its NeighborhoodSelfAttentionBlock, after the projections.
K_DIFFUSION = """
    import natten

    def attend(qkv, d_head, kernel_size):
        if natten.has_fused_na():
            q, k, v = rearrange(qkv, "n h w (t nh e) -> t n h w nh e", t=3, e=d_head)
            x = natten.functional.na2d(q, k, v, kernel_size, scale=1.0)
            return rearrange(x, "n h w nh e -> n h w (nh e)")
        q, k, v = rearrange(qkv, "n h w (t nh e) -> t n nh h w e", t=3, e=d_head)
        qk = natten.functional.na2d_qk(q, k, kernel_size)
        a = torch.softmax(qk, dim=-1).to(v.dtype)
        x = natten.functional.na2d_av(a, v, kernel_size)
        return rearrange(x, "n nh h w e -> n h w (nh e)")
"""


@pytest.fixture
def installed():
    finders = list(sys.meta_path)
    yield natten.install()
    sys.meta_path[:] = finders
    for name in [name for name in sys.modules if name.split(".")[0] == "natten"]:
        del sys.modules[name]


@pytest.mark.parametrize("fused", [True, False])
def test_k_diffusion_runs_unmodified(installed, monkeypatch, fused):
    from einops import rearrange

    if not fused:
        monkeypatch.setattr(natten, "has_fused_na", lambda: False)
    scope = {"rearrange": rearrange, "torch": torch}
    exec(textwrap.dedent(K_DIFFUSION), scope)
    qkv = torch.randn(2, 8, 9, 3 * 2 * 4, dtype=torch.float64, requires_grad=True)
    out = scope["attend"](qkv, 4, 7)
    q, k, v = rearrange(qkv, "n h w (t nh e) -> t n h w nh e", t=3, e=4)
    wanted = brute_force(((8, 9), (7, 7), (1, 1), (1, 1), (False, False)), q, k, v, 1.0)[0]
    close(out, wanted.flatten(-2))
    (grad,) = torch.autograd.grad(out.square().sum(), qkv)
    direct = hdit_kernels.neighborhood_attention_qkvpacked(qkv.unflatten(-1, (3, 2, 4)), 7, scale=1.0)
    close(grad, torch.autograd.grad(direct.square().sum(), qkv)[0])


def test_install_answers_as_an_installed_natten(installed):
    import natten as theirs
    from natten import NeighborhoodAttention2D, use_fused_na
    from natten.context import is_fna_enabled
    from natten.functional import na2d_av, na2d_qk, natten2dav, natten2dqkrpb

    assert theirs is installed is natten and natten.install() is installed
    assert na2d_qk is natten.na2d_qk and na2d_av is natten2dav is natten.na2d_av
    assert natten2dqkrpb is natten.natten2dqkrpb and NeighborhoodAttention2D is natten.NeighborhoodAttention2D
    assert use_fused_na(True, kv_parallel=True) is None and theirs.has_fused_na() and is_fna_enabled()
    assert theirs.set_memory_usage_preference("unrestricted") is None
    # what transformers asks before it imports DiNAT's two names, and others of the version
    assert importlib.util.find_spec("natten") is not None
    assert importlib.metadata.version("natten") == theirs.__version__ == "0.21.7"
    assert importlib.metadata.packages_distributions()["natten"] == ["natten"]
    assert sum(d.metadata["Name"] == "natten" for d in importlib.metadata.distributions()) == 1
    assert importlib.metadata.version("numpy") == np.__version__


def test_install_refuses_beside_another_natten(monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="must come before natten is imported"):
        patch.setitem(sys.modules, "natten", types.ModuleType("natten"))
        natten.install()
    assert not any(isinstance(finder, natten.Installed) for finder in sys.meta_path)
