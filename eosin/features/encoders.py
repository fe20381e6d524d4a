"""The registry of tile encoders, and how one becomes ready to encode.

Adding an encoder is adding a row. Facts of the rows come from the model cards and from the tools that load the models;
where those disagree under one name, `note` says which one the row follows and the other is a variant of its own.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from eosin.errors import CheckpointError, ConfigError, UnknownNameError
from eosin.features import he_texture
from eosin.features.hub import download_weights
from eosin.features.networks import Pooling, adapt_timm_state, build_ctranspath, build_timm
from eosin.features.transforms import Interpolation, Transform
from eosin.features.weights import find_weights, hash_state, load_strictly, read_state

logger = logging.getLogger(__name__)

Precision = Literal["fp32", "bf16", "fp16"]
PendingRows = Callable[[], NDArray[np.float32]]
Triple = tuple[float, float, float]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RANDOM = "?random"
TIMM = "timm:"

IMAGENET: tuple[Triple, Triple] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF: tuple[Triple, Triple] = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CLIP: tuple[Triple, Triple] = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HOPTIMUS: tuple[Triple, Triple] = ((0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517))
LUNIT: tuple[Triple, Triple] = ((0.70322989, 0.53606487, 0.66096631), (0.21716536, 0.26081574, 0.20723464))


@dataclass(frozen=True)
class EncoderSpec:
    """One row of the registry.

    Parameters
    ----------
    name : str
        What `--encoder` takes and feature files store.
    dim : int
        Width D of the features.
    input_px : int or None
        Side that the network sees; None takes tiles as they come.
    mpp, tile_px : float, int or None
        Resolution and tile side that the authors recommend.
    mean, std : tuple of float
        Normalisation per channel.
    interpolation : "bilinear" or "bicubic"
        How tiles are resized.
    resize_px : int or None
        Side before the centre is cropped to `input_px`; None crops nothing.
    pooling : Pooling
        How tokens or maps become one row.
    source : str
        Hugging Face repository, timm model or other origin of the weights.
    file : str
        Name of the file of weights in that repository; empty for timm's usual names.
    licence : str
        As stated by the authors.
    gated : bool
        Whether access must be asked for.
    build : callable or None
        Makes the network without weights; None for the descriptor that has none.
    dropped : tuple of str
        Prefixes of weights that the network does not use.
    aliases : tuple of str
        Other tools' spellings.
    note : str
        What else a user should know.
    """

    name: str
    dim: int
    input_px: int | None
    mpp: float | None
    mean: Triple
    std: Triple
    pooling: Pooling
    source: str
    licence: str
    build: Callable[[], nn.Module] | None
    interpolation: Interpolation = "bilinear"
    tile_px: int | None = 256
    resize_px: int | None = None
    file: str = ""
    gated: bool = False
    dropped: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    note: str = ""

    @property
    def transform(self) -> Transform | None:
        """The steps between tile and network; None when there is no network."""
        if self.input_px is None:
            return None
        return Transform(self.input_px, self.mean, self.std, self.interpolation, self.resize_px)


def _transformer(
    architecture: str, pooling: Pooling, *, swiglu: bool = False, eps: float | None = None, **arguments: Any
) -> dict[str, Any]:
    """Return the fields of a row that describe a timm vision transformer."""
    arguments = {"num_classes": 0} | arguments
    build = partial(build_timm, architecture, pooling, arguments, swiglu=swiglu, eps=eps)
    return {"pooling": pooling, "build": build}


def _row(name: str, dim: int, statistics: tuple[Triple, Triple], network: dict[str, Any], **fields: Any) -> EncoderSpec:
    mean, std = statistics
    standard: dict[str, Any] = {"input_px": 224, "mpp": 0.5, "mean": mean, "std": std}
    return EncoderSpec(name=name, dim=dim, **(standard | network | fields))


_VIT_L16 = _transformer("vit_large_patch16_224", "cls", init_values=1e-5, dynamic_img_size=True)
_UNI2 = _transformer(
    "vit_giant_patch14_224",
    "cls",
    swiglu=True,
    img_size=224,
    depth=24,
    num_heads=24,
    init_values=1e-5,
    embed_dim=1536,
    mlp_ratio=2.66667 * 2,
    no_embed_class=True,
    reg_tokens=8,
    dynamic_img_size=True,
)
_GIGAPATH = _transformer(
    "vit_giant_patch14_dinov2",
    "cls",
    img_size=224,
    patch_size=16,
    embed_dim=1536,
    depth=40,
    num_heads=24,
    mlp_ratio=5.33334,
    init_values=1e-5,
)
_HOPTIMUS = _transformer("vit_giant_patch14_reg4_dinov2", "cls", img_size=224, init_values=1e-5)
_NC_ND = "CC-BY-NC-ND-4.0"


def _virchow(pooling: Pooling, registers: int) -> dict[str, Any]:
    return _transformer(
        "vit_huge_patch14_224",
        pooling,
        swiglu=True,
        init_values=1e-5,
        mlp_ratio=5.3375,
        reg_tokens=registers,
        dynamic_img_size=True,
        global_pool="",
    )


def _h0_mini(pooling: Pooling) -> dict[str, Any]:
    return _transformer(
        "vit_base_patch14_reg4_dinov2",
        pooling,
        swiglu=True,
        img_size=224,
        init_values=1e-5,
        mlp_ratio=5.33334,
        global_pool="",
    )


def _kaiko(size: str, patch: int) -> dict[str, Any]:
    network = _transformer(f"vit_{size}_patch{patch}_224", "cls", dynamic_img_size=True)
    repository = f"1aurent/vit_{size}_patch{patch}_224.kaiko_ai_towards_large_pathology_fms"
    return network | {"source": repository, "licence": "Kaiko non-commercial"}


def _lunit_resnet(method: str) -> dict[str, Any]:
    build = partial(build_timm, "resnet50", "network", {"num_classes": 0})
    source = f"1aurent/resnet50.lunit_{method}"
    return {"pooling": "network", "build": build, "source": source, "licence": "Lunit non-commercial"}


def _lunit_vit(patch: int) -> dict[str, Any]:
    network = _transformer(f"vit_small_patch{patch}_224", "cls", dynamic_img_size=True)
    source = f"1aurent/vit_small_patch{patch}_224.lunit_dino"
    return network | {"source": source, "licence": "Lunit non-commercial"}


_CLAM_RESNET = {
    "pooling": "map_mean",
    "build": partial(build_timm, "resnet50", "map_mean", {"features_only": True, "out_indices": (3,)}),
    "dropped": ("layer4.",),
}
_CTRANSPATH: dict[str, Any] = {"pooling": "network", "build": build_ctranspath}
_MIDNIGHT = _transformer("vit_giant_patch14_dinov2", "cls", img_size=224)
_MIDNIGHT_MEAN = _transformer("vit_giant_patch14_dinov2", "cls_mean", img_size=224)
_BICUBIC: dict[str, Any] = {"interpolation": "bicubic"}
_PAIGE = _BICUBIC | {"gated": True, "tile_px": 224}
_BIOPTIMUS = _BICUBIC | {"tile_px": 224}

_ROWS: Sequence[EncoderSpec] = (
    EncoderSpec(
        name="he_texture",
        dim=len(he_texture.FEATURE_NAMES),
        input_px=None,
        mpp=None,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        pooling="none",
        source="eosin",
        licence="Apache-2.0",
        build=None,
        tile_px=None,
        note="colour and texture of H&E, no weights; for demonstrations, tests and as a baseline",
    ),
    _row(
        "resnet50",
        1024,
        IMAGENET,
        _CLAM_RESNET,
        source="timm/resnet50.tv_in1k",
        licence="BSD-3-Clause",
        aliases=("resnet50_trunc", "resnet50-imagenet"),
        note="cut after the third stage, as CLAM does",
    ),
    _row("uni_v1", 1024, IMAGENET, _VIT_L16, source="MahmoodLab/UNI", licence=_NC_ND, gated=True, aliases=("uni",),
         note="plain resize to 224 as TRIDENT does, no centre crop"),
    _row("uni_v2", 1536, IMAGENET, _UNI2, source="MahmoodLab/UNI2-h", licence=_NC_ND, gated=True,
         aliases=("uni2", "uni2-h", "uni2_h")),
    _row("virchow", 2560, IMAGENET, _virchow("cls_mean", 0), source="paige-ai/Virchow", licence="Apache-2.0",
         aliases=("virchow-full", "virchow1"), note="class token and mean patch; virchow_cls is the class token",
         **_PAIGE),
    _row("virchow_cls", 1280, IMAGENET, _virchow("cls", 0), source="paige-ai/Virchow", licence="Apache-2.0",
         note="class token only, as STAMP's `virchow`", **_PAIGE),
    _row("virchow2", 2560, IMAGENET, _virchow("cls_mean", 4), source="paige-ai/Virchow2", licence=_NC_ND,
         note="class token and mean patch; virchow2_cls is the class token", **_PAIGE),
    _row("virchow2_cls", 1280, IMAGENET, _virchow("cls", 4), source="paige-ai/Virchow2", licence=_NC_ND,
         note="class token only, as STAMP's `virchow2`", **_PAIGE),
    _row("gigapath", 1536, IMAGENET, _GIGAPATH, source="prov-gigapath/prov-gigapath", gated=True, resize_px=256,
         licence="Apache-2.0 with conditions", aliases=("prov-gigapath",), **_BICUBIC),
    _row("hoptimus0", 1536, HOPTIMUS, _HOPTIMUS, source="bioptimus/H-optimus-0", licence="Apache-2.0",
         aliases=("h-optimus-0", "h_optimus_0", "hoptimus-0"), **_BIOPTIMUS),
    _row("hoptimus1", 1536, HOPTIMUS, _HOPTIMUS, source="bioptimus/H-optimus-1", licence=_NC_ND, gated=True,
         aliases=("h-optimus-1", "h_optimus_1", "hoptimus-1"), **_BIOPTIMUS),
    _row("h0_mini", 768, HOPTIMUS, _h0_mini("cls"), source="bioptimus/H0-mini", licence=_NC_ND, gated=True,
         aliases=("h0-mini", "h0mini"), note="class token, TRIDENT's default; h0_mini_mean adds the mean patch",
         **_BIOPTIMUS),
    _row("h0_mini_mean", 1536, HOPTIMUS, _h0_mini("cls_mean"), source="bioptimus/H0-mini", licence=_NC_ND, gated=True,
         note="class token and mean patch", **_BIOPTIMUS),
    _row("kaiko_vits16", 384, HALF, _kaiko("small", 16), aliases=("kaiko-vits16",)),
    _row("kaiko_vits8", 384, HALF, _kaiko("small", 8), aliases=("kaiko-vits8",)),
    _row("kaiko_vitb16", 768, HALF, _kaiko("base", 16), aliases=("kaiko-vitb16",)),
    _row("kaiko_vitb8", 768, HALF, _kaiko("base", 8), aliases=("kaiko-vitb8",)),
    _row("kaiko_vitl14", 1024, HALF,
         _transformer("vit_large_patch14_reg4_dinov2", "cls", img_size=224, dynamic_img_size=True),
         source="1aurent/vit_large_patch14_reg4_224.kaiko_ai_towards_large_pathology_fms",
         licence="Kaiko non-commercial", aliases=("kaiko-vitl14",)),
    _row("lunit_vits16", 384, LUNIT, _lunit_vit(16), aliases=("lunit-vits16",), **_BICUBIC),
    _row("lunit_vits8", 384, LUNIT, _lunit_vit(8), aliases=("lunit-vits8",), **_BICUBIC),
    _row("lunit_resnet50_bt", 2048, LUNIT, _lunit_resnet("bt"), **_BICUBIC),
    _row("lunit_resnet50_mocov2", 2048, LUNIT, _lunit_resnet("mocov2"), **_BICUBIC),
    _row("lunit_resnet50_swav", 2048, LUNIT, _lunit_resnet("swav"), **_BICUBIC),
    _row("gpfm", 1024, IMAGENET, _transformer("vit_large_patch14_dinov2", "cls", img_size=224, init_values=1e-5),
         source="majiabo/GPFM", file="GPFM.pth", licence=_NC_ND, **_BICUBIC),
    _row("ctranspath", 768, IMAGENET, _CTRANSPATH, source="https://github.com/Xiyue-Wang/TransPath",
         licence="GPL-3.0", note="weights are a download of the authors: ctranspath.pth"),
    _row("chief-ctranspath", 768, IMAGENET, _CTRANSPATH, source="https://github.com/hms-dbmi/CHIEF", mpp=1.0,
         licence="AGPL-3.0", aliases=("chief_ctranspath",), note="the same network, CHIEF_CTransPath.pth"),
    _row("phikon", 768, IMAGENET, _transformer("vit_base_patch16_224", "cls", eps=1e-12), source="owkin/phikon",
         licence="Owkin non-commercial"),
    _row("phikon_v2", 1024, IMAGENET, _VIT_L16, source="owkin/phikon-v2", licence="Owkin non-commercial",
         aliases=("phikonv2", "phikon-v2"), note="plain resize to 224 as TRIDENT does"),
    _row("midnight12k", 1536, HALF, _MIDNIGHT, source="kaiko-ai/midnight", licence="MIT", tile_px=224,
         aliases=("midnight",), note="class token, TRIDENT's default; midnight12k_mean adds the mean patch"),
    _row("midnight12k_mean", 3072, HALF, _MIDNIGHT_MEAN, source="kaiko-ai/midnight", licence="MIT", tile_px=224,
         note="class token and mean patch, as the model card"),
    _row("plip", 512, CLIP, _transformer("vit_base_patch32_clip_quickgelu_224", "network", num_classes=512),
         source="vinid/plip", licence="as stated by the authors", tile_px=224, note="the projected image embedding",
         **_BICUBIC),
    _row("mstar", 1024, IMAGENET, _VIT_L16, source="Wangyh/mSTAR", licence="as stated by the authors", gated=True),
    _row("pathorchestra", 1024, IMAGENET, _VIT_L16, source="AI4Pathology/PathOrchestra", gated=True,
         licence="as stated by the authors"),
)  # fmt: skip

ENCODERS: dict[str, EncoderSpec] = {row.name: row for row in _ROWS}
_ALIASES = {alias: row.name for row in _ROWS for alias in row.aliases}


def find_encoder(name: str) -> EncoderSpec:
    """Return the row of an encoder.

    Parameters
    ----------
    name : str
        A registered name, another tool's spelling of it, or ``timm:<model>`` for any model of timm. With the ending
        ``?random`` the network keeps its random weights, the same in every run.

    Raises
    ------
    UnknownNameError
        Suggesting the nearest names.
    """
    plain = name.removesuffix(RANDOM)
    spec = _find_timm(plain) if plain.startswith(TIMM) else ENCODERS.get(_ALIASES.get(plain, plain))
    if spec is None:
        raise UnknownNameError("encoder", plain, [*ENCODERS, "timm:<model>"])
    return replace(spec, name=spec.name + RANDOM, source="random weights") if name.endswith(RANDOM) else spec


def _find_timm(name: str) -> EncoderSpec:
    import timm
    from timm.data.config import resolve_data_config

    model = name.removeprefix(TIMM)
    architecture = model.partition(".")[0]
    if not timm.is_model(architecture):
        raise UnknownNameError("timm model", architecture, timm.list_models())
    with torch.device("meta"):
        network: Any = timm.create_model(model, pretrained=False, num_classes=0)
    facts: dict[str, Any] = resolve_data_config(network.pretrained_cfg, model=network)  # type: ignore[no-untyped-call]
    side = int(facts["input_size"][-1])
    return EncoderSpec(
        name=name,
        dim=int(network.num_features),
        input_px=side,
        mpp=None,
        mean=tuple(facts["mean"]),
        std=tuple(facts["std"]),
        pooling="network",
        source=network.pretrained_cfg.get("hf_hub_id") or f"timm/{model}",
        licence="as stated by timm",
        build=partial(build_timm, architecture, "network", {"num_classes": 0}),
        interpolation="bicubic" if facts["interpolation"] == "bicubic" else "bilinear",
        tile_px=None,
        note="a general network, not trained on tissue",
    )


def folder_name(name: str) -> str:
    """Return an encoder's name as part of a file name on any system: ``timm:vit?random`` is ``timm_vit_random``."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)


