"""Tiny random twins of every backbone, saved as the published folders are: no downloads."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import functional as F

from conftest import make_backbone


def t5_tokenizer() -> Any:
    from transformers import T5Tokenizer

    letters = [(chr(code), -3.0) for code in range(33, 127)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *letters]
    return T5Tokenizer(vocab=pieces, extra_ids=0)


T5 = {"vocab_size": 98, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}


def t5_encoder() -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(**T5, tie_word_embeddings=False))


def cogvideox(folder: Path) -> Path:
    """1.0 with sincos positions, as 2B: 4 frames and 4x4 pixels a latent, patch 2."""
    return make_backbone(folder)


def cogvideox_15(folder: Path) -> Path:
    """Tokens that span two latents, and rotary positions of their own kind."""
    from diffusers import CogVideoXTransformer3DModel

    make_backbone(folder, rotary=True)
    config = CogVideoXTransformer3DModel.load_config(folder / "transformer")
    config |= {"patch_size_t": 2, "patch_bias": False}
    torch.manual_seed(0)
    CogVideoXTransformer3DModel.from_config(config).save_pretrained(folder / "transformer")
    return folder


def cogvideox_i2v(folder: Path) -> Path:
    """5B's, from an image: twice the channels, and learned positions beside the rotary ones."""
    changes = {"in_channels": 8, "use_learned_positional_embeddings": True}
    return make_backbone(folder, rotary=True, **changes)


def cogvideox_15_i2v(folder: Path) -> Path:
    """1.5's: images at the inverse scale, and one more number that the model is always told."""
    from diffusers import AutoencoderKLCogVideoX

    changes = {"in_channels": 8, "patch_size_t": 2, "patch_bias": False, "ofs_embed_dim": 16}
    make_backbone(folder, rotary=True, **changes)
    vae = AutoencoderKLCogVideoX.from_pretrained(folder / "vae")
    vae.register_to_config(invert_scale_latents=True)
    vae.save_pretrained(folder / "vae")
    return folder


def _wan(
    folder: Path,
    channels: int,
    vae: dict,
    experts: int = 1,
    image: dict[str, Any] | None = None,
    transformer: dict[str, Any] | None = None,
    **options: float | bool,
) -> Path:
    """A Wan pipeline; with the further parts `image`, the one that takes an image."""
    from diffusers import (
        UniPCMultistepScheduler,
        WanImageToVideoPipeline,
        WanPipeline,
        WanTransformer3DModel,
    )
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": channels,
        "out_channels": channels,
        "text_dim": 16,
        "freq_dim": 16,
        "ffn_dim": 16,
        "num_layers": 3,
        "rope_max_seq_len": 32,
    }
    transformers = [WanTransformer3DModel(**config | (transformer or {})) for _ in range(experts)]
    (WanPipeline if image is None else WanImageToVideoPipeline)(
        tokenizer=t5_tokenizer(),
        text_encoder=UMT5EncoderModel(UMT5Config(**T5)),
        vae=_wan_vae(channels, **vae),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        transformer=transformers[0],
        transformer_2=transformers[-1] if experts > 1 else None,
        **(image or {}),
        **options,
    ).save_pretrained(folder)
    return folder


def _wan_vae(channels: int, **options: Any) -> Any:
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=4,
        z_dim=channels,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.1 * (n + 1) for n in range(channels)],
        latents_std=[0.5 + 0.1 * n for n in range(channels)],
        **options,
    )


def wan(folder: Path) -> Path:
    """Wan 2.1: 4 frames and 8x8 pixels a latent, patch 2."""
    return _wan(folder, channels=4, vae={})


def wan_experts(folder: Path) -> Path:
    """Wan 2.2 A14B: two transformers that take turns."""
    return _wan(folder, channels=4, vae={}, experts=2, boundary_ratio=0.875)


def wan_ti2v(folder: Path) -> Path:
    """Wan 2.2 TI2V: 16x16 pixels a latent, and a timestep for every token."""
    patched = {"in_channels": 12, "out_channels": 12, "patch_size": 2, "is_residual": True}
    vae = patched | {"scale_factor_spatial": 16, "decoder_base_dim": 4}
    return _wan(folder, channels=4, vae=vae, expand_timesteps=True)


