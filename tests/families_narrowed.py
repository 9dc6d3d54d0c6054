"""Families whose widths are in ComfyUI's code: narrowed ones, and large ones that it detects without being told."""

from __future__ import annotations

from typing import Any

import torch

from family import Family, attention_mask, config
from generation import noise

COSMOS = config(
    max_img_h=240, max_img_w=240, max_frames=128, in_channels=16, out_channels=16, patch_spatial=2, patch_temporal=1,
    concat_padding_mask=True, pos_emb_cls="rope3d", pos_emb_interpolation="crop", use_adaln_lora=True,
)  # fmt: skip


def _hunyuan_dit(t5_width: int) -> Any:
    return lambda prompt: {
        "attention_mask": torch.ones(1, 77),
        "conditioning_mt5xl": noise((1, 256, t5_width), prompt + 1),
        "attention_mask_mt5xl": torch.ones(1, 256),
    }


NARROWED = [
    Family(
        "hunyuan_dit", "HunyuanDiT",
        config(
            image_model="hydit", depth=8, hidden_size=64, num_heads=2, text_states_dim=64, text_states_dim_t5=64,
            attn_precision=torch.float32,
        ),
        latent=(4, 8, 8), context=64, tokens=77, lists=("blocks",), dtype=torch.float16, entries=_hunyuan_dit(64),
        narrowed=("num_heads", "text_states_dim", "text_states_dim_t5"),
        published=config(depth=40, hidden_size=1408, num_heads=16, text_states_dim=1024, text_states_dim_t5=2048),
    ),
    Family(
        "chroma", "Chroma",
        config(
            image_model="chroma", in_channels=64, out_channels=64, patch_size=2, context_in_dim=64, hidden_size=64,
            mlp_ratio=4.0, num_heads=1, depth=2, depth_single_blocks=3, axes_dim=[16, 24, 24], theta=10000,
            qkv_bias=True, txt_ids_dims=[], vec_in_dim=None, in_dim=64, out_dim=64, hidden_dim=64, n_layers=2,
        ),
        latent=(16, 8, 8), context=64, lists=("double_blocks", "single_blocks"),
        narrowed=("num_heads", "axes_dim", "out_dim", "hidden_dim", "n_layers"),
        published=config(
            hidden_size=3072, num_heads=24, axes_dim=[16, 56, 56], depth=19, depth_single_blocks=38,
            context_in_dim=4096, out_dim=3072, hidden_dim=5120, n_layers=5,
        ),
    ),
    Family(
        "qwen_image", "QwenImage",
        config(
            image_model="qwen_image", in_channels=64, num_layers=4, num_attention_heads=1, attention_head_dim=64,
            axes_dims_rope=(16, 24, 24), joint_attention_dim=64,
        ),
        latent=(16, 1, 8, 8), context=64, lists=("transformer_blocks",),
        narrowed=("num_attention_heads", "attention_head_dim", "axes_dims_rope", "joint_attention_dim"),
        published=config(
            num_layers=60, num_attention_heads=24, attention_head_dim=128, axes_dims_rope=(16, 56, 56),
            joint_attention_dim=3584,
        ),
    ),
    Family(
        "lumina2", "Lumina2",
        config(
            image_model="lumina2", patch_size=2, in_channels=16, dim=96, cap_feat_dim=64, n_layers=4, qk_norm=True,
            n_heads=2, n_kv_heads=1, axes_dims=[16, 16, 16], axes_lens=[300, 512, 512], rope_theta=10000.0,
            ffn_dim_multiplier=1.0, n_refiner_layers=1, multiple_of=32,
        ),
        latent=(16, 8, 8), context=64, lists=("context_refiner", "noise_refiner", "layers"),
        entries=attention_mask,
        narrowed=(
            "n_heads", "n_kv_heads", "axes_dims", "axes_lens", "rope_theta", "ffn_dim_multiplier", "n_refiner_layers",
            "multiple_of",
        ),
        published=config(
            dim=2304, cap_feat_dim=2304, n_layers=26, n_heads=24, n_kv_heads=8, axes_dims=[32, 32, 32],
            ffn_dim_multiplier=4.0, n_refiner_layers=2, multiple_of=256,
        ),
    ),
    Family(
        "z_image", "ZImage",
        config(
            image_model="lumina2", patch_size=2, in_channels=16, dim=256, cap_feat_dim=64, n_layers=3, qk_norm=True,
            n_heads=4, n_kv_heads=4, axes_dims=[16, 24, 24], axes_lens=[1536, 512, 512], rope_theta=256.0,
            ffn_dim_multiplier=0.25, n_refiner_layers=1, multiple_of=32, z_image_modulation=True, time_scale=1000.0,
            pad_tokens_multiple=32,
        ),
        latent=(16, 8, 8), context=64, lists=("context_refiner", "noise_refiner", "layers"),
        entries=attention_mask,
        narrowed=(
            "dim", "n_heads", "n_kv_heads", "axes_dims", "axes_lens", "rope_theta", "ffn_dim_multiplier",
            "n_refiner_layers", "multiple_of", "z_image_modulation", "time_scale", "pad_tokens_multiple",
        ),
        detected=config(dim=3840), dtype=torch.float16,
        published=config(
            dim=3840, cap_feat_dim=2560, n_layers=30, n_heads=30, n_kv_heads=30, axes_dims=[32, 48, 48],
            ffn_dim_multiplier=8 / 3, n_refiner_layers=2, multiple_of=256,
        ),
    ),
    Family(
        "pixart", "PixArtSigma",
        config(
            image_model="pixart_sigma", num_heads=2, patch_size=2, hidden_size=64, in_channels=4, depth=4,
            model_max_length=16, micro_condition=False, caption_channels=64,
        ),
        latent=(4, 34, 34), context=64, lists=("blocks",),
        narrowed=("num_heads", "hidden_size", "caption_channels"),
        published=config(hidden_size=1152, depth=28, num_heads=16, caption_channels=4096, model_max_length=300),
    ),
    Family(
        "hidream", "HiDream",
        config(
            image_model="hidream", attention_head_dim=64, axes_dims_rope=[16, 24, 24], caption_channels=[64, 64],
            max_resolution=[128, 128], in_channels=16, llama_layers=[0, 1, 1, 1, 1], num_attention_heads=1,
            num_routed_experts=4, num_activated_experts=2, num_layers=2, num_single_layers=3, out_channels=16,
            patch_size=2, text_emb_dim=64,
        ),
        latent=(16, 8, 8), context=64, pooled=64, lists=("double_stream_blocks", "single_stream_blocks"),
        dtype=torch.bfloat16, entries=lambda prompt: {"conditioning_llama3": noise((1, 2, 16, 64), prompt + 1)},
        narrowed=(
            "caption_channels", "llama_layers", "attention_head_dim", "axes_dims_rope", "num_attention_heads",
            "num_layers", "num_single_layers", "text_emb_dim",
        ),
        published=config(
            num_layers=16, num_single_layers=32, num_attention_heads=20, attention_head_dim=128,
            axes_dims_rope=[64, 32, 32], caption_channels=[4096, 4096], llama_layers=[*range(32), *[31] * 16],
            text_emb_dim=2048,
        ),
    ),
    Family(
        "cosmos1", "CosmosT2V",
        config(
            COSMOS, image_model="cosmos", model_channels=64, block_config="FA-CA-MLP", pos_emb_learnable=False,
            block_x_format="THWBD", affline_emb_norm=True, adaln_lora_dim=32, num_blocks=4, num_heads=2,
            extra_per_block_abs_pos_emb=True, extra_per_block_abs_pos_emb_type="learnable", crossattn_emb_channels=64,
        ),
        latent=(16, 2, 8, 8), context=64, lists=("blocks",),
        narrowed=("adaln_lora_dim", "num_blocks", "num_heads", "crossattn_emb_channels"),
        published=config(
            model_channels=4096, num_blocks=28, num_heads=32, adaln_lora_dim=256, crossattn_emb_channels=1024,
        ),
    ),
    Family(
        "cosmos_predict2", "CosmosT2IPredict2",
        config(
            COSMOS, image_model="cosmos_predict2", model_channels=64, crossattn_emb_channels=64, pos_emb_learnable=True,
            min_fps=1, max_fps=30, adaln_lora_dim=32, num_blocks=4, num_heads=2, extra_per_block_abs_pos_emb=False,
            rope_h_extrapolation_ratio=4.0, rope_w_extrapolation_ratio=4.0, rope_t_extrapolation_ratio=1.0,
            rope_enable_fps_modulation=False,
        ),
        latent=(16, 1, 8, 8), context=64, lists=("blocks",),
        narrowed=("adaln_lora_dim", "num_blocks", "num_heads", "crossattn_emb_channels"),
        published=config(
            model_channels=2048, num_blocks=28, num_heads=16, adaln_lora_dim=256, crossattn_emb_channels=1024,
        ),
    ),
    Family(
        "mochi", "GenmoMochi",
        config(
            image_model="mochi_preview", depth=4, patch_size=2, num_heads=2, hidden_size_x=32, hidden_size_y=32,
            mlp_ratio_x=384.0, mlp_ratio_y=4.0, learn_sigma=False, in_channels=12, qk_norm=True, qkv_bias=False,
            out_bias=True, attn_drop=0.0, patch_embed_bias=True, posenc_preserve_area=True, timestep_mlp_bias=True,
            attend_to_padding=False, timestep_scale=1000.0, use_t5=True, t5_feat_dim=64, t5_token_length=256,
            rope_theta=10000.0,
        ),
        latent=(12, 2, 8, 8), context=64, lists=("blocks",), dtype=torch.bfloat16, entries=attention_mask,
        narrowed=("depth", "num_heads", "hidden_size_x", "hidden_size_y", "mlp_ratio_x", "t5_feat_dim"),
        published=config(
            depth=48, num_heads=24, hidden_size_x=3072, hidden_size_y=1536, mlp_ratio_x=4.0, t5_feat_dim=4096,
        ),
    ),
    Family(
        "aura_flow", "AuraFlow",
        config(max_seq=64, cond_seq_dim=2048, n_double_layers=2, n_layers=5, dim=64, n_heads=2, global_conddim=64),
        latent=(4, 8, 8), context=2048, lists=("double_layers", "single_layers"), dtype=torch.float16,
        narrowed=("dim", "n_heads", "global_conddim"),
        published=config(dim=3072, n_heads=12, global_conddim=3072, n_double_layers=4, n_layers=36, max_seq=4096),
    ),
    Family(
        "omnigen2", "Omnigen2",
        config(
            image_model="omnigen2", axes_dim_rope=[16, 16, 16], axes_lens=[1024, 1664, 1664], ffn_dim_multiplier=None,
            hidden_size=96, in_channels=16, multiple_of=32, norm_eps=1e-05, num_attention_heads=2, num_kv_heads=1,
            num_layers=4, num_refiner_layers=1, out_channels=None, patch_size=2, text_feat_dim=64,
            timestep_scale=1000.0,
        ),
        latent=(16, 8, 8), context=64, lists=("context_refiner", "noise_refiner", "layers"), dtype=torch.bfloat16,
        entries=attention_mask,
        narrowed=(
            "axes_dim_rope", "hidden_size", "multiple_of", "num_attention_heads", "num_kv_heads", "num_layers",
            "num_refiner_layers", "text_feat_dim",
        ),
        published=config(
            hidden_size=2520, axes_dim_rope=[40, 40, 40], multiple_of=256, num_attention_heads=21, num_kv_heads=7,
            num_layers=32, num_refiner_layers=2, text_feat_dim=2048,
        ),
    ),
    Family(
        "ace_step", "ACEStep",
        config(
            audio_model="ace", attention_head_dim=64, in_channels=8, inner_dim=128, max_height=16, max_position=32768,
            max_width=32768, mlp_ratio=2.5, num_attention_heads=2, num_layers=4, out_channels=8, patch_size=[16, 1],
            rope_theta=1000000.0, speaker_embedding_dim=512, text_embedding_dim=64, ssl_encoder_depths=[8, 8],
            ssl_latent_dims=[64, 64], ssl_names=["mert", "m-hubert"], lyric_encoder_vocab_size=64,
            lyric_hidden_size=1024,
        ),
        latent=(8, 16, 32), context=64, lists=("transformer_blocks",), dtype=torch.float16, large=True,
        entries=lambda prompt: {"conditioning_lyrics": torch.arange(prompt, prompt + 8)[None] % 64},
        narrowed=(
            "attention_head_dim", "inner_dim", "num_attention_heads", "num_layers", "text_embedding_dim",
            "ssl_latent_dims", "lyric_encoder_vocab_size",
        ),
        published=config(
            attention_head_dim=128, inner_dim=2560, num_attention_heads=20, num_layers=24, text_embedding_dim=768,
            ssl_latent_dims=[1024, 768], lyric_encoder_vocab_size=6693,
        ),
    ),
    Family(
        "chroma_radiance", "ChromaRadiance",
        config(
            image_model="chroma_radiance", in_channels=3, out_channels=3, patch_size=16, context_in_dim=64,
            hidden_size=64, mlp_ratio=4.0, num_heads=1, depth=2, depth_single_blocks=2, axes_dim=[16, 24, 24],
            theta=10000, qkv_bias=True, txt_ids_dims=[], vec_in_dim=None, in_dim=64, out_dim=64, hidden_dim=64,
            n_layers=2, nerf_hidden_size=16, nerf_mlp_ratio=2, nerf_depth=2, nerf_max_freqs=4, nerf_tile_size=8,
            nerf_final_head_type="conv", nerf_embedder_dtype=torch.float32, use_x0=False, use_sequential_txt_ids=False,
        ),
        latent=(3, 64, 64), context=64, lists=("double_blocks", "single_blocks", "nerf_blocks"),
        narrowed=(
            "num_heads", "axes_dim", "out_dim", "hidden_dim", "n_layers", "nerf_hidden_size", "nerf_mlp_ratio",
            "nerf_depth", "nerf_max_freqs", "nerf_tile_size",
        ),
        published=config(
            hidden_size=3072, num_heads=24, axes_dim=[16, 56, 56], depth=19, depth_single_blocks=38,
            context_in_dim=4096, out_dim=3072, hidden_dim=5120, n_layers=5, nerf_hidden_size=64, nerf_mlp_ratio=4,
            nerf_depth=4, nerf_max_freqs=8, nerf_tile_size=512,
        ),
    ),
    Family(
        "boogu", "Boogu",
        config(
            image_model="boogu", hidden_size=48, num_layers=3, num_double_stream_layers=2, num_refiner_layers=1,
            instruction_feat_dim=64, axes_dim_rope=(8, 8, 8), num_attention_heads=2, num_kv_heads=1, multiple_of=32,
        ),
        latent=(16, 8, 8), context=64,
        lists=("context_refiner", "noise_refiner", "double_stream_layers", "single_stream_layers"),
        entries=attention_mask,
        narrowed=("axes_dim_rope", "num_attention_heads", "num_kv_heads", "multiple_of"),
        published=config(
            hidden_size=3360, num_layers=32, num_double_stream_layers=8, num_refiner_layers=2,
            instruction_feat_dim=4096, axes_dim_rope=(40, 40, 40), num_attention_heads=28, num_kv_heads=7,
            multiple_of=256,
        ),
    ),
    Family(
        "ideogram4", "Ideogram4",
        config(
            image_model="ideogram4", in_channels=128, num_layers=4, num_attention_heads=2, attention_head_dim=128,
            intermediate_size=128, adaln_dim=64, llm_features_dim=64,
        ),
        latent=(128, 4, 4), context=64, lists=("layers",), dtype=torch.bfloat16,
        narrowed=("num_attention_heads", "attention_head_dim", "intermediate_size", "adaln_dim", "llm_features_dim"),
        published=config(
            num_layers=34, num_attention_heads=18, attention_head_dim=256, intermediate_size=12288, adaln_dim=512,
            llm_features_dim=53248,
        ),
    ),
    Family(
        "ernie_image", "ErnieImage",
        config(
            image_model="ernie", hidden_size=96, num_attention_heads=2, num_layers=4, ffn_hidden_size=128,
            text_in_dim=64, rope_axes_dim=(16, 16, 16),
        ),
        latent=(128, 4, 4), context=64, lists=("layers",),
        narrowed=(
            "hidden_size", "num_attention_heads", "num_layers", "ffn_hidden_size", "text_in_dim", "rope_axes_dim",
        ),
        published=config(
            hidden_size=4096, num_attention_heads=32, num_layers=36, ffn_hidden_size=12288, text_in_dim=3072,
            rope_axes_dim=(32, 48, 48),
        ),
    ),
    Family(
        "mage_flow", "MageFlow",
        config(
            image_model="mage_flow", in_channels=128, num_layers=4, num_attention_heads=1, attention_head_dim=64,
            axes_dims_rope=(16, 24, 24),
        ),
        latent=(128, 4, 4), context=2560, lists=("transformer_blocks",),
        narrowed=("num_attention_heads", "attention_head_dim", "axes_dims_rope"),
        published=config(num_layers=12, num_attention_heads=24, attention_head_dim=128, axes_dims_rope=(16, 56, 56)),
    ),
    Family(
        "ace_step15", "ACEStep15",
        config(
            audio_model="ace1.5", hidden_size=128, intermediate_size=128, num_heads=2, encoder_hidden_size=64,
            encoder_num_heads=2, encoder_intermediate_size=64, num_dit_layers=4, num_kv_heads=1, text_hidden_dim=64,
            num_lyric_layers=1, num_timbre_layers=1, num_tokenizer_layers=1, fsq_dim=64, fsq_levels=[8, 5],
        ),
        latent=(64, 20), context=64, lists=("decoder.layers",), dtype=torch.bfloat16,
        entries=lambda prompt: {"conditioning_lyrics": noise((1, 8, 64), prompt + 1)},
        narrowed=(
            "num_kv_heads", "text_hidden_dim", "num_lyric_layers", "num_timbre_layers", "num_tokenizer_layers",
            "fsq_dim", "fsq_levels",
        ),
    ),
]  # fmt: skip

