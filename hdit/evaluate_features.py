"""Feature extractors: images (B, 3, H, W) float32 in [-1, 1] with 8-bit levels -> features to take distances of.

``pixels`` and ``patches`` need no weights, so anybody gets the same numbers; ``inception`` and ``dinov2`` are those of
torch-fidelity, for comparison with papers; ``clip`` knows captions, too; any TorchScript file or callable is one.
"""

import hashlib
import importlib.metadata
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

BUNDLED = ("pixels", "patches", "inception", "dinov2", "clip")


class Extractor:
    """What turns a batch of images into features.

    name, version (of the package, or hash of the weights) and resize (in words) are reported with every number.
    per_image: rows of features that an image has. has_classes: ``probabilities`` of the last batch are there.
    """

    name = "extractor"
    version = "1"
    resize = "none"
    per_image = 1
    probabilities: Tensor | None = None

    def __call__(self, images: Tensor, first: int) -> Tensor:
        """Features (B, per_image, d). first: number of the first image of the batch in its set."""
        raise TypeError(f"{type(self).__name__} extracts nothing")


class Pixels(Extractor):
    """The pixels of the image reduced so that its longer side is ``side``: what a low-pass shows, global structure.

    A small side (8, 4) measures coherence of the whole image alone.
    """

    name = "pixels"

    def __init__(self, side: int = 16):
        if isinstance(side, bool) or not isinstance(side, int) or side < 1:
            raise ValueError(f"resize must be a positive integer, got {side!r}")
        self.side = side
        self.resize = f"bicubic, antialiased, longer side {side}"

    def __call__(self, images, first):
        return reduced(images, self.side).flatten(1)[:, None]


class Patches(Extractor):
    """Patches at the image's own resolution: 64 of 8×8 pixels from each image, at places drawn from the seed.

    A patch becomes the discrete cosine transform (orthonormal, in space and over the channels) times (1 + frequency),
    since photographs fall as 1 / frequency and the fine bands would not count; and the magnitudes of all coefficients
    but the means, whose covariance tells edges and textures from noise with the same spectrum. 3·64 + 3·63 = 381
    features. Fixed numbers, nothing is fitted.
    """

    name = "patches"
    side = 8
    per_image = 64

    def __init__(self, seed: int = 0):
        self.seed = seed
        n = torch.arange(self.side, dtype=torch.float64)
        self.cosine = dct_matrix(self.side)
        self.channels = dct_matrix(3)  # grey, and two differences of colours
        self.weight = 1 + torch.hypot(n[:, None], n[None, :])
        self.resize = f"none; {self.per_image} patches of {self.side}×{self.side} pixels per image"

    def __call__(self, images, first):
        height, width = images.shape[2:]
        if min(height, width) < self.side:
            raise ValueError(f"patches need images of at least {self.side} pixels, got {height}×{width}")
        rows = []
        for i, image in enumerate(images):
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + first + i)
            corners = torch.rand(self.per_image, 2, generator=generator, dtype=torch.float64)
            tops, lefts = (corners * torch.tensor([height - self.side + 1, width - self.side + 1])).long().T
            windows = image.unfold(1, self.side, 1).unfold(2, self.side, 1)  # a view (3, rows, columns, 8, 8)
            rows.append(windows[:, tops, lefts].transpose(0, 1))
        patches = torch.cat(rows).double()
        cosine, mixing, weight = (value.to(patches.device) for value in (self.cosine, self.channels, self.weight))
        spectrum = (mixing @ (cosine @ patches @ cosine.T).flatten(2)).unflatten(2, (self.side, self.side)) * weight
        spectrum = spectrum.flatten(2)
        features = torch.cat([spectrum.flatten(1), spectrum[:, :, 1:].abs().flatten(1)], 1)
        return features.view(len(images), self.per_image, -1)


