"""Architectures of timm, with few and narrow blocks, for small images."""

from __future__ import annotations

from typing import Any

from torch import nn

from .architecture import CLASS, CLASSES, Architecture, classes, images


def _made(name: str, size: int = 32, **options: Any) -> Architecture:
    """Of a model that takes images of any size."""

    def make() -> nn.Module:
        import timm

        model: nn.Module = timm.create_model(name, pretrained=False, num_classes=CLASSES, **options)
        return model

    return Architecture("timm", name, make, images(size), classes(), CLASS, positional=True)


def _sized(name: str, size: int = 32, **options: Any) -> Architecture:
    """Of a model that is built for one size of images."""
    return _made(name, size, img_size=size, **options)


_VIT = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
_SWIN = {"embed_dim": 8, "depths": (2, 1), "num_heads": (2, 2), "window_size": 4}
_MIXER = {"patch_size": 8, "embed_dim": 16, "num_blocks": 2}
_META = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}

ARCHITECTURES = [
    _sized("vit_base_patch16_224", **_VIT),
    _sized("vit_small_patch14_reg4_dinov2", **_VIT),
    _sized("vit_base_patch16_siglip_224", **_VIT),
    _sized("vit_base_patch16_clip_224", **_VIT),
    _sized("vit_relpos_base_patch16_224", **_VIT),
    _sized("vit_base_patch16_rope_224", **_VIT),
    _sized("vit_medium_patch16_gap_256", **_VIT),
    _sized("vit_dpwee_patch16_reg1_gap_256", **_VIT),
    _sized("vit_base_r50_s16_224", embed_dim=16, depth=1, num_heads=2),
    _sized("vit_srelpos_small_patch16_224", **_VIT),
    _sized("flexivit_small", **_VIT),
    _sized("samvit_base_patch16_224", window_size=2, global_attn_indexes=(1,), **_VIT),
    _made("naflexvit_base_patch16_gap", **_VIT),
    _sized("deit_base_distilled_patch16_224", **_VIT),
    _sized("deit3_small_patch16_224", **_VIT),
    _sized("beit_base_patch16_224", **_VIT),
    _sized("beitv2_base_patch16_224", **_VIT),
    _sized("eva02_tiny_patch14_224", **_VIT),
    _sized("eva02_base_patch14_448", **_VIT),
    _sized("vit_small_patch16_dinov3", **_VIT),
    _sized("vit_pe_core_tiny_patch16_384", **_VIT),
    _sized("cait_xxs24_224", **{**_VIT, "depth_token_only": 1}),
    _sized("xcit_nano_12_p8_224", **_VIT),
    _sized("convit_tiny", **{**_VIT, "local_up_to_layer": 1}),
    _sized("crossvit_tiny_240", size=240, embed_dim=(8, 16), depth=((1, 1, 0),), num_heads=(2, 2)),
    _sized("pit_ti_224", size=32, base_dims=(8, 8, 8), depths=(1, 1, 1), heads=(1, 2, 2), patch_size=8, stride=4),
    _sized("tnt_s_patch16_224", inner_dim=8, num_heads_inner=2, **{**_VIT, "patch_size": 16}),
    _sized("volo_d1_224", layers=(1, 1, 1, 1), embed_dims=(8, 16, 16, 16), num_heads=(2, 2, 2, 2)),
    _sized("swin_tiny_patch4_window7_224", **_SWIN),
    _sized("swin_s3_tiny_224", embed_dim=8, depths=(2, 1), num_heads=(2, 2), window_size=(4, 4)),
    _sized("swinv2_tiny_window8_256", **_SWIN),
    _sized("swinv2_cr_tiny_224", **_SWIN),
    _sized("twins_pcpvt_small", embed_dims=(8, 8, 16, 16), depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2)),
    _sized("twins_svt_small", size=64, embed_dims=(8, 8, 16, 16), depths=(2, 2, 2, 2), num_heads=(1, 1, 2, 2)),
    _made("pvt_v2_b0", embed_dims=(8, 8, 16, 16), depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2)),
    _made("pvt_v2_b2_li", embed_dims=(8, 8, 16, 16), depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2)),
    _sized("mvitv2_tiny", embed_dim=8, depths=(1, 1), num_heads=1),
    _sized("hiera_tiny_224", size=64, embed_dim=8, stages=(1, 1, 1, 1), num_heads=1),
    _sized("nest_tiny", embed_dims=(8, 8, 16), num_heads=(1, 1, 2), depths=(1, 1, 1)),
    _made("davit_tiny", embed_dims=(8, 8, 16, 16), depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2)),
    _sized("gcvit_xxtiny", size=64, embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2)),
    _made("focalnet_tiny_srf", embed_dim=8, depths=(1, 1, 1, 1)),
    _made("levit_128s", size=64, embed_dim=(8, 16, 16), key_dim=4, num_heads=(2, 2, 2), depth=(1, 1, 1)),
    _sized("maxvit_tiny_tf_224", size=64, embed_dim=(8, 8), depths=(1, 1), stem_width=8),
    _sized("coatnet_0_224", size=64, embed_dim=(8, 16), depths=(1, 1), stem_width=(8, 8)),
    _sized("maxxvit_rmlp_nano_rw_256", size=64, embed_dim=(32, 32), depths=(1, 1), stem_width=(8, 8)),
    _sized("tiny_vit_5m_224", embed_dims=(8, 8, 16, 16), depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), window_sizes=(2, 2, 2, 2)),
    _sized("coat_tiny", embed_dims=(16, 16, 16, 16), depths=None),
    _made("edgenext_xx_small", dims=(8, 8, 16, 16), depths=(1, 1, 2, 2), heads=(2, 2, 2, 2)),
    _sized("efficientformer_l1", embed_dims=(8, 8, 16, 16), depths=(1, 1, 1, 2)),
    _made("efficientformerv2_s0", size=224),
    _made("fastvit_sa12", size=64, embed_dims=(8, 8, 16, 32), layers=(1, 1, 1, 1)),
    _made("poolformer_s12", **_META),
    _made("caformer_s18", **{**_META, "dims": (8, 8, 32, 32)}),
    _made("convformer_s18", **_META),
    _made("mobilevit_xxs", size=64),
    _made("sequencer2d_s", embed_dims=(8, 16, 16, 16), layers=(1, 1, 1, 1), hidden_sizes=(4, 4, 4, 4)),
    _sized("mixer_s16_224", **_MIXER),
    _sized("gmixer_12_224", **_MIXER),
    _sized("resmlp_12_224", **_MIXER),
    _sized("gmlp_ti16_224", **_MIXER),
    _made("convnext_tiny", dims=(8, 8, 16, 16), depths=(1, 1, 1, 1)),
    _made("convnextv2_atto", dims=(8, 8, 16, 16), depths=(1, 1, 1, 1)),
    _made("convnext_tiny_hnf", dims=(8, 8, 16, 16), depths=(1, 1, 1, 1)),
    _made("inception_next_tiny", dims=(16, 16, 16, 16), depths=(1, 1, 1, 1)),
    _made("mambaout_femto", dims=(8, 8, 16, 16), depths=(1, 1, 1, 1)),
    _made("starnet_s1"),
    _made("swiftformer_xs", embed_dims=(8, 8, 16, 16), layers=(1, 1, 1, 1)),
    _made("csatv2", size=64, dims=(8, 8, 16, 16), depths=(1, 1, 1, 1)),
    _made("resnet50_clip", size=64),
    _made("resnetv2_50"),
    _made("vitamin_small_224"),
    _made("hieradet_small", size=64),
    _made("nextvit_small"),
    _made("visformer_tiny", size=224),
    _made("mobilenetv3_small_050"),
    _made("vgg11", size=32),
    _made("cspresnet50"),
    _made("test_vit2", size=160),
    _made("deepseek_vit"),
    _made("ghostnetv3_050"),
]
