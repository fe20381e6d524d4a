"""Weights under the names of other libraries and training codes, renamed to timm's.

With these, encoders published for `transformers` need that library neither to be installed nor trusted. Two layouts of
it are read: that of its files, and that of models which its version 5 holds in memory.
"""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

State = Mapping[str, Tensor]

VIT_RULES = (
    (r"^embeddings\.cls_token", "cls_token"),
    (r"^embeddings\.register_tokens", "reg_token"),
    (r"^embeddings\.position_embeddings", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^(encoder\.)?layers?\.", "blocks."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.layer_scale([12])\.lambda1", r".ls\1.gamma"),
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.([qkv])_proj\.", r".attn.\1."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.mlp\.weights_in\.", ".mlp.fc1."),
    (r"\.mlp\.(weights_out|down_proj)\.", ".mlp.fc2."),
    (r"^(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"^layernorm\.", "norm."),
)
VIT_UNUSED = ("embeddings.mask_token", "pooler.", "classifier.")

CLIP_RULES = (
    (r"^vision_model\.embeddings\.class_embedding", "cls_token"),
    (r"^vision_model\.embeddings\.position_embedding\.weight", "pos_embed"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"^vision_model\.pre_layrnorm\.", "norm_pre."),
    (r"^vision_model\.post_layernorm\.", "norm."),
    (r"^vision_model\.encoder\.layers\.", "blocks."),
    (r"\.layer_norm([12])\.", r".norm\1."),
    (r"\.self_attn\.out_proj\.", ".attn.proj."),
    (r"\.self_attn\.([qkv])_proj\.", r".attn.\1."),
    (r"^visual_projection\.", "head."),
)
CLIP_UNUSED = ("text_model.", "text_projection.", "logit_scale", "vision_model.embeddings.position_ids")

DINO_RULES = (
    (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # blocks in chunks, as sharded training saves them
    (r"\.mlp\.w12\.", ".mlp.fc1."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
    (r"^register_tokens$", "reg_token"),
)
DINO_UNUSED = ("mask_token", "masked_embed")

KEEP_RULES = ((r"\.(ls[12])\.weight$", r".\1.gamma"),)
KEEP_UNUSED = ("text.", "logit_scale")

JOINED = (  # parts that timm keeps in one matrix, one below the other
    ("attn", ("query", "key", "value"), "qkv"),
    ("attn", ("q", "k", "v"), "qkv"),
    ("mlp", ("gate_proj", "up_proj"), "fc1"),
)


def is_transformers_vit(state: State) -> bool:
    """Tell whether weights have the names of the ViT or DINOv2 of `transformers`."""
    return "embeddings.cls_token" in state


def is_transformers_clip(state: State) -> bool:
    """Tell whether weights have the names of the CLIP of `transformers`."""
    return "vision_model.embeddings.class_embedding" in state


def convert_vit(state: State, grid: tuple[int, int]) -> dict[str, Tensor]:
    """Rename the weights of a ``ViTModel``, ``Dinov2Model`` or ``Dinov2WithRegistersModel``.

    Parameters
    ----------
    state : mapping of str to Tensor
        Under the names of `transformers`, of its files or of its version 5 in memory.
    grid : (int, int)
        Patches of the network's input, down and across.

    Returns
    -------
    dict of str to Tensor
        Under timm's names; queries, keys and values joined into one projection, positions resampled as `transformers`
        resamples them.
    """
    renamed = _join_parts(_rename(state, VIT_RULES, VIT_UNUSED))
    renamed["pos_embed"] = _resample(renamed["pos_embed"], grid, antialias="reg_token" in renamed)
    return renamed


def _resample(positions: Tensor, grid: tuple[int, int], *, antialias: bool) -> Tensor:
    """Return positions (1, 1 + patches, E) for another number of patches; timm would smooth them in any case."""
    side = round((positions.shape[1] - 1) ** 0.5)
    if (side, side) == grid:
        return positions
    cls, patches = positions[:, :1], positions[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    patches = F.interpolate(patches.float(), size=grid, mode="bicubic", align_corners=False, antialias=antialias)
    return torch.cat([cls, patches.flatten(2).transpose(1, 2).to(cls)], dim=1)


def convert_clip(state: State) -> dict[str, Tensor]:
    """Rename the vision tower and projection of a ``CLIPModel``.

    Parameters
    ----------
    state : mapping of str to Tensor
        Under the names of `transformers`.

    Returns
    -------
    dict of str to Tensor
        Under timm's names, the projection as head with a bias of zeros.
    """
    renamed = _join_parts(_rename(state, CLIP_RULES, CLIP_UNUSED))
    renamed["cls_token"] = renamed["cls_token"].reshape(1, 1, -1)
    renamed["pos_embed"] = renamed["pos_embed"].unsqueeze(0)
    renamed["head.bias"] = torch.zeros(len(renamed["head.weight"]))
    return renamed


def convert_dino(state: State) -> dict[str, Tensor]:
    """Rename what DINO, iBOT and DINOv2 call otherwise than timm; other names stay as they are."""
    return _rename(state, DINO_RULES, DINO_UNUSED)


def convert_keep(state: State) -> dict[str, Tensor]:
    """Rename the vision tower of KEEP, whose scales of layers lost their name on the way through `transformers`."""
    return _rename(state, KEEP_RULES, KEEP_UNUSED)


def convert_lite(state: State, names: Sequence[str]) -> dict[str, Tensor]:
    """Return weights of EfficientNet-Lite with Keras-like names (``_blocks.0._bn1``) under timm's, no classifier.

    Both implementations register the same layers in the same order, so the names follow from the order; shapes are
    checked when the weights are loaded. Weights that have timm's names already stay as they are.
    """
    kept = {name: value for name, value in state.items() if not name.startswith(("_fc.", "classifier."))}
    if not any(name.startswith("_blocks.") for name in kept):
        return kept
    if len(kept) != len(names):
        raise ValueError(f"{len(kept)} tensors, where the network has {len(names)}")
    return dict(zip(names, kept.values(), strict=True))


def fold_class_position(state: State) -> dict[str, Tensor]:
    """Add the position of the class token to the token, for networks whose positions are those of patches alone."""
    positions = state["pos_embed"]
    return {
        **state,
        "cls_token": state["cls_token"] + positions[:, :1],
        "pos_embed": positions[:, 1:],
    }


def _rename(state: State, rules: Sequence[tuple[str, str]], unused: tuple[str, ...]) -> dict[str, Tensor]:
    renamed = {}
    for name, value in state.items():
        if name.startswith(unused):
            continue
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    return renamed


def _join_parts(state: dict[str, Tensor]) -> dict[str, Tensor]:
    joined = dict(state)
    for name in state:
        for layer, parts, whole in JOINED:
            stem, found, end = name.rpartition(f".{layer}.{parts[0]}.")
            if found:
                pieces = [joined.pop(f"{stem}.{layer}.{part}.{end}") for part in parts]
                joined[f"{stem}.{layer}.{whole}.{end}"] = torch.cat(pieces)
    return joined
