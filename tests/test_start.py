"""What starting costs: the packages that `import hdit` and the command line do without."""

import json
import subprocess
import sys

import pytest

HEAVY = (
    "accelerate",
    "datasets",
    "matplotlib",
    "scipy",
    "skimage",
    "sklearn",
    "sympy",
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.export",
)


@pytest.mark.parametrize("start", ["import hdit", "import hdit.__main__ as m; m.parse(['flops'])"])
def test_heavy_packages_wait_until_they_are_used(start):
    program = f"import sys, json, torch; before = set(sys.modules); {start}; print(json.dumps([*before])); "
    program += "print(json.dumps([*sys.modules]))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    before, after = (set(json.loads(line)) for line in run.stdout.splitlines())
    assert "hdit.train_step" in after
    assert not [name for name in HEAVY if name in after - before]


def test_public_names_are_there_after_import():
    names = "hdit.HDiT, hdit.DiT, hdit.UViT, hdit.train.Run, hdit.diffusion.samplers.heun, hdit.flops.count"
    subprocess.run([sys.executable, "-c", f"import hdit; {names}"], check=True)