def wan_i2v(folder: Path) -> Path:
    """Wan 2.1 from an image: a mask and the image's latents beside the latents, and CLIP."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(1)
    side = 28
    clip = CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=side,
        patch_size=14,
    )
    parts = {
        "image_encoder": CLIPVisionModel(clip),
        "image_processor": CLIPImageProcessor(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        ),
    }
    changes = {"in_channels": 12, "image_dim": 8, "added_kv_proj_dim": 24}
    return _wan(folder, channels=4, vae={}, image=parts, transformer=changes)


def wan_i2v_experts(folder: Path) -> Path:
    """Wan 2.2 A14B from an image: without CLIP."""
    changes = {"in_channels": 12}
    options = {"experts": 2, "boundary_ratio": 0.9}
    return _wan(folder, channels=4, vae={}, image={}, transformer=changes, **options)


def skyreels(folder: Path) -> Path:
    """As Wan 2.1, with a transformer and pipelines of its own."""
    return _skyreels(wan(folder), "SkyReelsV2Pipeline")


def skyreels_i2v(folder: Path) -> Path:
    """From an image, as Wan 2.1."""
    return _skyreels(wan_i2v(folder), "SkyReelsV2ImageToVideoPipeline")


def _skyreels(folder: Path, pipeline: str) -> Path:
    """Wan's folder with the other classes, whose weights have the same names and shapes."""
    for file in ("model_index.json", "transformer/config.json"):
        config = json.loads((folder / file).read_text())
        if file == "model_index.json":
            config["_class_name"] = pipeline
            config["transformer"][1] = "SkyReelsV2Transformer3DModel"
            for name in ("transformer_2", "boundary_ratio", "expand_timesteps"):
                config.pop(name, None)
        else:
            config["_class_name"] = "SkyReelsV2Transformer3DModel"
        (folder / file).write_text(json.dumps(config))
    return folder


def ltx(folder: Path) -> Path:
    """8 frames and 32x32 pixels a latent, patch 1, and statistics among the VAE's weights."""
    return _ltx(
        folder,
        "LTXPipeline",
        use_dynamic_shifting=True,
        base_shift=0.95,
        max_shift=2.05,
        base_image_seq_len=1024,
        max_image_seq_len=4096,
        shift_terminal=0.1,
    )


def ltx_condition(folder: Path) -> Path:
    """0.9.5 and later: the pipeline with causal positions, whose scheduler shifts nothing."""
    return _ltx(folder, "LTXConditionPipeline")


def _ltx(folder: Path, pipeline: str, **scheduler: float | bool) -> Path:
    import diffusers
    from diffusers import (
        AutoencoderKLLTXVideo,
        FlowMatchEulerDiscreteScheduler,
        LTXVideoTransformer3DModel,
    )

    torch.manual_seed(0)
    channels = 8
    vae = AutoencoderKLLTXVideo(
        latent_channels=channels,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
    )
    vae.latents_mean += 0.1 * torch.arange(channels)
    vae.latents_std += 0.2 * torch.arange(channels)
    getattr(diffusers, pipeline)(
        scheduler=FlowMatchEulerDiscreteScheduler(**scheduler),
        vae=vae,
        text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer(),
        transformer=LTXVideoTransformer3DModel(
            in_channels=channels,
            out_channels=channels,
            num_attention_heads=2,
            attention_head_dim=12,
            cross_attention_dim=24,
            num_layers=3,
            caption_channels=16,
        ),
    ).save_pretrained(folder)
    return folder