class Encoder:
    """An encoder that is ready: weights loaded, on its device.

    Parameters
    ----------
    spec : EncoderSpec
        Its row.
    weights_hash : str
        Content hash of the weights in use.
    network : nn.Module or None
        None for the descriptor without weights.
    precision : "fp32", "bf16" or "fp16"
        Autocast type; results are float32 in any case.
    device : str
        Where the network computes.
    """

    def __init__(
        self,
        spec: EncoderSpec,
        weights_hash: str,
        network: nn.Module | None,
        *,
        precision: Precision = "fp32",
        device: str = "cpu",
    ) -> None:
        self.spec = spec
        self.weights_hash = weights_hash
        self.precision = precision
        self.device = torch.device(device)
        self._network = None if network is None else network.to(self.device).eval().requires_grad_(False)

    @property
    def dim(self) -> int:
        """Width D of the features."""
        return self.spec.dim

    def describe(self) -> dict[str, str]:
        """Return what a feature file stores about the encoder."""
        transform = self.spec.transform
        return {
            "source": self.spec.source,
            "pooling": self.spec.pooling,
            "transform": transform.describe() if transform else "none",
            "precision": self.precision,
        }

    def encode(self, tiles: NDArray[np.uint8], *, precision: Precision | None = None) -> NDArray[np.float32]:
        """Return one row per tile.

        Parameters
        ----------
        tiles : (b, h, w, 3) uint8
            Square tiles.
        precision : "fp32", "bf16" or "fp16", optional
            For this call only.

        Returns
        -------
        (b, D) float32
        """
        return self.start(tiles, precision=precision)()

    def start(self, tiles: NDArray[np.uint8], *, precision: Precision | None = None) -> PendingRows:
        """Begin to encode and return a function that waits for the rows.

        A GPU computes while the caller prepares the next batch; elsewhere the rows are ready on return.
        """
        if len(tiles) == 0:
            return lambda: np.empty((0, self.dim), np.float32)
        if self._network is None:
            rows = np.asarray(he_texture.describe(tiles), np.float32)
            return lambda: rows
        return self._launch(self._network, tiles, precision or self.precision)

    def _launch(self, network: nn.Module, tiles: NDArray[np.uint8], precision: Precision) -> PendingRows:
        transform = self.spec.transform
        assert transform is not None
        batch = torch.from_numpy(np.ascontiguousarray(tiles))
        with torch.inference_mode():
            if self.device.type == "cuda":
                batch = batch.pin_memory()
            with self._autocast(precision):
                rows = network(transform(batch.to(self.device, non_blocking=True))).float()
            return _wait_for_copy(rows) if rows.is_cuda else rows.cpu().numpy

    def _autocast(self, precision: Precision) -> AbstractContextManager[object]:
        if precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, DTYPES[precision])


