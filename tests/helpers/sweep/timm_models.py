# SPDX-License-Identifier: Apache-2.0
"""Architectures of timm, with few and narrow blocks, for small images."""

from __future__ import annotations

import importlib
from collections.abc import Callable
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


def _class(
    path: str,
    size: int = 32,
    title: str = "",
    parts: Callable[[Any], dict[str, Any]] = lambda module: {},
    mixes: str = "",
    **options: Any,
) -> Architecture:
    """Of a class, where the functions of its models fix what has to be small. parts: options that are classes
    of its module."""
    place, _, name = path.partition(".")

    def make() -> nn.Module:
        module = importlib.import_module(f"timm.models.{place}")
        model: nn.Module = getattr(module, name)(num_classes=CLASSES, **options, **parts(module))
        return model

    return Architecture(
        "timm", title or name, make, images(size), classes(), CLASS, positional=True, mixes=mixes
    )


_VIT = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
_SWIN = {"embed_dim": 8, "depths": (2, 1), "num_heads": (2, 2), "window_size": 4}
_DIMS = {"dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1)}
_STAGES = {"embed_dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1)}
_HEADS = {**_STAGES, "num_heads": (1, 1, 2, 2)}
_MIXER = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "num_blocks": 2}
_COAT = {
    "size": 64,
    "img_size": 64,
    "embed_dims": (16, 16, 16, 16),
    "serial_depths": (1, 1, 1, 1),
    "num_heads": 8,
    "patch_size": 4,
}

ARCHITECTURES = [
    _sized("vit_base_patch16_224", **_VIT),
    _sized("vit_small_patch14_reg4_dinov2", **_VIT),
    _sized("vit_base_patch16_siglip_224", **_VIT),
    _sized("vit_base_patch16_clip_224", **_VIT),
    _sized("vit_base_patch16_rope_224", **_VIT),
    _sized("vit_base_patch16_rope_mixed_224", **_VIT),
    _sized("vit_medium_patch16_gap_256", **_VIT),
    _sized("vit_dpwee_patch16_reg1_gap_256", **_VIT),
    _sized("vit_relpos_base_patch16_224", **_VIT),
    _sized("vit_srelpos_small_patch16_224", **_VIT),
    _sized("vit_small_patch16_dinov3", **_VIT),
    _sized("vit_pe_core_tiny_patch16_384", **_VIT),
    _sized("flexivit_small", **_VIT),
    _sized("samvit_base_patch16_224", window_size=2, global_attn_indexes=(1,), **_VIT),
    _made("naflexvit_base_patch16_gap", **_VIT),
    _made("test_vit", size=160),
    _made("test_vit4", size=160),
    _sized("deit_base_distilled_patch16_224", **_VIT),
    _sized("deit3_small_patch16_224", **_VIT),
    _sized("beit_base_patch16_224", **_VIT),
    _sized("beitv2_base_patch16_224", **_VIT),
    _sized("beit3_base_patch16_224", **_VIT),
    _sized("eva02_tiny_patch14_224", **_VIT),
    _sized("eva02_base_patch14_448", **_VIT),
    _sized("cait_xxs24_224", **_VIT, depth_token_only=1),
    _sized("xcit_nano_12_p8_224", **_VIT),
    _sized("convit_tiny", **_VIT, local_up_to_layer=1),
    _sized("crossvit_tiny_240", size=240, embed_dim=(8, 16), depth=((1, 1, 0),), num_heads=(2, 2)),
    _class(
        "pit.PoolingVisionTransformer",
        title="PiT",
        img_size=32,
        base_dims=(8, 8, 8),
        depth=(1, 1, 1),
        heads=(1, 2, 2),
        patch_size=8,
        stride=4,
    ),
    _class("tnt.TNT", img_size=32, inner_dim=8, embed_dim=16, depth=2, num_heads_inner=2, num_heads_outer=2),
    _class(
        "volo.VOLO",
        img_size=32,
        layers=[1, 1],
        embed_dims=[16, 16],
        num_heads=[2, 2],
        downsamples=(True, False),
        outlook_attention=(True, False),
        stem_hidden_dim=8,
        use_aux_head=False,
    ),
    _sized("swin_tiny_patch4_window7_224", **_SWIN),
    _sized("swin_s3_tiny_224", **{**_SWIN, "window_size": (4, 4)}),
    _sized("swinv2_tiny_window8_256", **_SWIN),
    _sized("swinv2_cr_tiny_224", **_SWIN),
    _sized("twins_pcpvt_small", **_HEADS),
    _sized("twins_svt_small", size=64, **{**_HEADS, "depths": (2, 2, 2, 2)}),
    _made("pvt_v2_b0", **_HEADS),
    _made("pvt_v2_b2_li", **_HEADS),
    _class(
        "mvitv2.MultiScaleVit",
        title="MViTv2",
        img_size=(32, 32),
        parts=lambda m: {"cfg": m.MultiScaleVitCfg(embed_dim=8, depths=(1, 1), stride_q=((1, 1), (2, 2)))},
    ),
    _class(
        "mvitv2.MultiScaleVit",
        title="MViTv2, class token",
        img_size=(32, 32),
        parts=lambda m: {
            "cfg": m.MultiScaleVitCfg(
                embed_dim=8, depths=(1, 1), stride_q=((1, 1), (2, 2)), use_cls_token=True, expand_attn=False
            )
        },
    ),
    _sized("hiera_tiny_224", size=64, embed_dim=8, stages=(1, 1, 1, 1), num_heads=1),
    _class(
        "hieradet_sam2.HieraDet",
        size=64,
        embed_dim=8,
        stages=(1, 1, 1, 1),
        window_spec=(8, 4, 2, 2),
        global_att_blocks=(),
        global_pos_size=(2, 2),
    ),
    _class(
        "nest.Nest", img_size=32, patch_size=2, embed_dims=(8, 8, 16), num_heads=(1, 1, 2), depths=(1, 1, 1)
    ),
    _made("davit_tiny", **_HEADS),
    _class(
        "gcvit.GlobalContextVit",
        size=64,
        img_size=64,
        embed_dim=8,
        depths=(1, 1, 1, 1),
        num_heads=(1, 1, 2, 2),
    ),
    _class("focalnet.FocalNet", embed_dim=8, depths=(1, 1, 1, 1)),
    _class(
        "levit.Levit",
        size=64,
        img_size=64,
        embed_dim=(8, 16, 16),
        key_dim=4,
        num_heads=(2, 2, 2),
        depth=(1, 1, 1),
    ),
    _class(
        "maxxvit.MaxxVit",
        title="MaxViT",
        img_size=32,
        parts=lambda m: {
            "cfg": m.MaxxVitCfg(
                (8, 8),
                (1, 1),
                ("M", "M"),
                8,
                transformer_cfg=m.MaxxVitTransformerCfg(dim_head=4, window_size=(4, 4), grid_size=(4, 4)),
            )
        },
    ),
    _sized("coatnet_0_224", size=64, embed_dim=(8, 16), depths=(1, 1), stem_width=(8, 8)),
    _sized("maxxvit_rmlp_nano_rw_256", size=64, embed_dim=(32, 32), depths=(1, 1), stem_width=(8, 8)),
    _class("tiny_vit.TinyVit", size=64, **{**_HEADS, "window_sizes": (2, 2, 2, 2)}),
    _class("coat.CoaT", **_COAT),
    _class("coat.CoaT", title="CoaT, parallel", parallel_depth=1, **_COAT),
    _made("edgenext_xx_small", dims=(8, 8, 16, 16), depths=(1, 1, 2, 2), heads=(2, 2, 2, 2)),
    _class("efficientformer.EfficientFormer", size=224, img_size=224, num_vit=1, **_STAGES),
    _made("fastvit_sa12", size=64, embed_dims=(8, 8, 16, 32), layers=(1, 1, 1, 1)),
    _class("metaformer.MetaFormer", title="PoolFormer", **_DIMS),
    _class(
        "metaformer.MetaFormer",
        title="CAFormer",
        **{**_DIMS, "dims": (8, 8, 32, 32)},
        parts=lambda m: {
            "token_mixers": [m.SepConv, m.SepConv, m.Attention, m.Attention],
            "norm_layers": [m.LayerNorm2dNoBias] * 2 + [m.LayerNormNoBias] * 2,
        },
    ),
    _class("efficientvim.EfficientViM", size=64, embed_dim=(8, 8, 8), depths=(1, 1, 1), state_dim=(4, 4, 4)),
    _class(
        "gemma4_vit.Gemma4VitClassifier",
        size=64,
        img_size=64,
        patch_size=8,
        embed_dim=16,
        depth=2,
        num_heads=2,
        head_dim=8,
        intermediate_size=32,
    ),
    _class("qwen3_vit.Qwen3VitClassifier", img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2),
    _class(
        "deepseek_vit.DeepseekVitClassifier",
        size=48,
        img_size=48,
        patch_size=8,
        embed_dim=16,
        depth=2,
        num_heads=2,
    ),
    _made("mobilevit_xxs", size=64),
    _made("sequencer2d_s", embed_dims=(8, 16, 16, 16), layers=(1, 1, 1, 1), hidden_sizes=(4, 4, 4, 4)),
    _class("mlp_mixer.MlpMixer", **_MIXER),
    _class(
        "mlp_mixer.MlpMixer",
        title="GMixer",
        **_MIXER,
        mlp_ratio=(1.0, 4.0),
        parts=lambda m: {"mlp_layer": m.GluMlp},
    ),
    _class(
        "mlp_mixer.MlpMixer",
        title="ResMLP",
        **_MIXER,
        mlp_ratio=4,
        parts=lambda m: {"block_layer": m.ResBlock},
    ),
    _class(
        "mlp_mixer.MlpMixer",
        title="gMLP",
        **_MIXER,
        mlp_ratio=4,
        parts=lambda m: {"block_layer": m.SpatialGatingBlock, "mlp_layer": m.GatedMlp},
    ),
    _made("convnext_tiny", **_DIMS),
    _class("convnext.ConvNeXt", title="ConvNeXt V2", use_grn=True, head_hidden_size=16, **_DIMS),
    _class(
        "rdnet.RDNet",
        growth_rates=(8, 8),
        num_blocks_list=(2, 2),
        block_type=("Block", "BlockESE"),
        is_downsample_block=(None, True),
        num_init_features=8,
    ),
    _made("inception_next_tiny", dims=(16, 16, 16, 16), depths=(1, 1, 1, 1)),
    _made("mambaout_femto", **_DIMS),
    _made("swiftformer_xs", embed_dims=(8, 8, 16, 16), layers=(1, 1, 1, 1)),
    _class(
        "csatv2.CSATv2",
        size=64,
        mixes="its spatial attention multiplies q `[N, T]` with k.T, so that samples attend to each other",
        **_DIMS,
        transformer_depths=(0, 0, 1, 1),
    ),
    _made("test_resnet"),
    _made("test_efficientnet"),
    _made("test_nfnet"),
]