def word_tokenizer(
    template: str, cropped: int, chat: str | None = None, after: tuple[str, ...] = ()
) -> Any:
    """A token for each word of the template up to the caption, filled up in front to as many as
    the pipeline crops, for each of those after the caption, and for each letter of all others."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    mark = Regex(r"<\|\w+\|>")
    split = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(mark, "isolated"), pre_tokenizers.WhitespaceSplit()]
    )
    words = [word for word, _ in split.pre_tokenize_str(template)]
    letters = [chr(code) for code in range(33, 127)]
    pieces = ["<pad>", "<unk>", "<start>", *words, *after, *letters, *(f"##{c}" for c in letters)]
    vocabulary = {piece: n for n, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    filling = ["<start>"] * (cropped - len(words))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*filling, "$A"], special_tokens=[("<start>", vocabulary["<start>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="right",
        chat_template=chat and " ".join([*filling, chat]),
    )


def hunyuan_video(folder: Path) -> Path:
    """4 frames and 8x8 pixels a latent, patch 2; two blocks with two streams, two with one."""
    from diffusers import HunyuanVideoPipeline
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
    from transformers import LlamaModel

    torch.manual_seed(0)
    template = DEFAULT_PROMPT_TEMPLATE["template"].partition("{}")[0]
    tokenizer = word_tokenizer(template, DEFAULT_PROMPT_TEMPLATE["crop_start"])
    llama = LlamaModel(_llama(tokenizer, positions=512))
    parts = _hunyuan_video()
    HunyuanVideoPipeline(text_encoder=llama, tokenizer=tokenizer, **parts).save_pretrained(folder)
    return folder


def hunyuan_video_i2v(folder: Path) -> Path:
    """The image stands in place of the first latent, and LLaVA sees it beside the caption."""
    return _hunyuan_video_i2v(folder, image_condition_type="token_replace")


def hunyuan_video_i2v_33ch(folder: Path) -> Path:
    """The image stands beside the first latent, and the model is told no guidance."""
    changes = {"in_channels": 9, "guidance_embeds": False}
    return _hunyuan_video_i2v(folder, image_condition_type="latent_concat", **changes)


def _hunyuan_video_i2v(folder: Path, **changes: Any) -> Path:
    from diffusers import HunyuanVideoImageToVideoPipeline
    from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video_image2video as i2v
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    torch.manual_seed(0)
    template = i2v.DEFAULT_PROMPT_TEMPLATE["template"].partition("{}")[0]
    cropped, after = i2v.DEFAULT_PROMPT_TEMPLATE["crop_start"], ("assistant",)
    tokenizer = word_tokenizer(template, cropped, after=after)
    clip = CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=336,
        patch_size=14,
    )
    llava = LlavaConfig(
        vision_config=clip,
        text_config=_llama(tokenizer, positions=2048),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
    )
    HunyuanVideoImageToVideoPipeline(
        text_encoder=LlavaForConditionalGeneration(llava),
        tokenizer=tokenizer,
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
        ),
        **_hunyuan_video(**changes),
    ).save_pretrained(folder)
    return folder


def _llama(tokenizer: Any, positions: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=positions,
    )


def _clip_text() -> dict[str, Any]:
    """A text encoder and its tokenizer, with a token for each letter."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = [chr(code) for code in range(33, 127)]
    clip = [*letters, *(f"{letter}</w>" for letter in letters)]
    clip += ["<|startoftext|>", "<|endoftext|>"]
    return {
        "text_encoder_2": CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(clip),
                hidden_size=8,
                intermediate_size=8,
                num_hidden_layers=1,
                num_attention_heads=2,
                eos_token_id=len(clip) - 1,
            )
        ),
        "tokenizer_2": CLIPTokenizer({piece: n for n, piece in enumerate(clip)}, []),
    }


def _hunyuan_vae() -> Any:
    from diffusers import AutoencoderKLHunyuanVideo

    return AutoencoderKLHunyuanVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=0.5,
    )


def _hunyuan_video(**changes: Any) -> dict[str, Any]:
    """The parts that all forms of HunyuanVideo have."""
    from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoTransformer3DModel

    config = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 2,
        "num_single_layers": 2,
        "num_refiner_layers": 1,
        "text_embed_dim": 16,
        "pooled_projection_dim": 8,
        "rope_axes_dim": (4, 4, 4),
    }
    return {
        "transformer": HunyuanVideoTransformer3DModel(**config | changes),
        "vae": _hunyuan_vae(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0),
        **_clip_text(),
    }


CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }} {{ message.content }}<|im_end|> "
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)


TINY_QWEN: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
}


def hunyuan_video_15(folder: Path) -> Path:
    """4 frames and 16x16 pixels a latent, patch 1; there is a place for an image."""
    return _hunyuan_video_15(folder, "HunyuanVideo15Pipeline")


def hunyuan_video_15_i2v(folder: Path) -> Path:
    """The image stands beside the first latent, and among the text as SigLIP sees it."""
    from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(1)
    siglip = SiglipVisionConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    return _hunyuan_video_15(
        folder,
        "HunyuanVideo15ImageToVideoPipeline",
        image_encoder=SiglipVisionModel(siglip),
        feature_extractor=SiglipImageProcessor(size={"height": 28, "width": 28}),
    )


