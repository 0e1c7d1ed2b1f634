"""Samplers against stored values of k-diffusion in float64, exact solutions, and each other."""

import inspect
import itertools
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from hdit.diffusion import noise, samplers
from hdit.diffusion.guidance import Guided, Thresholded
from hdit.diffusion.samplers import SAMPLERS

DATA = Path(__file__).parent / "data"
GOLDEN = load_file(DATA / "diffusion.safetensors")
# Of k-diffusion 0.1.1.post1 (PyPI), sampling.py run on the same denoiser, start and noise as the file above: what that
# one lacks. _churn: s_churn 3, s_tmin 0.05, s_tmax 40, s_noise 1.003. _eta0.6: s_noise 1.003. _exp: sigmas_exp.
# _open: sigmas_karras without its last value, 0.
MORE = load_file(DATA / "samplers.safetensors")
MU, SIGMAS, X = GOLDEN["mu"], GOLDEN["sigmas_karras"], 60 * GOLDEN["x"]
CHURN = {"s_churn": 3.0, "s_tmin": 0.05, "s_tmax": 40.0, "s_noise": 1.003}
STOCHASTIC = ("euler_ancestral", "dpmpp_2m_sde", "dpmpp_3m_sde", "ddpm")


def denoiser(x, sigma):
    """The denoiser that the stored values were computed with."""
    sigma = sigma.view(-1, 1, 1, 1)
    return MU + (x - MU) * 0.25 / (0.25 + sigma**2) + 0.1 * torch.sin(3 * x / (1 + sigma))


def stored_noise(sigma, sigma_next):
    return GOLDEN["noise"]


def close(got, want, relative=1e-13):
    return (got - want).abs().max() <= relative * want.abs().max()


CASES = [
    ("euler", "euler", {}),
    ("heun", "heun", {}),
    ("euler_ancestral", "euler_ancestral", {}),
    ("dpmpp_2m", "dpmpp_2m", {}),
    ("dpmpp_2m_sde_eta0_midpoint", "dpmpp_2m_sde", {"eta": 0}),
    ("dpmpp_2m_sde_eta0_heun", "dpmpp_2m_sde", {"eta": 0, "solver_type": "heun"}),
    ("dpmpp_2m_sde_eta1", "dpmpp_2m_sde", {}),
    ("dpmpp_3m_sde_eta0", "dpmpp_3m_sde", {"eta": 0}),
    ("dpmpp_3m_sde_eta1", "dpmpp_3m_sde", {}),
    ("euler_churn", "euler", CHURN),
    ("heun_churn", "heun", CHURN),
    ("euler_ancestral_eta0.6", "euler_ancestral", {"eta": 0.6, "s_noise": 1.003}),
    ("dpmpp_2m_sde_eta0.6_midpoint", "dpmpp_2m_sde", {"eta": 0.6, "s_noise": 1.003}),
    ("dpmpp_2m_sde_eta0.6_heun", "dpmpp_2m_sde", {"eta": 0.6, "s_noise": 1.003, "solver_type": "heun"}),
    ("dpmpp_2m_sde_eta1_heun", "dpmpp_2m_sde", {"solver_type": "heun"}),
    ("dpmpp_3m_sde_eta0.6", "dpmpp_3m_sde", {"eta": 0.6, "s_noise": 1.003}),
    *((f"{name}_{kind}", name, {}) for name in SAMPLERS if name != "ddpm" for kind in ("exp", "open")),
]


@pytest.mark.parametrize(("key", "name", "options"), CASES, ids=[case[0] for case in CASES])
def test_k_diffusion(key, name, options):
    if "noise_sampler" in inspect.signature(SAMPLERS[name]).parameters:
        options = {"noise_sampler": stored_noise, **options}
    sigmas = GOLDEN["sigmas_exp"] if key.endswith("_exp") else SIGMAS[:-1] if key.endswith("_open") else SIGMAS
    got = SAMPLERS[name](denoiser, X, sigmas, **options)
    assert got.dtype == torch.float64
    assert close(got, (GOLDEN | MORE)[key])


def test_every_stored_value_is_compared():
    stored = {key for key in GOLDEN if key.startswith(tuple(SAMPLERS))} | set(MORE)
    assert stored == {key for key, _, _ in CASES}


