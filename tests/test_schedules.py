"""Noise schedules against stored values of k-diffusion, printed values of the papers, and distribution functions."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from hdit.diffusion import schedules
from hdit.diffusion.schedules import density, stratified_uniform

GOLDEN = load_file(Path(__file__).parent / "data" / "diffusion.safetensors")
DOUBLE = torch.float64
U = torch.tensor([0.0, 1e-4, 0.02, 0.25, 0.4999, 0.5, 0.77, 0.99, 0.9999], dtype=DOUBLE)
HALF_PI = math.pi / 2


def relative(got, want):
    want = torch.as_tensor(want, dtype=DOUBLE)
    return ((got.to(DOUBLE) - want).abs() / want.abs()).max()


# Sampling


@pytest.mark.parametrize(
    ("got", "key"),
    [
        (schedules.karras_sigmas(9, 0.02, 60.0, dtype=DOUBLE), "sigmas_karras"),
        (schedules.exponential_sigmas(9, 0.02, 60.0, dtype=DOUBLE), "sigmas_exp"),
    ],
)
def test_sampling_schedule_is_the_stored_one(got, key):
    assert got[-1] == 0 and GOLDEN[key][-1] == 0
    assert relative(got[:-1], GOLDEN[key][:-1]) < 2e-6  # k-diffusion computes them in float32


@pytest.mark.parametrize("name", ["karras", "exponential", "polyexponential"])
@pytest.mark.parametrize("n", [2, 3, 50])
def test_sampling_schedule_is_the_formula(name, n):
    low, high, rho = 0.0123, 987.6, 3.5
    arguments = () if name == "exponential" else (rho,)
    got = getattr(schedules, f"{name}_sigmas")(n, low, high, *arguments, dtype=DOUBLE)
    done = [i / (n - 1) for i in range(n)]
    want = {
        "karras": [(high ** (1 / rho) + d * (low ** (1 / rho) - high ** (1 / rho))) ** rho for d in done],
        "exponential": [high * (low / high) ** d for d in done],
        "polyexponential": [low * (high / low) ** ((1 - d) ** rho) for d in done],
    }[name]
    assert len(got) == n + 1 and got[-1] == 0
    assert relative(got[:-1], want) < 1e-12
    assert got[0] == high and got[-2] == low
    assert (got.diff() < 0).all()


def test_one_step_starts_at_the_noisy_end():
    for name in ("karras", "exponential", "polyexponential"):
        assert getattr(schedules, f"{name}_sigmas")(1, 0.1, 80.0).tolist() == [80.0, 0.0]


def test_vp_sigmas():
    """sigma^2 = 1 / alpha^2 - 1, alpha = exp(-integral of beta / 2), the integral by many trapezoids."""
    beta_d, beta_min, eps_s = 17.0, 0.2, 2e-3
    got = schedules.vp_sigmas(5, beta_d, beta_min, eps_s, dtype=DOUBLE)
    for sigma, t in zip(got.tolist()[:-1], torch.linspace(1, eps_s, 5, dtype=DOUBLE).tolist(), strict=True):
        times = torch.linspace(0, t, 1001, dtype=DOUBLE)
        integral = float(torch.trapezoid(beta_min + beta_d * times, times))
        assert math.isclose(sigma, (1 / math.exp(-integral) - 1) ** 0.5, rel_tol=1e-10)
    assert got[-1] == 0


def test_float32_schedules_are_the_rounded_ones():
    for name in ("karras", "exponential", "polyexponential"):
        make = getattr(schedules, f"{name}_sigmas")
        assert torch.equal(make(40, 1e-3, 1e3), make(40, 1e-3, 1e3, dtype=DOUBLE).float())
    assert torch.equal(schedules.vp_sigmas(40), schedules.vp_sigmas(40, dtype=DOUBLE).float())


# log-SNR


def cosine(t, low=-15.0, high=15.0):
    """Log-SNR of alpha = cos(angle), s = sin(angle), the angle even in t between its ends."""
    a, b = (math.acos((1 / (1 + math.exp(-logsnr))) ** 0.5) for logsnr in (high, low))
    return 2 * math.log(math.cos(a + t * (b - a)) / math.sin(a + t * (b - a)))


def test_logsnr_of_the_paper():
    """512² images, noise of 32² and of 512²: the values to three digits."""
    t = torch.tensor([0.25, 0.5, 0.75], dtype=DOUBLE)
    for got, want in (
        (schedules.logsnr_interpolated(t, 512), [0.375, -2.773, -5.920]),
        (schedules.logsnr_cosine(t), [1.761, 0, -1.761]),
        (schedules.logsnr_shifted(t, 512, 32), [1.761 - 5.545, -5.545, -1.761 - 5.545]),
    ):
        assert (got - torch.tensor(want, dtype=DOUBLE)).abs().max() < 1e-3


def test_logsnr_is_the_formula_up_to_its_ends():
    times = [0.0, 1e-3, 0.3, 0.6, 0.999, 1.0]
    t = torch.tensor(times, dtype=DOUBLE)
    shift_low, shift_high = 2 * math.log(24 / 200), 2 * math.log(96 / 200)
    plain = torch.tensor([cosine(t) for t in times], dtype=DOUBLE)
    assert (schedules.logsnr_cosine(t) - plain).abs().max() < 1e-8
    assert (schedules.logsnr_shifted(t, 200, 24) - plain - shift_low).abs().max() < 1e-8
    want = plain + torch.tensor([(1 - t) * shift_high + t * shift_low for t in times], dtype=DOUBLE)
    assert (schedules.logsnr_interpolated(t, 200, 24, 96) - want).abs().max() < 1e-8
    other = torch.tensor([cosine(t, -9, 11) for t in times], dtype=DOUBLE)
    assert (schedules.logsnr_cosine(t, -9.0, 11.0) - other).abs().max() < 1e-8


def test_logsnr_in_float32_loses_nothing_but_the_rounding():
    t = torch.linspace(0, 1, 101)
    for function, arguments in ((schedules.logsnr_cosine, ()), (schedules.logsnr_interpolated, (256,))):
        assert torch.equal(function(t, *arguments), function(t.double(), *arguments).float())


def test_sigma_and_logsnr_invert_each_other():
    logsnr = torch.tensor([-math.inf, -15, -0.1, 0, 3, 15, math.inf], dtype=DOUBLE)
    sigma = schedules.logsnr_to_sigma(logsnr)
    assert sigma[0] == math.inf and sigma[-1] == 0
    assert math.isclose(sigma[1], 1 / math.sqrt(math.exp(-15)), rel_tol=1e-14)
    back = schedules.sigma_to_logsnr(sigma)
    assert back[0] == -math.inf and back[-1] == math.inf
    assert (back - logsnr)[1:-1].abs().max() < 1e-14


def test_zero_terminal_snr_is_the_published_algorithm():
    """sqrt(alpha_bar), its last value subtracted, scaled back to its first value; then SNR = a / (1 - a)."""
    logsnr = torch.linspace(8, -6, 30, dtype=DOUBLE)
    root = (1 / (1 + torch.exp(-logsnr))).sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    want = torch.log(root**2 / (1 - root**2))
    got = schedules.zero_terminal_snr(logsnr, -6.0, 8.0)
    assert got[-1] == -math.inf and want[-1] == -math.inf
    assert (got - want)[:-1].abs().max() < 1e-9
    assert abs(got[0] - 8) < 1e-12
    # At the clean end 1 - a is 3e-7: what float64 leaves of it here is kept by the other way to compute it.
    assert abs(schedules.zero_terminal_snr(torch.tensor([15.0], dtype=DOUBLE), -15.0, 15.0) - 15) < 1e-12


def test_simple_diffusion_sampler_schedule():
    n, side = 6, 256
    got = schedules.simple_diffusion_sigmas(n, side, dtype=DOUBLE)
    shift = [2 * math.log(32 / side) * i / n for i in range(n, 0, -1)]
    want = [math.exp(-(cosine(i / n) + s) / 2) for i, s in zip(range(n, 0, -1), shift, strict=True)]
    assert relative(got[:-1], want) < 1e-8 and got[-1] == 0
    pure = schedules.simple_diffusion_sigmas(n, side, zero_terminal=True, dtype=DOUBLE)
    assert pure[0] == math.inf and pure[-1] == 0 and (pure[1:].diff() < 0).all()
    alpha = [1 / math.sqrt(1 + s**2) for s in (*got[:-1].tolist(), math.exp(-15 / 2))]
    first, last = alpha[-1], alpha[0]
    for sigma, a in zip(pure[1:-1].tolist(), alpha[1:-1], strict=True):
        scaled = (a - last) * first / (first - last)
        assert math.isclose(sigma, math.sqrt(1 - scaled**2) / scaled, rel_tol=1e-9)


# Training densities


@pytest.mark.parametrize("side", [256, 1024])
def test_cosine_interpolated_is_the_stored_one(side):
    assert (
        relative(schedules.cosine_interpolated_sigmas(GOLDEN["u"], side), GOLDEN[f"sigma_cosine_interp_{side}"]) < 1e-13
    )


def normal(z):
    return math.erfc(-z / math.sqrt(2)) / 2


def split_normal(z, left=0.4, right=1.7):
    """A half normal on each side, of the same density where they meet."""
    share = left / (left + right)
    return 2 * share * normal(z / left) if z < 0 else share + (1 - share) * (2 * normal(z / right) - 1)


def inward(u):
    return u * (1 - 2e-7) + 1e-7


def clamped(u):
    return u.clamp(min=1e-7)


def exactly(u):
    return u


def between(cdf, low, high):
    return lambda sigma: (cdf(sigma) - cdf(low)) / (cdf(high) - cdf(low))


ENDS = math.exp(-7.5), math.exp(7.5)  # sigma at a log-SNR of 15 and -15
# name, parameters, the distribution function as published, and how u keeps off the ends where there is none
DISTRIBUTIONS = [
    ("lognormal", {}, lambda s: normal((math.log(s) + 1.2) / 1.2), inward),
    ("lognormal", {"loc": 0.3, "scale": 2.0}, lambda s: normal((math.log(s) - 0.3) / 2.0), inward),
    (
        "split-lognormal",
        {"loc": -0.6, "scale_1": 0.4, "scale_2": 1.7},
        lambda s: split_normal(math.log(s) + 0.6),
        inward,
    ),
    ("loglogistic", {}, lambda s: 1 / (1 + (s / 0.5) ** -2), clamped),
    ("loglogistic", {"loc": 0.2, "scale": 0.7}, lambda s: 1 / (1 + (s / math.exp(0.2)) ** (-1 / 0.7)), clamped),
    (
        "loglogistic",
        {"sigma_min": 0.01, "sigma_max": 50.0},
        between(lambda s: 1 / (1 + (s / 0.5) ** -2), 0.01, 50.0),
        exactly,
    ),
    ("loguniform", {"sigma_min": 0.02, "sigma_max": 70.0}, lambda s: math.log(s / 0.02) / math.log(70 / 0.02), exactly),
    ("v-diffusion", {}, between(lambda s: math.atan(s / 0.5) / HALF_PI, 1e-3, 1e3), exactly),
    (
        "v-diffusion",
        {"sigma_data": 1.3, "sigma_min": 0.1, "sigma_max": 10.0},
        between(lambda s: math.atan(s / 1.3) / HALF_PI, 0.1, 10.0),
        exactly,
    ),
    ("cosine", {}, lambda s: 1 - between(lambda s: math.atan(s / 0.5) / HALF_PI, 1e-3, 1e3)(s), exactly),
    (
        "cosine",
        {"image_d": 512, "noise_d": 64},
        lambda s: 1 - between(lambda s: math.atan(s / (0.5 * 8)), 1e-3, 1e3)(s),
        exactly,
    ),
    ("simple-diffusion", {"image_d": 96, "noise_d_low": 96}, lambda s: 1 - between(math.atan, *ENDS)(s), exactly),
    (
        "simple-diffusion",
        {"image_d": 96, "noise_d_low": 48, "noise_d_high": 48},
        lambda s: 1 - between(lambda s: math.atan(s / 2), *(2 * end for end in ENDS))(s),
        exactly,
    ),
]


@pytest.mark.parametrize(("name", "params", "cdf", "kept"), DISTRIBUTIONS)
def test_density_inverts_its_distribution_function(name, params, cdf, kept):
    sigma = density(name, **params)(U)
    assert sigma.dtype == DOUBLE and sigma.isfinite().all() and (sigma > 0).all()
    got = torch.tensor([cdf(s) for s in sigma.tolist()], dtype=DOUBLE)
    assert (got - kept(U)).abs().max() < 1e-12


def test_every_density_is_tested():
    assert {name for name, *_ in DISTRIBUTIONS} | {"cosine-interpolated"} == set(schedules.DENSITIES)


@pytest.mark.parametrize(
    ("name", "params"),
    [
        *((name, params) for name, params, *_ in DISTRIBUTIONS),
        ("cosine-interpolated", {"image_d": 1024}),
    ],
)
def test_density_in_float32_is_finite_and_rounds_once(name, params):
    u = torch.cat([torch.linspace(0, 1, 1001), torch.tensor([1e-9, 1 - 2**-24])])
    inverse = density(name, **params)
    sigma = inverse(u)
    assert sigma.dtype == torch.float32 and sigma.isfinite().all() and (sigma > 0).all()
    assert torch.equal(sigma, inverse(u.double()).float())


def test_interpolated_density_keeps_its_ends():
    u = torch.tensor([0.0, 1.0], dtype=DOUBLE)
    for side in (64, 333, 2048):
        got = schedules.cosine_interpolated_sigmas(u, side, sigma_data=0.7, sigma_min=2e-3, sigma_max=700.0)
        assert relative(got, [700.0, 2e-3]) < 1e-10


def test_zero_terminal_density_spends_a_thousandth_on_pure_noise():
    u = torch.tensor([0.0, 9e-4, 1.1e-3, 0.5, 0.9], dtype=DOUBLE)
    got = density("simple-diffusion", image_d=64, zero_terminal=True)(u)
    assert got[:2].tolist() == [math.inf] * 2
    want = schedules.logsnr_interpolated(1 - u[2:], 64, zero_terminal=True)
    assert relative(got[2:], (-want / 2).exp()) < 1e-12
    assert density("simple-diffusion", image_d=64)(u).isfinite().all()


# Stratified levels


@given(
    batch=st.integers(1, 7),
    world_size=st.integers(1, 5),
    accumulation=st.integers(1, 4),
    dtype=st.sampled_from([torch.float32, DOUBLE]),
)
def test_strata_of_all_ranks_and_micro_batches_tile_the_unit_interval(batch, world_size, accumulation, dtype):
    total = batch * world_size * accumulation
    # Element i of the step is on rank i mod world_size, the (i div world_size)-th there.
    parts = [
        torch.cat(
            [
                stratified_uniform(
                    batch, rank=rank, world_size=world_size, accumulation=accumulation, micro_batch=m, dtype=dtype
                )
                for m in range(accumulation)
            ]
        )
        for rank in range(world_size)
    ]
    u = torch.stack(parts, 1).flatten()
    stratum = u.double() * total
    i = torch.arange(total)
    assert (stratum > i - 1e-6).all() and (u < ((i + 1) / total).to(dtype)).all()


def test_rounding_leaves_no_stratum():
    """Of 200,000 strata in float32, hundreds of numbers would round to the next one."""
    total = 200_000
    u = stratified_uniform(total, generator=torch.Generator().manual_seed(0))
    edges = (torch.arange(total + 1, dtype=DOUBLE) / total).float()
    assert (u >= edges[:-1]).all() and (u < edges[1:]).all()


@given(shares=st.sampled_from([(1, 1), (2, 1), (3, 1), (1, 4), (2, 3), (6, 2)]), seed=st.integers(0, 2**31))
def test_levels_do_not_depend_on_who_computes_them(shares, seed):
    world_size, accumulation = shares
    total = 24
    alone = stratified_uniform(total, generator=torch.Generator().manual_seed(seed))
    for rank in range(world_size):
        own = [
            stratified_uniform(
                total // (world_size * accumulation),
                rank=rank,
                world_size=world_size,
                accumulation=accumulation,
                micro_batch=m,
                generator=torch.Generator().manual_seed(seed),
            )
            for m in range(accumulation)
        ]
        assert torch.equal(torch.cat(own), alone[rank::world_size])


def test_levels_are_uniform_within_their_stratum():
    torch.manual_seed(0)
    draws = torch.stack([stratified_uniform(8) for _ in range(4000)]) * 8 - torch.arange(8)
    assert (draws.mean(0) - 0.5).abs().max() < 5 * (1 / 12 / 4000) ** 0.5
    assert (draws.var(0) - 1 / 12).abs().max() < 5 * (1 / 180 / 4000) ** 0.5
    correlation = torch.corrcoef(draws.T) - torch.eye(8)
    assert correlation.abs().max() < 5 / 4000**0.5


# Bad input


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: schedules.karras_sigmas(0, 0.1, 1.0), "n .*1.*0"),
        (lambda: schedules.karras_sigmas(2.0, 0.1, 1.0), "n .*2.0"),
        (lambda: schedules.karras_sigmas(5, 2.0, 1.0), "sigma_min .*sigma_max.*2.0.*1.0"),
        (lambda: schedules.karras_sigmas(5, 0.0, 1.0), "sigma_min .*positive.*0.0"),
        (lambda: schedules.karras_sigmas(5, 0.1, math.inf), "sigma_max .*finite.*inf"),
        (lambda: schedules.karras_sigmas(5, 0.1, 1.0, rho=-7), "rho .*positive.*-7"),
        (lambda: schedules.exponential_sigmas(5, math.nan, 1.0), "sigma_min .*nan"),
        (lambda: schedules.polyexponential_sigmas(5, 0.1, 1.0, rho="2"), "rho .*'2'"),
        (lambda: schedules.vp_sigmas(5, eps_s=1.0), "eps_s .*1.0"),
        (lambda: schedules.vp_sigmas(5, beta_d=-1), "beta_d .*-1"),
        (lambda: schedules.simple_diffusion_sigmas(-1, 64), "n .*-1"),
        (lambda: schedules.simple_diffusion_sigmas(4, 0), "image_d .*0"),
        (lambda: schedules.logsnr_cosine(U, 3.0, -3.0), "logsnr_min .*3.0.*-3.0"),
        (lambda: schedules.logsnr_cosine(U, -math.inf), "logsnr_min .*finite.*inf"),
        (lambda: schedules.logsnr_shifted(U, 64, -32), "noise_d .*-32"),
        (lambda: schedules.cosine_interpolated_sigmas(U, 64, sigma_data=0), "sigma_data .*0"),
        (lambda: density("log-normal"), "name .*lognormal.*'log-normal'"),
        (lambda: density("lognormal", mean=0.0), "'lognormal' does not take mean.*loc, scale"),
        (lambda: density("loguniform", sigma_min=0.1), "'loguniform' needs sigma_max"),
        (lambda: density("lognormal", scale=0.0), "scale .*0.0"),
        (lambda: density("split-lognormal", loc=0.0, scale_1=1.0, scale_2=-1.0), "scale_2 .*-1.0"),
        (lambda: density("loglogistic", sigma_min=5.0, sigma_max=1.0), "sigma_min .*5.0.*1.0"),
        (lambda: density("loguniform", sigma_min=5.0, sigma_max=1.0), "sigma_min .*5.0.*1.0"),
        (lambda: stratified_uniform(0), "batch .*0"),
        (lambda: stratified_uniform(4, rank=2, world_size=2), r"rank .*\[0, 2\).*2"),
        (lambda: stratified_uniform(4, micro_batch=-1), r"micro_batch .*\[0, 1\).*-1"),
    ],
)
def test_bad_arguments_are_named(call, words):
    with pytest.raises(ValueError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("u", [0.5, torch.arange(3)])
def test_what_is_no_floating_point_tensor_is_named(u):
    for call in (schedules.logsnr_cosine, density("lognormal"), density("cosine")):
        with pytest.raises(TypeError, match=r"floating-point tensor.*(0\.5|int64)"):
            call(u)