def _wait_for_copy(rows: torch.Tensor) -> PendingRows:
    """Begin to copy rows from the device; return what waits for the end of it."""
    here = torch.empty(rows.shape, dtype=torch.float32, pin_memory=True)
    here.copy_(rows, non_blocking=True)
    arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrived.record()

    def wait() -> NDArray[np.float32]:
        arrived.synchronize()
        array: NDArray[np.float32] = here.numpy()
        return array

    return wait


def load_encoder(
    name: str,
    *,
    weights: Path | None = None,
    precision: Precision = "fp32",
    device: str = "cpu",
) -> Encoder:
    """Load an encoder and its weights.

    Parameters
    ----------
    name : str
        As `find_encoder` takes it.
    weights : Path, optional
        Local file or folder of weights; without it they come from the Hugging Face hub or its local cache.
    precision : "fp32", "bf16" or "fp16"
        Autocast type of the network.
    device : str
        For example ``cpu`` or ``cuda:0``.

    Raises
    ------
    UnknownNameError
        When there is no such encoder.
    ConfigError
        When the options contradict each other, or the weights can be had neither locally nor from the hub.
    CheckpointError
        When a file of weights is damaged, unsafe or of another network.
    """
    if precision not in get_args(Precision):
        raise ConfigError(f"precision {precision!r}: choose one of {', '.join(get_args(Precision))}")
    spec = find_encoder(name)
    if weights is not None and (spec.build is None or name.endswith(RANDOM)):
        raise ConfigError(f"encoder {spec.name} uses no weights from files; leave out --weights")
    if spec.build is None:
        return Encoder(spec, _descriptor_hash(), None)
    network = _random_network(spec)
    if not name.endswith(RANDOM):
        _load_weights(network, spec, find_weights(weights or _fetch_weights(spec)))
    return Encoder(spec, hash_state(network.state_dict()), network, precision=precision, device=device)


def _fetch_weights(spec: EncoderSpec) -> Path:
    if spec.source.startswith("https://"):
        raise ConfigError(
            f"the weights of {spec.name} are not on the hub; get them at {spec.source} and pass --weights FILE",
            code="weights",
        )
    return download_weights(spec.source, file=spec.file, gated=spec.gated)


def _descriptor_hash() -> str:
    return sha256(repr((he_texture.REVISION, he_texture.FEATURE_NAMES)).encode()).hexdigest()[:16]


def _random_network(spec: EncoderSpec) -> nn.Module:
    assert spec.build is not None
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return spec.build()


def _load_weights(network: nn.Module, spec: EncoderSpec, path: Path) -> None:
    trunk: nn.Module = network.trunk  # type: ignore[assignment]
    state = {key: value for key, value in read_state(path).items() if not key.startswith(spec.dropped)}
    try:
        state = adapt_timm_state(trunk, state)
    except (RuntimeError, KeyError, ValueError) as error:
        raise CheckpointError(path, f"does not fit encoder {spec.name} ({error})") from error
    load_strictly(trunk, state, path)
