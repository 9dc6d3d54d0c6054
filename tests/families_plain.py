"""Families whose widths ComfyUI reads off the weights or off the file's metadata."""

from __future__ import annotations

from typing import Any

import torch

from family import Family, attention_mask, config
from generation import noise

FLUX = config(
    in_channels=16, out_channels=16, patch_size=2, vec_in_dim=64, context_in_dim=64, hidden_size=128, mlp_ratio=4.0,
    num_heads=1, depth=2, depth_single_blocks=3, axes_dim=[16, 56, 56], theta=10000, qkv_bias=True, txt_ids_dims=[],
    yak_mlp=False, txt_norm=False,
)  # fmt: skip
WAN = config(
    image_model="wan2.1", dim=96, num_heads=2, ffn_dim=192, freq_dim=64, text_dim=64, num_layers=4,
    patch_size=(1, 2, 2), window_size=(-1, -1), qk_norm=True, cross_attn_norm=True, eps=1e-6,
)  # fmt: skip
WAN_STATED = ("text_dim", "freq_dim", "num_heads")
HUNYUAN_VIDEO = config(
    image_model="hunyuan_video", patch_size=[1, 2, 2], axes_dim=[16, 56, 56], hidden_size=128, mlp_ratio=4.0,
    num_heads=1, depth=2, depth_single_blocks=3, theta=256, qkv_bias=True, context_in_dim=64, meanflow=False,
    byt5=False, use_cond_type_embedding=False, vision_in_dim=None, meanflow_sum=False,
)  # fmt: skip
LTXAV = config(
    image_model="ltxav", num_layers=4, num_attention_heads=2, attention_head_dim=32, cross_attention_dim=64,
    audio_num_attention_heads=2, audio_attention_head_dim=16, audio_cross_attention_dim=32, caption_channels=64,
    connector_num_attention_heads=2, connector_attention_head_dim=32,
)  # fmt: skip
LTXAV_STATED = tuple(key for key in LTXAV if key not in ("image_model", "num_layers"))
MINIMAX = config(
    image_model="minimax_h3", num_layers=4, token_refiner_num_layers=1, hidden_size=128, latents_dim=24,
    audio_latents_dim=32, attention_head_dim=128, num_attention_heads=1, ffn_hidden_size=128, text_dim=64,
    timestep_input_dim=64, time_embed_hidden_size=64, time_embed_dim=64, rope_inv_freq_len=16,
)  # fmt: skip


def _vace(branches: int) -> Any:
    """What WanVaceToVideo puts into a prompt, once for each branch."""
    return lambda _prompt: {
        "vace_frames": [noise((1, 32, 2, 8, 8), 200 + branch) for branch in range(branches)],
        "vace_mask": [torch.ones(1, 64, 2, 8, 8)] * branches,
        "vace_strength": [1.0, 0.5][:branches],
    }