def test_ddpm_variance():
    """Ancestral sampling of z = x/√(1 + sigma²), written with simple diffusion's alpha and sigma of λ = −2 ln sigma."""
    gamma, z = 0.3, X / (1 + SIGMAS[0] ** 2).sqrt()
    for t, s in itertools.pairwise(SIGMAS):
        alpha_t, alpha_s = ((1 / (1 + v**2)).sqrt() for v in (t, s))
        clean = denoiser(z / alpha_t, t.expand(2))
        if s == 0:
            z = clean
            break
        c = -torch.expm1(-2 * t.log() + 2 * s.log())
        mean = alpha_s * (z * (1 - c) / alpha_t + c * clean)
        variance = c * (1 - alpha_t**2) ** gamma * (1 - alpha_s**2) ** (1 - gamma)
        z = mean + variance.sqrt() * GOLDEN["noise"]
    assert close(samplers.ddpm(denoiser, X, SIGMAS, gamma=gamma, noise_sampler=stored_noise), z)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_ddpm_variance_lies_between_its_bounds(gamma):
    """One step with a denoiser that returns 0: what is left besides x·ratio is the noise."""
    levels, one = [5.0, 3.0], torch.ones(1, 1, dtype=torch.float64)
    step = samplers.ddpm(lambda x, s: 0 * x, one, levels, gamma=gamma, noise_sampler=lambda a, b: one)
    std = (step - 9 / 25).item()
    small = 3 * math.sqrt(16 / 25)  # the posterior's, in x
    large = math.sqrt(16 / 25 * (25 / 26) * 10)  # 1 − alpha_t²/alpha_s² of z, in x
    assert small <= std * (1 + 1e-12) and std <= large * (1 + 1e-12)
    assert std == pytest.approx(small ** (1 - gamma) * large**gamma, rel=1e-12)


def test_methods_that_are_one():
    """DDPM's posterior is the ancestral Euler step and the first-order SDE; 2M is 2M SDE without noise."""
    options = {"noise_sampler": stored_noise}
    posterior = samplers.ddpm(denoiser, X, SIGMAS, gamma=0, **options)
    assert close(samplers.euler_ancestral(denoiser, X, SIGMAS, **options), posterior)
    one_step = [samplers.dpmpp_3m_sde(denoiser, X, [3.0, 1.0], **options)]
    one_step += [samplers.ddpm(denoiser, X, [3.0, 1.0], gamma=0, **options)]
    assert close(*one_step)
    assert torch.equal(samplers.dpmpp_2m(denoiser, X, SIGMAS), samplers.dpmpp_2m_sde(denoiser, X, SIGMAS, eta=0))


def log_spaced(n, high=80.0, low=0.01):
    return torch.logspace(math.log10(high), math.log10(low), n + 1, dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "options", "least", "most"),
    [
        ("euler", {}, 0.9, 1.2),
        ("heun", {}, 1.9, 2.2),
        ("dpmpp_2m", {}, 1.9, 2.2),
        ("dpmpp_2m_sde", {"eta": 0, "solver_type": "heun"}, 1.9, 2.2),
        ("dpmpp_3m_sde", {"eta": 0}, 1.9, 2.2),
        ("dpmpp_3m_sde", {"eta": 0, "solver_type": "taylor"}, 2.9, 5),
    ],
)
def test_order_of_convergence(name, options, least, most):
    """Data N(0, 1/4): the ODE's solution is x·√(sigma'² + 1/4)/√(sigma² + 1/4).

    From sigma = 80, where D hardly changes: the first steps, of lower order, do not count.
    """

    def gaussian(x, sigma):
        return x * (0.25 / (0.25 + sigma**2)).view(-1, 1, 1, 1)

    x = GOLDEN["x"] * 80
    exact = x * math.sqrt((0.01**2 + 0.25) / (80**2 + 0.25))
    coarse, fine = (
        (SAMPLERS[name](gaussian, x, log_spaced(n), **options) - exact).abs().max().item() for n in (80, 160)
    )
    assert least <= math.log2(coarse / fine) <= most


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("heun", {"s_churn": 20.0, "seed": 1}),
        ("dpmpp_2m", {}),
        ("dpmpp_2m_sde", {"eta": 0.5, "seed": 1}),
        ("dpmpp_2m_sde", {"eta": 2.0, "seed": 1, "solver_type": "heun"}),
        ("dpmpp_3m_sde", {"seed": 1}),
        ("dpmpp_3m_sde", {"eta": 2.0, "seed": 1, "solver_type": "taylor"}),
    ],
)
def test_samples_have_the_variance_of_the_data(name, options):
    """Data N(0, 1/4) in 24,576 pixels, whatever noise is added on the way: 5 deviations, and 2 % for 100 steps."""
    x = 80 * noise.initial((2, 3, 64, 64), 0, dtype=torch.float64)
    sigmas = torch.cat([log_spaced(99, 80, 0.005), torch.zeros(1, dtype=torch.float64)])
    image = SAMPLERS[name](lambda x, s: x * (0.25 / (0.25 + s**2)).view(-1, 1, 1, 1), x, sigmas, **options)
    assert abs(image.square().mean() / 0.25 - 1) <= 5 * math.sqrt(2 / x.numel()) + 0.02


