"""Weights under the names of other libraries, renamed to timm's.

With these, encoders published for `transformers` need that library neither to be installed nor trusted.
"""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

State = Mapping[str, Tensor]

VIT_RULES = (
    (r"^embeddings\.cls_token", "cls_token"),
    (r"^embeddings\.register_tokens", "reg_token"),
    (r"^embeddings\.position_embeddings", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^encoder\.layer\.", "blocks."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.layer_scale([12])\.lambda1", r".ls\1.gamma"),
    (r"\.attention\.attention\.", ".attn."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.mlp\.weights_in\.", ".mlp.fc1."),
    (r"\.mlp\.weights_out\.", ".mlp.fc2."),
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

QUERY_KEY_VALUE = (("query", "key", "value"), ("q", "k", "v"))


def is_transformers_vit(state: State) -> bool:
    """Tell whether weights have the names of the ViT or DINOv2 of `transformers`."""
    return "embeddings.cls_token" in state


def is_transformers_clip(state: State) -> bool:
    """Tell whether weights have the names of the CLIP of `transformers`."""
    return "vision_model.embeddings.class_embedding" in state


def convert_vit(state: State) -> dict[str, Tensor]:
    """Rename the weights of a ``ViTModel`` or ``Dinov2Model``.

    Parameters
    ----------
    state : mapping of str to Tensor
        Under the names of `transformers`.

    Returns
    -------
    dict of str to Tensor
        Under timm's names; queries, keys and values joined into one projection.
    """
    return _join_projections(_rename(state, VIT_RULES, VIT_UNUSED))


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
    renamed = _join_projections(_rename(state, CLIP_RULES, CLIP_UNUSED))
    renamed["cls_token"] = renamed["cls_token"].reshape(1, 1, -1)
    renamed["pos_embed"] = renamed["pos_embed"].unsqueeze(0)
    renamed["head.bias"] = torch.zeros(len(renamed["head.weight"]))
    return renamed


def _rename(state: State, rules: Sequence[tuple[str, str]], unused: tuple[str, ...]) -> dict[str, Tensor]:
    renamed = {}
    for name, value in state.items():
        if name.startswith(unused):
            continue
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    return renamed


def _join_projections(state: dict[str, Tensor]) -> dict[str, Tensor]:
    joined = dict(state)
    for name in state:
        for query, key, value in QUERY_KEY_VALUE:
            stem, found, end = name.rpartition(f".attn.{query}.")
            if found:
                parts = [joined.pop(f"{stem}.attn.{part}.{end}") for part in (query, key, value)]
                joined[f"{stem}.attn.qkv.{end}"] = torch.cat(parts)
    return joined