def _hunyuan_video_15(folder: Path, pipeline: str, **image: Any) -> Path:
    import diffusers
    from diffusers import (
        AutoencoderKLHunyuanVideo15,
        ClassifierFreeGuidance,
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideo15Pipeline,
        HunyuanVideo15Transformer3DModel,
    )
    from transformers import (
        ByT5Tokenizer,
        Qwen2_5_VLTextConfig,
        Qwen2_5_VLTextModel,
        T5Config,
        T5EncoderModel,
    )

    torch.manual_seed(0)
    channels = 4
    system = inspect.signature(HunyuanVideo15Pipeline._get_mllm_prompt_embeds).parameters
    template = f"<|im_start|>system {system['system_message'].default}<|im_end|> <|im_start|>user"
    tokenizer = word_tokenizer(template, system["crop_start"].default, CHAT)
    glyphs = ByT5Tokenizer()
    getattr(diffusers, pipeline)(
        text_encoder=Qwen2_5_VLTextModel(Qwen2_5_VLTextConfig(**_qwen_text(tokenizer))),
        tokenizer=tokenizer,
        transformer=HunyuanVideo15Transformer3DModel(
            in_channels=2 * channels + 1,
            out_channels=channels,
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=3,
            num_refiner_layers=1,
            text_embed_dim=16,
            text_embed_2_dim=8,
            image_embed_dim=8,
            rope_axes_dim=(4, 4, 4),
            target_size=32,
        ),
        vae=AutoencoderKLHunyuanVideo15(
            latent_channels=channels, block_out_channels=(8, 8, 8, 8, 8), layers_per_block=1
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        text_encoder_2=T5EncoderModel(
            T5Config(**T5 | {"vocab_size": len(glyphs), "d_model": 8}, tie_word_embeddings=False)
        ),
        tokenizer_2=glyphs,
        guider=ClassifierFreeGuidance(guidance_scale=6.0),
        **image,
    ).save_pretrained(folder)
    return folder


def kandinsky5(folder: Path) -> Path:
    """4 frames and 8x8 pixels a latent, patch 2; latents have their channels last."""
    return _kandinsky5(folder, "Kandinsky5T2VPipeline")


def kandinsky5_i2v(folder: Path) -> Path:
    """The image stands in place of the first latent, which a mask tells."""
    return _kandinsky5(folder, "Kandinsky5I2VPipeline")


def _kandinsky5(folder: Path, pipeline: str) -> Path:
    import diffusers
    from diffusers import FlowMatchEulerDiscreteScheduler, Kandinsky5Transformer3DModel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    transformer = Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=16,
        in_text_dim2=8,
        time_dim=16,
        model_dim=32,
        ff_dim=32,
        num_visual_blocks=3,
        axes_dims=(4, 6, 6),
        visual_cond=True,
    )
    for name, parameter in transformer.named_parameters():
        if "modulation" in name:  # Zero in a new model, whose blocks do nothing.
            parameter.data.normal_(std=0.1)
    made = getattr(diffusers, pipeline)(
        transformer=transformer,
        vae=_hunyuan_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=10.0),
        text_encoder=None,
        tokenizer=None,
        **_clip_text(),
    )
    template = made.prompt_template.partition("{}")[0]
    tokenizer = word_tokenizer(template, made.prompt_template_encode_start_idx)
    qwen = Qwen2_5_VLConfig(
        text_config=_qwen_text(tokenizer),
        vision_config={
            "depth": 1,
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_heads": 2,
            "out_hidden_size": 16,
        },
    )
    made.register_modules(
        text_encoder=Qwen2_5_VLForConditionalGeneration(qwen), tokenizer=tokenizer
    )
    made.save_pretrained(folder)
    return folder


def _qwen_text(tokenizer: Any) -> dict[str, Any]:
    return TINY_QWEN | {"vocab_size": len(tokenizer)}


def mochi(folder: Path) -> Path:
    """6 frames and 8x8 pixels a latent, patch 2; time runs from noise to latents."""
    from diffusers import (
        AutoencoderKLMochi,
        FlowMatchEulerDiscreteScheduler,
        MochiPipeline,
        MochiTransformer3DModel,
    )

    torch.manual_seed(0)
    MochiPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        # The pipeline takes 12 channels for granted, the VAE norms in groups of 32.
        vae=AutoencoderKLMochi(
            encoder_block_out_channels=(32, 32, 32, 32),
            decoder_block_out_channels=(32, 32, 32, 32),
            layers_per_block=(1, 1, 1, 1, 1),
        ),
        text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer(),
        transformer=MochiTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=3,
            pooled_projection_dim=16,
            text_embed_dim=16,
            time_embed_dim=16,
        ),
        force_zeros_for_empty_prompt=True,
    ).save_pretrained(folder)
    return folder


