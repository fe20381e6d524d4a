"""Pooling on known tokens, CTransPath's stem, names of other libraries."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from eosin.features.networks import PooledTransformer, adapt_timm_state, build_ctranspath, build_timm, pool_tokens
from eosin.features.weights import load_strictly

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "mlp_ratio": 2, "num_classes": 0}


def test_pooling_on_known_tokens() -> None:
    tokens = torch.tensor([[[1.0, 10.0], [100.0, 100.0], [2.0, 3.0], [4.0, 5.0]]])
    assert pool_tokens(tokens, "cls", 2).tolist() == [[1, 10]]
    assert pool_tokens(tokens, "cls_mean", 2).tolist() == [[1, 10, 3, 4]]
    assert pool_tokens(tokens, "cls_mean", 1)[0, 2].item() == pytest.approx(106 / 3)
    with pytest.raises(ValueError, match="network"):
        pool_tokens(tokens, "network", 1)


def test_registers_are_left_out_of_the_mean() -> None:
    network = build_timm("vit_base_patch14_reg4_dinov2", "cls_mean", TINY | {"mlp_ratio": 2})
    assert isinstance(network, PooledTransformer)
    network.eval()
    pictures = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens = network.trunk.forward_features(pictures)
        expected = torch.cat([tokens[:, 0], tokens[:, 5:].mean(1)], 1)
        assert tokens.shape == (2, 1 + 4 + 16, 32)
        torch.testing.assert_close(network(pictures), expected)


def randomise(state: dict[str, Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(value.shape, generator=generator) * 0.2 if value.is_floating_point() else value
        for name, value in state.items()
    }


def split_qkv(state: dict[str, Tensor], names: tuple[str, str, str]) -> dict[str, Tensor]:
    split = {}
    for name, value in state.items():
        stem, found, end = name.partition("attn.qkv.")
        if found:
            split |= {f"{stem}{part}.{end}": chunk for part, chunk in zip(names, value.chunk(3), strict=True)}
        else:
            split[name] = value
    return split


def renamed(state: dict[str, Tensor], pairs: dict[str, str]) -> dict[str, Tensor]:
    result = {}
    for name, value in state.items():
        for ours, theirs in pairs.items():
            name = name.replace(ours, theirs)
        result[name] = value
    return result


HF_COMMON = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "attn.proj": "attention.output.dense",
    "blocks.": "encoder.layer.",
}
HF_VIT = HF_COMMON | {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
HF_DINO = HF_COMMON | {"ls1.gamma": "layer_scale1.lambda1", "ls2.gamma": "layer_scale2.lambda1"}
HF_SWIGLU = HF_DINO | {"mlp.fc1": "mlp.weights_in", "mlp.fc2": "mlp.weights_out"}
ATTENTION = ("attention.attention.query", "attention.attention.key", "attention.attention.value")


@pytest.mark.parametrize(
    ("architecture", "pairs"),
    [("vit_base_patch16_224", HF_VIT), ("vit_base_patch14_dinov2", HF_DINO), ("vit_giant_patch14_dinov2", HF_SWIGLU)],
)
def test_names_of_transformers(architecture: str, pairs: dict[str, str]) -> None:
    network = build_timm(architecture, "cls", TINY)
    state = randomise(network.trunk.state_dict())
    theirs = split_qkv(state, ATTENTION)
    theirs = renamed(theirs, pairs)
    final = {name: name.replace("norm.", "layernorm.") for name in theirs if name.startswith("norm.")}
    theirs = {final.get(name, name): value for name, value in theirs.items()}
    theirs["embeddings.mask_token"] = torch.zeros(1, 32)
    adapted = adapt_timm_state(network.trunk, theirs)
    load_strictly(network.trunk, adapted, Path("x"))
    for name, value in network.trunk.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_equal_to_transformers_where_it_is_installed() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8, use_swiglu_ffn=True
    )
    theirs = transformers.Dinov2Model(config).eval()
    theirs.load_state_dict(randomise(theirs.state_dict()))
    network = build_timm("vit_giant_patch14_dinov2", "cls", TINY | {"mlp_ratio": 2 * 88 / 32}).eval()
    load_strictly(network.trunk, adapt_timm_state(network.trunk, theirs.state_dict()), Path("x"))
    pictures = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(network(pictures), theirs(pictures).last_hidden_state[:, 0])


def test_clip_names_of_transformers() -> None:
    network = build_timm("vit_base_patch32_clip_quickgelu_224", "network", TINY | {"num_classes": 6})
    state = randomise(network.trunk.state_dict())
    state["head.bias"] = torch.zeros(6)
    theirs = split_qkv(state, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
    pairs = {
        "norm_pre.": "vision_model.pre_layrnorm.",
        "patch_embed.proj": "vision_model.embeddings.patch_embedding",
        "attn.proj": "self_attn.out_proj",
        "norm1": "layer_norm1",
        "norm2": "layer_norm2",
        "blocks.": "vision_model.encoder.layers.",
    }
    theirs = renamed(theirs, pairs)
    theirs["vision_model.embeddings.class_embedding"] = theirs.pop("cls_token").flatten()
    theirs["vision_model.embeddings.position_embedding.weight"] = theirs.pop("pos_embed")[0]
    theirs["visual_projection.weight"] = theirs.pop("head.weight")
    theirs |= {f"vision_model.post_layernorm.{end}": theirs.pop(f"norm.{end}") for end in ("weight", "bias")}
    theirs |= {"text_model.x": torch.zeros(1), "logit_scale": torch.zeros(())}
    del theirs["head.bias"]
    load_strictly(network.trunk, adapt_timm_state(network.trunk, theirs), Path("x"))
    for name, value in network.trunk.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_ctranspath_takes_its_published_names() -> None:
    network = build_ctranspath()
    state = randomise(network.trunk.state_dict())
    published = {
        name.replace(f"layers.{stage + 1}.downsample", f"layers.{stage}.downsample"): value
        for name, value in state.items()
        for stage in [next((i for i in range(3) if f"layers.{i + 1}.downsample" in name), 0)]
    }
    published["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    published["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49)
    assert "patch_embed.proj.6.weight" in published
    load_strictly(network.trunk, adapt_timm_state(network.trunk, published), Path("x"))
    loaded = network.trunk.state_dict()
    assert torch.equal(loaded["layers.3.downsample.reduction.weight"], state["layers.3.downsample.reduction.weight"])
    with torch.no_grad():
        assert network.eval()(torch.zeros(1, 3, 224, 224)).shape == (1, 768)