LARGE = [
    Family(
        "hunyuan_dit_wide", "HunyuanDiT",
        config(image_model="hydit", depth=8, hidden_size=128, attn_precision=torch.float32),
        latent=(4, 8, 8), context=1024, tokens=77, lists=("blocks",), entries=_hunyuan_dit(2048),
        dtype=torch.float16, large=True,
    ),
    Family(
        "pixart_wide", "PixArtAlpha",
        config(
            image_model="pixart_alpha", num_heads=16, patch_size=2, hidden_size=1152, in_channels=4, depth=4,
            model_max_length=16, micro_condition=True,
        ),
        latent=(4, 34, 34), context=4096, lists=("blocks",), dtype=torch.float16, large=True,
    ),
    Family(
        "cosmos_predict2_wide", "CosmosT2IPredict2",
        config(
            COSMOS, image_model="cosmos_predict2", model_channels=192, crossattn_emb_channels=1024,
            pos_emb_learnable=True, min_fps=1, max_fps=30, adaln_lora_dim=256, num_blocks=10, num_heads=16,
            extra_per_block_abs_pos_emb=False, rope_enable_fps_modulation=False,
        ),
        latent=(16, 1, 8, 8), context=1024, lists=("blocks",), dtype=torch.float16, large=True,
    ),
]  # fmt: skip