class TorchFidelity(Extractor):
    """Of torch-fidelity: Inception (FID as papers print it, after the TensorFlow graph of 2015), and DINOv2 L/14."""

    KINDS = {  # noqa: RUF012
        "inception": ("inception-v3-compat", ["2048", "logits_unbiased"], "TensorFlow 1 bilinear to 299×299, inside"),
        "dinov2": ("dinov2-vit-l-14", ["dinov2"], "TensorFlow 1 bilinear to 224×224, inside"),
    }

    def __init__(self, name: str, weights: Path | None = None, device: str = "cpu"):
        if importlib.util.find_spec("torch_fidelity") is None:
            raise ModuleNotFoundError(
                f"extractor {name!r} needs the package torch-fidelity: pip install 'hdit[evaluate]'"
            )
        from torch_fidelity.utils import create_feature_extractor

        self.name, self.device = name, device
        kind, layers, self.resize = self.KINDS[name]
        path = None if weights is None else str(weights)
        self.network = create_feature_extractor(
            kind, layers, cuda=False, feature_extractor_weights_path=path, verbose=False
        ).to(device)
        digest = hash_of_parameters(self.network)
        self.version = f"torch-fidelity {importlib.metadata.version('torch-fidelity')} {kind}, weights sha256 {digest}"

    @torch.no_grad()
    def __call__(self, images, first):
        features, *logits = self.network(((images + 1) * 127.5).round().to(self.device, torch.uint8))
        self.probabilities = logits[0].double().softmax(1) if logits else None
        return features[:, None]


class Clip(Extractor):
    """Embeddings of CLIP (Radford et al. 2021, arXiv 2103.00020) by Hugging Face's transformers, and of captions.

    model: a name on the hub, or a folder with the model and its tokenizer.
    """

    MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

    def __init__(self, model: str = "openai/clip-vit-large-patch14", device: str = "cpu"):
        if importlib.util.find_spec("transformers") is None:
            raise ModuleNotFoundError("extractor 'clip' needs the package transformers: pip install transformers")
        from transformers import AutoTokenizer, CLIPModel

        self.name, self.device = f"clip:{model}", device
        self.network = CLIPModel.from_pretrained(model).to(device).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.side = self.network.config.vision_config.image_size
        self.resize = f"bicubic, antialiased, shorter side {self.side}, and its centre"
        version = importlib.metadata.version("transformers")
        self.version = f"transformers {version}, weights sha256 {hash_of_parameters(self.network)}"

    @torch.no_grad()
    def __call__(self, images, first):
        images = reduced(images, round(self.side * max(images.shape[2:]) / min(images.shape[2:]))).clamp(-1, 1)
        top, left = ((length - self.side) // 2 for length in images.shape[2:])
        images = images[:, :, top : top + self.side, left : left + self.side]
        mean, deviation = (torch.tensor(value)[:, None, None] for value in (self.MEAN, self.DEVIATION))
        pixels = ((images + 1) / 2 - mean) / deviation
        found = self.network.vision_model(pixel_values=pixels.to(self.device)).pooler_output
        return self.network.visual_projection(found)[:, None]

    @torch.no_grad()
    def captions(self, captions: list[str]) -> Tensor:
        """Embeddings (n, d) of captions, each cut after as many tokens as CLIP takes."""
        found = []
        for start in range(0, len(captions), 256):
            tokens = self.tokenizer(
                captions[start : start + 256], padding=True, truncation=True, return_tensors="pt"
            ).to(self.device)
            hidden = self.network.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
            found.append(self.network.text_projection(hidden.pooler_output))
        return torch.cat(found).cpu()


class External(Extractor):
    """A TorchScript file, or any callable: (B, 3, H, W) float32 in [-1, 1] -> (B, d)."""

    def __init__(self, function: Callable[[Tensor], Tensor] | Path, resize: int | None = None, device: str = "cpu"):
        if isinstance(function, Path):
            self.name = function.name
            self.version = f"sha256 {hashlib.sha256(function.read_bytes()).hexdigest()[:16]}"
            try:
                self.function = torch.jit.load(function, map_location=device).eval()
            except RuntimeError as error:
                raise ValueError(f"extractor {str(function)!r} is no TorchScript file: {_first_line(error)}") from None
        else:
            self.name = getattr(function, "__qualname__", type(function).__qualname__)
            self.version = f"callable of {getattr(function, '__module__', type(function).__module__)}"
            self.function = function
        self.side, self.device = resize, device
        if resize is not None:
            self.resize = f"bicubic, antialiased, longer side {resize}"

    @torch.no_grad()
    def __call__(self, images, first):
        found = self.function((images if self.side is None else reduced(images, self.side)).to(self.device))
        if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != len(images):
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"extractor {self.name!r} must give ({len(images)}, d) features, got {got}")
        return found[:, None]


