"""An encoder: a network of timm whose weights are your own, given with ``--weights``."""

from dataclasses import replace

from eosin.features import ENCODERS, find_encoder

ENCODERS["template_vit"] = replace(
    find_encoder("timm:vit_tiny_patch16_224"), name="template_vit", mpp=0.5, tile_px=256, note="the template's"
)