@pytest.mark.parametrize("eta", [0.4, 1.0, 2.0])
@pytest.mark.parametrize("name", ["dpmpp_2m_sde", "dpmpp_3m_sde"])
def test_finer_steps_refine_the_same_path(name, eta):
    """For a constant D each step is exact, noise included: 3 steps and 40 steps of one seed give one image."""
    options = {"eta": eta, "seed": 7}
    coarse, fine = (
        SAMPLERS[name](lambda x, s: MU.expand(x.shape), X, log_spaced(n, 60, 0.1), **options) for n in (3, 40)
    )
    assert (coarse - MU).std() > 0.05  # at sigma = 0.1
    assert close(coarse, fine, 1e-6)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_seed_and_batch(name):
    """An image is the same alone or in a batch, another seed gives another, and the global generator is not read."""
    kept = torch.get_rng_state()
    both = SAMPLERS[name](denoiser, X, SIGMAS, seed=3)
    alone = SAMPLERS[name](denoiser, X[1:], SIGMAS, seed=[4])
    other = SAMPLERS[name](denoiser, X, SIGMAS, seed=5)
    assert torch.equal(torch.get_rng_state(), kept)
    assert close(alone, both[1:])
    assert (both - other).abs().min(0).values.median() > 1e-6
    assert not close(both, other, 1e-3)


@pytest.mark.parametrize("name", SAMPLERS)
def test_unseeded_runs_follow_the_global_generator(name):
    """A deterministic sampler leaves it alone; another draws from it, so that manual_seed repeats a run."""
    results, states = [], []
    for _ in range(2):
        torch.manual_seed(0)
        before = torch.get_rng_state()
        results.append(SAMPLERS[name](denoiser, X, SIGMAS))
        states.append(torch.equal(torch.get_rng_state(), before))
    assert torch.equal(*results)
    assert states == [name not in STOCHASTIC] * 2


class NoSync(TorchDispatchMode):
    """Fails where a value is fetched from a tensor, or a tensor is copied to another device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert "local_scalar_dense" not in str(function), "a value was read from a tensor"
        assert (kwargs or {}).get("device", None) is None or "_to_copy" not in str(function), "a tensor was moved"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("name", SAMPLERS)
def test_steps_do_not_wait_for_the_device(name, guided):
    sampler, watch, calls = SAMPLERS[name], NoSync(), []
    options = {"s_churn": 3.0} if name in ("euler", "heun") else {}
    if "seed" in inspect.signature(sampler).parameters:
        options["seed"] = 0

    def watched(x, sigma, class_cond=None):
        if not calls:
            watch.__enter__()  # from the first evaluation on: sigmas have been read by then
        calls.append(sigma)
        return denoiser(x, sigma)

    model = watched
    if guided:
        options["extra"] = {"class_cond": torch.tensor([0, 1])}
        model = Thresholded(Guided(watched, 2, num_classes=2, interval=(0.1, 30), rescale=0.5), 0.9)
    try:
        sampler(model, X, SIGMAS, **options)
    finally:
        if calls:
            watch.__exit__(None, None, None)
    assert len(calls) >= 9


@pytest.mark.parametrize("name", SAMPLERS)
def test_meta_device(name):
    """A meta tensor has no values: whatever depended on one would raise."""
    x = torch.empty(2, 3, 8, 8, device="meta")
    got = SAMPLERS[name](lambda x, sigma: x * sigma.view(-1, 1, 1, 1), x, SIGMAS)
    assert got.device.type == "meta" and got.dtype == torch.float32 and got.shape == x.shape


@pytest.mark.parametrize("name", SAMPLERS)
def test_state_is_wide_around_a_bfloat16_denoiser(name):
    """The error against float64 stays that of the denoiser's rounding, which a bfloat16 state would exceed."""

    def rounding(x, sigma):
        return denoiser(x.double(), sigma.double()).bfloat16().to(dtype)

    options = {"noise_sampler": stored_noise} if name in STOCHASTIC else {}
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        results.append(SAMPLERS[name](rounding, X.bfloat16() if dtype is torch.bfloat16 else X.bfloat16().double(),
                                      SIGMAS[:-1], **options))  # fmt: skip
    assert results[0].dtype == torch.float32
    # Rounding of D differs where its input's last float32 digit tips it: few pixels, each by one unit of bfloat16.
    difference = (results[0].double() - results[1]).abs()
    assert difference.median() <= 1e-5 and difference.max() <= 3 * 2**-8


@pytest.mark.parametrize("name", SAMPLERS)
def test_callback_sees_each_step(name):
    seen = []
    result = SAMPLERS[name](lambda x, s: denoiser(x, s), X, SIGMAS, callback=lambda info: seen.append(info))
    assert [info["i"] for info in seen] == list(range(9))
    assert [info["sigma"] for info in seen] == SIGMAS[:-1].tolist()
    assert torch.equal(seen[0]["x"], X)
    for info in seen:
        assert torch.equal(info["denoised"], denoiser(info["x"], torch.full((2,), info["sigma_hat"]).double()))
    assert close(result, seen[-1]["denoised"])  # the last step, to sigma 0, returns D