def _cosmos_transformer(**options: Any) -> Any:
    from diffusers import CosmosTransformer3DModel
    from diffusers.models.transformers import transformer_cosmos

    if not hasattr(transformer_cosmos, "transforms"):
        # All that the transformer takes from torchvision, which tests must not need.
        nearest = SimpleNamespace(NEAREST="nearest")
        resize = SimpleNamespace(resize=lambda x, size, interpolation: F.interpolate(x, size))
        transformer_cosmos.transforms = SimpleNamespace(  # pyright: ignore
            functional=resize, InterpolationMode=nearest
        )
    return CosmosTransformer3DModel(
        in_channels=5,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=18,
        num_layers=3,
        mlp_ratio=2.0,
        text_embed_dim=16,
        adaln_lora_dim=4,
        max_size=(8, 16, 16),
        rope_scale=(1.0, 3.0, 3.0),
        extra_pos_embed_type=None,
        **options,
    )


def _without_guardrail(pipeline: Any, folder: Path) -> Path:
    pipeline.save_pretrained(folder)
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"safety_checker": [None, None]}))
    return folder


def cosmos(folder: Path) -> Path:
    """Predict2 Video2World: Wan's autoencoder, and frames in place that a mask tells."""
    from diffusers import Cosmos2VideoToWorldPipeline, FlowMatchEulerDiscreteScheduler

    from videorepa.backbones._cosmos import NoGuardrail

    torch.manual_seed(0)
    pipeline = Cosmos2VideoToWorldPipeline(
        text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer(),
        transformer=_cosmos_transformer(),
        vae=_wan_vae(4),
        scheduler=FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
        safety_checker=NoGuardrail(),  # pyright: ignore
    )
    return _without_guardrail(pipeline, folder)


def cosmos_25(folder: Path) -> Path:
    """Predict2.5: the text encoder's layers side by side, which the transformer projects."""
    from diffusers import Cosmos2_5_PredictBasePipeline, UniPCMultistepScheduler
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    from videorepa.backbones._cosmos import NoGuardrail
    from videorepa.backbones.cosmos_25 import SYSTEM_PROMPT

    torch.manual_seed(0)
    chat = CHAT.replace("message.content", "message.content[0].text")
    template = f"<|im_start|>system {SYSTEM_PROMPT}<|im_end|> <|im_start|>user"
    tokenizer = word_tokenizer(template, 0, chat)
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2}
    pipeline = Cosmos2_5_PredictBasePipeline(
        text_encoder=Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(
                text_config=_qwen_text(tokenizer),
                vision_config=vision | {"out_hidden_size": 16, "fullatt_block_indexes": [0]},
            )
        ),
        tokenizer=tokenizer,
        transformer=_cosmos_transformer(
            use_crossattn_projection=True,
            crossattn_proj_in_channels=48,
            encoder_hidden_states_channels=16,
        ),
        vae=_wan_vae(4),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            use_karras_sigmas=True,
            sigma_min=0.01,
            sigma_max=200.0,
        ),
        safety_checker=NoGuardrail(),  # pyright: ignore
    )
    return _without_guardrail(pipeline, folder)


def _ltx2(folder: Path, layers: dict[str, Any], connectors: dict[str, Any]) -> Path:
    from diffusers import (
        AutoencoderKLLTX2Audio,
        AutoencoderKLLTX2Video,
        FlowMatchEulerDiscreteScheduler,
        LTX2Pipeline,
        LTX2VideoTransformer3DModel,
    )
    from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    torch.manual_seed(0)
    channels, tokenizer = 4, word_tokenizer("", 1)
    vae = AutoencoderKLLTX2Video(
        latent_channels=channels,
        block_out_channels=(8, 16, 32, 64),
        decoder_block_out_channels=(8, 16, 32),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    )
    vae.latents_mean += 0.1 * torch.arange(channels)
    vae.latents_std += 0.2 * torch.arange(channels)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    text = small | {"num_hidden_layers": 3, "num_key_value_heads": 1, "head_dim": 8}
    vision = {"num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
    LTX2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.95,
            max_shift=2.05,
            base_image_seq_len=1024,
            max_image_seq_len=4096,
            shift_terminal=0.1,
        ),
        vae=vae,
        audio_vae=AutoencoderKLLTX2Audio(
            base_channels=4, ch_mult=(1,), num_res_blocks=1, latent_channels=2, mel_bins=8
        ),
        text_encoder=Gemma3ForConditionalGeneration(
            Gemma3Config(
                text_config=text | {"vocab_size": len(tokenizer)},
                vision_config=small | vision,
                mm_tokens_per_image=4,
            )
        ),
        tokenizer=tokenizer,
        connectors=LTX2TextConnectors(
            caption_channels=16,
            text_proj_in_factor=4,
            video_connector_num_attention_heads=2,
            video_connector_num_layers=1,
            video_connector_num_learnable_registers=16,
            audio_connector_num_attention_heads=2,
            audio_connector_attention_head_dim=8,
            audio_connector_num_layers=1,
            audio_connector_num_learnable_registers=16,
            rope_double_precision=False,
            rope_type="split",
            **connectors,
        ),
        transformer=LTX2VideoTransformer3DModel(
            in_channels=channels,
            out_channels=channels,
            num_attention_heads=2,
            attention_head_dim=16,
            cross_attention_dim=32,
            audio_in_channels=4,
            audio_out_channels=4,
            audio_num_attention_heads=2,
            audio_attention_head_dim=8,
            audio_cross_attention_dim=16,
            num_layers=3,
            caption_channels=16,
            rope_type="split",
            rope_double_precision=False,
            **layers,
        ),
        vocoder=LTX2Vocoder(in_channels=16, hidden_channels=32),
    ).save_pretrained(folder)
    return folder


