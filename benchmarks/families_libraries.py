"""The families of `benchmarks.families` that need timm and transformers: `pip install ".[families]"`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Generator, nn

from benchmarks.families_networks import Draw, Family, images, tokens

WORDS = 64


def _model(name: str, config: str, inner: str = "", **sizes: Any) -> Callable[[], nn.Module]:
    """`transformers.NAME` of a random small configuration; `inner`: the part of it that is measured."""

    def build() -> nn.Module:
        import transformers

        model: nn.Module = getattr(transformers, name)(getattr(transformers, config)(**sizes))
        return model.get_submodule(inner) if inner else model

    return build


def _masked_tokens(batch: int, generator: Generator) -> dict[str, torch.Tensor]:
    """The last words of every second text are padding."""
    mask = torch.ones(batch, 8, dtype=torch.int64)
    mask[::2, 6:] = 0
    return {"input_ids": tokens(8, WORDS)(batch, generator), "attention_mask": mask}


def _two_texts(batch: int, generator: Generator) -> dict[str, torch.Tensor]:
    draw = tokens(8, WORDS)
    return {"input_ids": draw(batch, generator), "decoder_input_ids": draw(batch, generator)}


def _named(name: str, draw: Draw) -> Draw:
    return lambda batch, generator: {name: draw(batch, generator)}


def huggingface() -> list[Family]:
    """Small random configurations; without a cache, which is no output of the function."""
    make = partial(Family, group="transformers", needs="transformers")
    llama = {
        "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32, "use_cache": False,
    }  # fmt: skip
    bert = {
        "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 32,
    }  # fmt: skip
    vit = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": 16, "patch_size": 4, "num_labels": 5,
    }  # fmt: skip
    gpt = {
        "vocab_size": WORDS,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 32,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "use_cache": False,
    }
    distil = {"vocab_size": WORDS, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}
    t5 = {
        "vocab_size": WORDS, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
        "use_cache": False,
    }  # fmt: skip
    whisper = {
        "vocab_size": WORDS, "d_model": 32, "encoder_layers": 2, "decoder_layers": 1,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
        "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 8, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    }  # fmt: skip
    sounds: Draw = lambda batch, generator: torch.randn(  # noqa: E731
        batch, 8, 40, generator=generator, dtype=torch.float64
    )
    causal = _named("input_ids", tokens(8, WORDS))
    return [
        make("BERT", build=_model("BertForSequenceClassification", "BertConfig", num_labels=3, **bert),
             draw=_masked_tokens),
        make("DistilBERT", build=_model("DistilBertForMaskedLM", "DistilBertConfig", **distil),
             draw=_masked_tokens),
        make("GPT-2", build=_model("GPT2LMHeadModel", "GPT2Config", **gpt), draw=causal),
        make("Llama", build=_model("LlamaForCausalLM", "LlamaConfig", **llama), draw=causal),
        make("Qwen2", build=_model("Qwen2ForCausalLM", "Qwen2Config", **llama), draw=causal),
        make("T5", build=_model("T5ForConditionalGeneration", "T5Config", **t5), draw=_two_texts),
        make("ViT (transformers)", build=_model("ViTForImageClassification", "ViTConfig", **vit),
             draw=_named("pixel_values", images(16))),
        make("Whisper encoder", build=_model("WhisperModel", "WhisperConfig", "encoder", **whisper),
             draw=_named("input_features", sounds)),
    ]  # fmt: skip


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    """`timm.create_model(NAME)`, or of a class as `module.Class`, since most names fix what makes them large."""

    def build() -> nn.Module:
        import timm
        import timm.models  # a class is of one of its modules

        options.setdefault("num_classes", 10)
        module, _, kind = name.rpartition(".")
        model: nn.Module
        if module:
            model = getattr(getattr(timm.models, module), kind)(**options)
        else:
            model = timm.create_model(name, pretrained=False, **options)
        return model

    return build


def _small_transformer(**options: Any) -> dict[str, Any]:
    return {"img_size": 32, "patch_size": 8, "embed_dim": 32, **options}


# name -> (pixels, what makes it small[, the class]). Those called test_* are timm's own small ones.
TIMM: dict[str, tuple[int, dict[str, Any]] | tuple[int, dict[str, Any], str]] = {
    "test_resnet": (32, {}),
    "test_byobnet": (32, {}),
    "test_efficientnet": (32, {}),
    "test_nfnet": (32, {}),
    "test_convnext": (32, {}),
    "test_mambaout": (32, {}),
    "test_vit": (32, {"img_size": 32, "patch_size": 8}),
    "lcnet_035": (32, {}),
    "mobilenetv3_small_050": (32, {}),
    "mobilenetv4_conv_small_035": (64, {}),
    "tinynet_e": (32, {}),
    "mnasnet_small": (32, {}),
    "semnasnet_050": (32, {}),
    "ghostnet_050": (32, {}),
    "dla46_c": (32, {}),
    "resnet10t": (32, {}),
    "regnetx_002": (32, {}),
    "regnety_002": (32, {}),
    "ese_vovnet19b_slim": (32, {}),
    "edgenext_xx_small": (64, {}),
    "mobilevit_xxs": (64, {}),
    "repvit_m0_9": (32, {}),
    "poolformer": (32, {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 48)}, "metaformer.MetaFormer"),
    "deit": (32, _small_transformer(depth=2, num_heads=2), "deit.VisionTransformerDistilled"),
    "mlp_mixer": (32, _small_transformer(num_blocks=2), "mlp_mixer.MlpMixer"),
}


def timm() -> list[Family]:
    """Small models of timm."""
    found = []
    for name, (size, options, *kind) in TIMM.items():
        build = _timm(kind[0] if kind else name, **options)
        found.append(Family(f"timm {name}", "timm", build, images(size), "timm"))
    return found