class LowPass(Extractor):
    """Another extractor's features of images without their details: reduced so that the longer side is ``side``, and
    enlarged again, both bicubic. What is left is global structure, at the resolution that the extractor expects."""

    def __init__(self, of: Extractor, side: int):
        if isinstance(side, bool) or not isinstance(side, int) or side < 1:
            raise ValueError(f"low_pass must be a positive integer, got {side!r}")
        self.of, self.side, self.version, self.per_image = of, side, of.version, of.per_image
        self.name = f"{of.name}, low-pass {side}"
        self.resize = f"bicubic, antialiased, longer side {side}, and back; then {of.resize}"

    def __call__(self, images, first):
        size = images.shape[2:]
        if self.side >= max(size):
            raise ValueError(f"low_pass must be smaller than images of {size[0]}×{size[1]} pixels, got {self.side}")
        small = reduced(images, self.side).double()
        smooth = F.interpolate(small, size, mode="bicubic", align_corners=False)
        return self.of(smooth.clamp(-1, 1).to(images.dtype), first)


def extractor(
    name: str | Callable, *, resize: int | None = None, weights: Path | None = None, seed: int = 0, device: str = "cpu"
) -> Extractor:
    """The extractor called ``name``: one of ``BUNDLED``, clip:MODEL, the path of a TorchScript file, or a callable.

    resize: longer side for ``pixels`` (16 unless given) and external ones (their own resolution unless given).
    weights: file of Inception's weights, in place of a download. Raises ValueError for options that do not go together.
    """
    if callable(name):
        return name if isinstance(name, Extractor) else External(name, resize, device)
    if resize is not None and (name in ("patches", *TorchFidelity.KINDS) or name.split(":")[0] == "clip"):
        own = {"patches": "works at the images' own resolution"}.get(name, "resizes by itself")
        raise ValueError(f"resize {resize} is for pixels and external extractors; {name} {own}")
    if weights is not None and name != "inception":
        raise ValueError(f"weights {str(weights)!r} are for the extractor inception, got {name!r}")
    if weights is not None and not weights.is_file():
        raise ValueError(f"weights {str(weights)!r} is not a file")
    if name == "pixels":
        return Pixels(16 if resize is None else resize)
    if name == "patches":
        return Patches(seed)
    if name == "clip" or name.startswith("clip:"):
        return Clip(*name.split(":", 1)[1:], device=device)
    if name in TorchFidelity.KINDS:
        return TorchFidelity(name, weights, device)
    if Path(name).is_file():
        return External(Path(name), resize, device)
    raise ValueError(f"extractor {name!r} is unknown; accepted are {', '.join(BUNDLED)} or a TorchScript file")


def reduced(images: Tensor, side: int) -> Tensor:
    """(B, 3, h, w) with a longer side of ``side``: bicubic with antialiasing, in float64, not clipped."""
    scale = side / max(images.shape[2:])
    size = [max(1, round(length * scale)) for length in images.shape[2:]]
    if size == list(images.shape[2:]):
        return images
    return F.interpolate(images.double(), size, mode="bicubic", antialias=True, align_corners=False).to(images.dtype)


def dct_matrix(n: int) -> Tensor:
    """(n, n) orthonormal discrete cosine transform (type 2): row k is frequency k."""
    k = torch.arange(n, dtype=torch.float64)
    matrix = (math.pi / n * torch.outer(k, k + 0.5)).cos() * (2 / n) ** 0.5
    matrix[0] /= 2**0.5
    return matrix


def hash_of_parameters(network: torch.nn.Module) -> str:
    """Sixteen digits of the SHA-256 of names and values of the parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