def test_churn_reports_the_level_of_the_evaluation():
    seen = []
    samplers.euler(denoiser, X, SIGMAS, callback=seen.append, seed=0, **CHURN)
    raised = [info["sigma_hat"] / info["sigma"] for info in seen]
    expected = [4 / 3 if 0.05 <= s <= 40 else 1.0 for s in SIGMAS[:-1].tolist()]
    assert raised == pytest.approx(expected, rel=1e-12)
    assert set(expected) == {1.0, 4 / 3}
    seen.clear()
    samplers.heun(denoiser, X, SIGMAS, callback=seen.append, seed=0, s_churn=90)
    assert [i["sigma_hat"] / i["sigma"] for i in seen] == pytest.approx([math.sqrt(2)] * 9, rel=1e-12)  # EDM's limit


def test_conditions_reach_the_denoiser():
    got = samplers.heun(lambda x, sigma, gain: gain * denoiser(x, sigma), X, SIGMAS, extra={"gain": 0.5})
    want = samplers.heun(lambda x, sigma: 0.5 * denoiser(x, sigma), X, SIGMAS)
    assert torch.equal(got, want) and not close(got, GOLDEN["heun"], 1e-3)


def test_denoiser_of_a_level():
    """A denoiser that has a method at is asked for each level's own, with a Python number."""

    class Levels:
        def at(self, sigma):
            assert isinstance(sigma, float)
            return (lambda x, s: 0 * x) if sigma > 1 else denoiser

        def __call__(self, x, sigma):
            raise AssertionError("not asked for")

    got = samplers.dpmpp_2m(Levels(), X, SIGMAS)
    want = samplers.dpmpp_2m(lambda x, s: denoiser(x, s) * (s <= 1).view(-1, 1, 1, 1), X, SIGMAS)
    assert close(got, want)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"denoiser": 3}, TypeError, "denoiser .*int"),
        ({"x": X.long()}, ValueError, "x .*int64"),
        ({"x": [1.0]}, ValueError, "x .*list"),
        ({"sigmas": SIGMAS.flip(0)}, ValueError, "sigmas .*decrease"),
        ({"sigmas": [1.0, 1.0, 0.0]}, ValueError, r"sigmas .*1\.0, 1\.0"),
        ({"sigmas": [1.0, 0.5, -0.1]}, ValueError, r"sigmas .*-0\.1"),
        ({"sigmas": [math.inf, 1.0]}, ValueError, "sigmas .*inf"),
        ({"sigmas": [math.nan, 1.0]}, ValueError, "sigmas .*nan"),
        ({"sigmas": [1.0]}, ValueError, r"sigmas .*\(1,\)"),
        ({"sigmas": SIGMAS[None]}, ValueError, r"sigmas .*\(1, 10\)"),
        ({"denoiser": lambda x, s: x[:, :1]}, ValueError, r"denoiser .*\(2, 3, 8, 8\).*\(2, 1, 8, 8\)"),
    ],
)
def test_bad_inputs_are_named(name, arguments, error, words):
    with pytest.raises(error, match=words):
        SAMPLERS[name](**{"denoiser": denoiser, "x": X, "sigmas": SIGMAS} | arguments)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("euler", {"s_churn": -1.0}, "s_churn .*-1"),
        ("heun", {"s_noise": math.nan}, "s_noise .*nan"),
        ("euler_ancestral", {"eta": "1"}, "eta .*'1'"),
        ("ddpm", {"gamma": -0.1}, "gamma .*-0.1"),
        ("dpmpp_2m_sde", {"solver_type": "rk4"}, "solver_type .*midpoint.*rk4"),
        ("dpmpp_3m_sde", {"solver_type": "heun"}, "solver_type .*taylor.*heun"),
        ("dpmpp_3m_sde", {"eta": math.inf}, "eta .*inf"),
        ("dpmpp_3m_sde", {"seed": [1, 2, 3]}, "seed .*2, got 3"),
    ],
)
def test_bad_options_are_named(name, options, words):
    with pytest.raises(ValueError, match=words):
        SAMPLERS[name](denoiser, X, SIGMAS, **options)


def test_noise_is_used_where_eta_is_positive_only():
    def refuse(sigma, sigma_next):
        raise AssertionError("noise was asked for")

    for name in ("euler_ancestral", "dpmpp_2m_sde", "dpmpp_3m_sde"):
        SAMPLERS[name](denoiser, X, SIGMAS, eta=0, noise_sampler=refuse)
    samplers.euler(denoiser, X, SIGMAS, noise_sampler=refuse)
    assert isinstance(noise.Gaussian(X, 0)(1.0, 0.5), torch.Tensor)