def ltx2(folder: Path) -> Path:
    """LTX-2: as LTX, with sound beside it; 8 frames and 32x32 pixels a latent, patch 1."""
    return _ltx2(folder, {}, {"video_connector_attention_head_dim": 8})


def ltx2_3(folder: Path) -> Path:
    """LTX-2.3: text of two widths, which the transformer takes as it is, and gated attention."""
    flags = ("gated_attn", "cross_attn_mod", "audio_gated_attn", "audio_cross_attn_mod")
    connectors = {
        "video_connector_attention_head_dim": 16,
        "per_modality_projections": True,
        "video_hidden_dim": 32,
        "audio_hidden_dim": 16,
        "video_gated_attn": True,
        "audio_gated_attn": True,
    }
    layers = dict.fromkeys((*flags, "perturbed_attn"), True) | {"use_prompt_embeddings": False}
    return _ltx2(folder, layers, connectors)


TWINS: dict[str, tuple[dict[str, str], Callable[[Path], Path]]] = {
    "cogvideox": ({"name": "cogvideox"}, cogvideox),
    "cogvideox-1.5": ({"name": "cogvideox"}, cogvideox_15),
    "cogvideox-i2v": ({"name": "cogvideox"}, cogvideox_i2v),
    "cogvideox-1.5-i2v": ({"name": "cogvideox"}, cogvideox_15_i2v),
    "wan-2.1": ({"name": "wan"}, wan),
    "wan-2.2": ({"name": "wan", "expert": "low"}, wan_experts),
    "wan-2.2-ti2v": ({"name": "wan"}, wan_ti2v),
    "wan-2.1-i2v": ({"name": "wan"}, wan_i2v),
    "wan-2.2-i2v": ({"name": "wan", "expert": "low"}, wan_i2v_experts),
    "ltx": ({"name": "ltx"}, ltx),
    "ltx-0.9.5": ({"name": "ltx", "positions": "causal"}, ltx_condition),
    "hunyuan_video": ({"name": "hunyuan_video"}, hunyuan_video),
    "hunyuan_video-i2v": ({"name": "hunyuan_video"}, hunyuan_video_i2v),
    "hunyuan_video-i2v-33ch": ({"name": "hunyuan_video"}, hunyuan_video_i2v_33ch),
    "hunyuan_video_15": ({"name": "hunyuan_video_15"}, hunyuan_video_15),
    "hunyuan_video_15-i2v": ({"name": "hunyuan_video_15"}, hunyuan_video_15_i2v),
    "kandinsky5": ({"name": "kandinsky5"}, kandinsky5),
    "kandinsky5-i2v": ({"name": "kandinsky5"}, kandinsky5_i2v),
    "mochi": ({"name": "mochi"}, mochi),
    "skyreels": ({"name": "skyreels"}, skyreels),
    "skyreels-i2v": ({"name": "skyreels"}, skyreels_i2v),
    "cosmos": ({"name": "cosmos"}, cosmos),
    "cosmos_25": ({"name": "cosmos_25"}, cosmos_25),
    "ltx2": ({"name": "ltx2"}, ltx2),
    "ltx2.3": ({"name": "ltx2"}, ltx2_3),
}
"""By the model's name: what a recipe says of the backbone, and what makes its twin."""