PLAIN = [
    Family(
        "sd3", "SD3",
        config(
            in_channels=16, out_channels=16, patch_size=2, depth=4, input_size=None, adm_in_channels=64,
            context_embedder_config={
                "target": "torch.nn.Linear", "params": {"in_features": 64, "out_features": 256},
            },
            num_patches=256, pos_embed_max_size=16, qk_norm="rms", pos_embed_scaling_factor=None,
            x_block_self_attn_layers=[],
        ),
        latent=(16, 8, 8), context=64, pooled=64, lists=("joint_blocks",), dtype=torch.float16,
        published=config(
            depth=24, adm_in_channels=2048, context_embedder_config={"target": "torch.nn.Linear", "params":
            {"in_features": 4096, "out_features": 1536}}, num_patches=36864, pos_embed_max_size=192, qk_norm=None,
        ),
    ),
    Family(
        "flux", "Flux", config(FLUX, image_model="flux", guidance_embed=True),
        latent=(16, 8, 8), context=64, pooled=64, lists=("double_blocks", "single_blocks"), dtype=torch.bfloat16,
        published=config(
            hidden_size=3072, num_heads=24, depth=19, depth_single_blocks=38, vec_in_dim=768, context_in_dim=4096,
        ),
    ),
    Family(
        "flux_schnell", "FluxSchnell", config(FLUX, image_model="flux", guidance_embed=False, depth=1),
        latent=(16, 8, 8), context=64, pooled=64, lists=("double_blocks", "single_blocks"),
        dtype=torch.float16, cfg=1.0,
    ),
    Family(
        "flux2", "Flux2",
        config(
            FLUX, image_model="flux2", guidance_embed=True, axes_dim=[32] * 4, mlp_ratio=3.0, theta=2000,
            in_channels=128, out_channels=128, patch_size=1, vec_in_dim=None, global_modulation=True, mlp_silu_act=True,
            qkv_bias=False, ops_bias=False, default_ref_method="index", ref_index_scale=10.0, txt_ids_dims=[3], depth=1,
        ),
        latent=(128, 4, 4), context=64, lists=("double_blocks", "single_blocks"), dtype=torch.float16,
    ),
    Family(
        "wan21", "WAN21_T2V", config(WAN, model_type="t2v", in_dim=16, out_dim=16),
        latent=(16, 2, 8, 8), context=64, lists=("blocks",), stated=WAN_STATED,
        published=config(dim=5120, num_heads=40, ffn_dim=13824, freq_dim=256, text_dim=4096, num_layers=40),
    ),
    Family(
        "wan22", "WAN22_T2V",
        config(WAN, model_type="t2v", in_dim=48, out_dim=48, dim=128, num_heads=1, freq_dim=256, text_dim=4096),
        latent=(48, 2, 8, 8), context=4096, lists=("blocks",), dtype=torch.float16,
    ),
    Family(
        "wan_vace", "WAN21_Vace",
        config(WAN, model_type="vace", in_dim=16, out_dim=16, vace_in_dim=96, vace_layers=2),
        latent=(16, 2, 8, 8), context=64, lists=("blocks", "vace_blocks"), dtype=torch.float16,
        entries=_vace(1), stated=WAN_STATED,
    ),
    Family(  # two side branches: each side block runs twice in a forward
        "wan_vace_two", "WAN21_Vace",
        config(WAN, model_type="vace", in_dim=16, out_dim=16, vace_in_dim=96, vace_layers=2),
        latent=(16, 2, 8, 8), context=64, lists=("blocks", "vace_blocks"), dtype=torch.float16,
        entries=_vace(2), stated=WAN_STATED,
    ),
    Family(
        "wan_s2v", "WAN22_S2V",
        config(
            WAN, model_type="s2v", in_dim=16, out_dim=16, audio_dim=64, num_audio_token=4, audio_inject_layers=[0, 2],
        ),
        latent=(16, 2, 8, 8), context=64, lists=("blocks",), dtype=torch.float16,
        entries=lambda prompt: {"audio_embed": noise((1, 25, 64, 8), prompt + 1)},
        stated=(*WAN_STATED, "audio_dim", "num_audio_token", "audio_inject_layers"),
    ),
    Family(
        "hunyuan_video", "HunyuanVideo",
        config(HUNYUAN_VIDEO, in_channels=16, out_channels=16, vec_in_dim=768, guidance_embed=True, depth=1),
        latent=(16, 2, 8, 8), context=64, pooled=768, lists=("double_blocks", "single_blocks"), dtype=torch.float16,
        published=config(hidden_size=3072, num_heads=24, depth=20, depth_single_blocks=40, context_in_dim=4096),
    ),
    Family(
        "hunyuan_video15", "HunyuanVideo15",
        config(
            HUNYUAN_VIDEO, in_channels=65, out_channels=32, patch_size=[1, 1, 1], vec_in_dim=None, guidance_embed=False,
            use_cond_type_embedding=True, vision_in_dim=1152, meanflow_sum=True, depth=2, depth_single_blocks=2,
        ),
        latent=(32, 2, 4, 4), context=64, pooled=64, lists=("double_blocks", "single_blocks"), dtype=torch.float16,
    ),
    Family(
        "ltxv", "LTXV",
        config(
            image_model="ltxv", num_layers=4, num_attention_heads=2, attention_head_dim=32, cross_attention_dim=64,
            caption_channels=64,
        ),
        latent=(128, 2, 4, 4), context=64, lists=("transformer_blocks",), entries=attention_mask,
        stated=("num_attention_heads", "attention_head_dim", "cross_attention_dim", "caption_channels"),
    ),
    Family(
        "ltxav", "LTXAV", LTXAV, latent=((128, 2, 4, 4), (8, 6, 16)), context=128, lists=("transformer_blocks",),
        dtype=torch.bfloat16, entries=attention_mask, stated=LTXAV_STATED,
    ),
    Family(  # the prompt passes through the denoiser's own text layers before sampling
        "ltxav_text", "LTXAV", LTXAV, latent=((128, 2, 4, 4), (8, 6, 16)), context=64, lists=("transformer_blocks",),
        dtype=torch.bfloat16, entries=lambda _prompt: {"unprocessed_ltxav_embeds": True}, stated=LTXAV_STATED,
    ),
    Family(
        "cogvideox", "CogVideoX_T2V",
        config(
            image_model="cogvideox", num_attention_heads=1, attention_head_dim=64, time_embed_dim=64, num_layers=4,
            in_channels=16, patch_size=2, text_embed_dim=64, use_learned_positional_embeddings=False,
            use_rotary_positional_embeddings=True,
        ),
        latent=(16, 2, 8, 8), context=64, lists=("blocks",),
        denoise=0.5,  # at the first step its input is thousands of times larger than what blocks add to it
    ),
    Family(
        "kandinsky5", "Kandinsky5",
        config(
            image_model="kandinsky5", model_dim=128, time_dim=64, ff_dim=256, visual_embed_dim=132, num_text_blocks=1,
            num_visual_blocks=4,
        ),
        latent=(16, 2, 8, 8), context=3584, pooled=768, dtype=torch.float16,
        lists=("text_transformer_blocks", "visual_transformer_blocks"),
    ),
    Family(
        "lens", "Lens",
        config(
            image_model="lens", in_channels=128, out_channels=32, num_layers=4, num_attention_heads=1,
            enc_hidden_dim=64, multi_layer_encoder_feature=True, selected_layer_index=(0, 1),
        ),
        latent=(128, 8, 8), context=128, lists=("transformer_blocks",), dtype=torch.float16,
    ),
    Family(
        "krea2", "Krea2",
        config(
            image_model="krea2", features=128, channels=16, patch=2, layers=4, heads=1, kvheads=1, txtlayers=2,
            txtdim=80,
        ),
        latent=(16, 1, 8, 8), context=160, lists=("blocks",), dtype=torch.float16,
    ),
    Family(
        "stable_audio", "StableAudio",
        config(
            audio_model="dit1.0", global_cond_dim=1536, project_cond_tokens=True, embed_dim=64, num_heads=1,
            attn_kwargs={"qk_norm": "rms", "differential": False}, norm_type="rms_norm",
            timestep_features_type="learned", io_channels=64, input_concat_dim=0, depth=4,
        ),
        latent=(64, 32), context=768, lists=("transformer.layers",), dtype=torch.float16, checkpoint=True,
    ),
    Family(
        "joyimage", "JoyImage",
        config(
            image_model="joyimage", in_channels=16, hidden_size=128, patch_size=[1, 2, 2], num_layers=4,
            num_attention_heads=1, text_dim=4096,
        ),
        latent=(16, 1, 8, 8), context=4096, lists=("double_blocks",), dtype=torch.bfloat16,
    ),
    Family(
        "hunyuan_image", "HunyuanImage21",
        config(
            HUNYUAN_VIDEO, patch_size=[1, 1], in_channels=64, out_channels=64, vec_in_dim=None, guidance_embed=False,
            axes_dim=[64, 64], depth=1, depth_single_blocks=3,
        ),
        latent=(64, 4, 4), context=64, lists=("double_blocks", "single_blocks"), dtype=torch.bfloat16,
    ),
    Family(
        "longcat_image", "LongCatImage",
        config(
            FLUX, image_model="flux", guidance_embed=False, vec_in_dim=None, context_in_dim=3584, txt_ids_dims=[1, 2],
            depth=1,
        ),
        latent=(16, 8, 8), context=3584, lists=("double_blocks", "single_blocks"), dtype=torch.bfloat16,
    ),
    Family(
        "minimax_h3", "MiniMaxH3",
        MINIMAX,
        latent=((24, 2, 4, 4), (32, 2, 3)), context=128, lists=("blocks",), dtype=torch.bfloat16,
    ),
    Family(  # the prompt passes through the denoiser's own text layers before sampling
        "minimax_h3_text", "MiniMaxH3",
        MINIMAX,
        latent=((24, 2, 4, 4), (32, 2, 3)), context=64, lists=("blocks",), dtype=torch.bfloat16,
    ),
]  # fmt: skip
