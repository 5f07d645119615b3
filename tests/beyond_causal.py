"""Tiny random models of every kind that is no causal language model, with inputs and a loss.

Each has the weights, inputs and outputs that its class has; only the sizes are small. Dropout is
off, so that two copies of a model compute the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from causal_models import randomize
from torch import Tensor, nn

ROWS, TOKENS, VOCABULARY, SIDE = 4, 6, 67, 16
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "num_labels": 3,
}
_VIT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 8,
    "num_labels": 3,
}
_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}
_BART = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 40,
    "dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
_WHISPER = _BART | {
    "num_mel_bins": 8,
    "max_source_positions": 8,
    "max_target_positions": 20,
}


def _ids(generator: torch.Generator) -> Tensor:
    return torch.randint(3, VOCABULARY, (ROWS, TOKENS), generator=generator)


def _text(generator: torch.Generator) -> dict[str, Tensor]:
    mask = torch.ones(ROWS, TOKENS, dtype=torch.long)
    mask[-1, -2:] = 0  # padding
    return {"input_ids": _ids(generator), "attention_mask": mask}


def _sequence_labels(generator: torch.Generator) -> dict[str, Tensor]:
    return _text(generator) | {"labels": torch.arange(ROWS) % 3}


def _token_labels(generator: torch.Generator) -> dict[str, Tensor]:
    return _text(generator) | {"labels": _ids(generator) % 3}


def _spans(generator: torch.Generator) -> dict[str, Tensor]:
    starts = torch.arange(ROWS) % 3
    return _text(generator) | {"start_positions": starts, "end_positions": starts + 1}


def _seq2seq(generator: torch.Generator) -> dict[str, Tensor]:
    return _text(generator) | {"labels": _ids(generator)}


def _sound(generator: torch.Generator) -> dict[str, Tensor]:
    features = torch.randn(ROWS, 8, 16, generator=generator)
    return {"input_features": features, "labels": _ids(generator)}


def _image(generator: torch.Generator) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(ROWS, 3, SIDE, SIDE, generator=generator)}


def _labelled_image(generator: torch.Generator) -> dict[str, Tensor]:
    return _image(generator) | {"labels": torch.arange(ROWS) % 3}


def _image_and_text(generator: torch.Generator) -> dict[str, Any]:
    return _text(generator) | _image(generator)


IMAGE_TOKEN = VOCABULARY - 1


def _image_in_text(generator: torch.Generator) -> dict[str, Tensor]:
    ids = _ids(generator) % (VOCABULARY - 1)
    ids[:, :4] = IMAGE_TOKEN  # an image has 4 patches
    labels = ids.masked_fill(ids == IMAGE_TOKEN, -100)
    return _image(generator) | {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
    }


def _qwen_image_in_text(generator: torch.Generator) -> dict[str, Tensor]:
    ids = _ids(generator) % (VOCABULARY - 4)
    ids[:, 0], ids[:, 1], ids[:, 2] = VOCABULARY - 3, IMAGE_TOKEN, VOCABULARY - 2
    labels = ids.masked_fill(ids >= VOCABULARY - 4, -100)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "mm_token_type_ids": (ids == IMAGE_TOKEN).long(),
        "pixel_values": torch.randn(4 * ROWS, 3 * 2 * 4 * 4, generator=generator),
        "image_grid_thw": torch.tensor([[1, 2, 2]] * ROWS),
    }


def _latents(generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "sample": torch.randn(ROWS, 4, 8, 8, generator=generator),
        "timestep": torch.arange(ROWS) * 7,
        "encoder_hidden_states": torch.randn(ROWS, TOKENS, 16, generator=generator),
    }


def _dit_latents(generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "hidden_states": torch.randn(ROWS, 4, 8, 8, generator=generator),
        "timestep": torch.arange(ROWS) * 7,
        "class_labels": torch.arange(ROWS) % 3,
    }


def _sd3_latents(generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "hidden_states": torch.randn(ROWS, 4, 8, 8, generator=generator),
        "timestep": torch.arange(ROWS) * 7.0,
        "encoder_hidden_states": torch.randn(ROWS, TOKENS, 16, generator=generator),
        "pooled_projections": torch.randn(ROWS, 16, generator=generator),
    }


def _flux_latents(generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "hidden_states": torch.randn(ROWS, 4, 4, generator=generator),
        "encoder_hidden_states": torch.randn(ROWS, TOKENS, 16, generator=generator),
        "pooled_projections": torch.randn(ROWS, 16, generator=generator),
        "timestep": torch.arange(ROWS) / 7,
        "img_ids": torch.stack([torch.zeros(4), torch.arange(4) // 2, torch.arange(4) % 2], 1),
        "txt_ids": torch.zeros(TOKENS, 3),
    }


@dataclass(frozen=True)
class Kind:
    """A kind of model.

    Attributes:
        library: `transformers` or `diffusers`.
        name: of the class.
        settings: of its configuration; of a model of diffusers, of the model itself.
        inputs: what `forward` gets, drawn with a generator.
        targets: `target_modules` that are usual for it.
        task: PEFT's name of what it does; None where PEFT has none.
        units: lists of blocks that `shard` is to find.
    """

    library: str
    name: str
    settings: dict[str, Any]
    inputs: Callable[[torch.Generator], dict[str, Any]]
    targets: str | list[str]
    task: str | None
    units: list[str] = field(default_factory=list)

    def model(self) -> Any:
        """The same random weights at every call."""
        torch.manual_seed(0)
        if self.library == "diffusers":
            import diffusers

            model = getattr(diffusers, self.name)(**self.settings)
        else:
            cls: Any = getattr(transformers, self.name)
            model = cls(cls.config_class(**self.settings))
        randomize(model)
        return model.eval()

    def rows(self, batch: dict[str, Any]) -> list[str]:
        """The names of the inputs that have a row, or several, for each sample."""
        shared = ("img_ids", "txt_ids")
        return [name for name in batch if name not in shared]

    def batch(self, seed: int = 3) -> dict[str, Any]:
        """Inputs of `ROWS` rows."""
        return self.inputs(torch.Generator().manual_seed(seed))


# The outputs that a class is for; of other classes it is the first one.
_OUTPUTS = ("logits", "start_logits", "end_logits", "sample", "text_embeds", "image_embeds")


def _outputs(found: Any) -> Tensor:
    parts = [found[name] for name in _OUTPUTS if name in found]
    return torch.cat([part.flatten() for part in parts or [found[0]]])


def output_of(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """The output that the class is for, all of it in one vector."""
    return _outputs(model(**batch))


def loss_of(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """The class's own loss; without one, the mean of sin of the output."""
    found = model(**batch)
    own = found.get("loss")
    return own if own is not None else _outputs(found).sin().mean()


_QUERIES = ["query", "value"]
_ATTENTION = ["q_proj", "v_proj"]
_DIFFUSION = ["to_q", "to_k", "to_v", "to_out.0"]

KINDS: dict[str, Kind] = {
    "bert": Kind("transformers", "BertModel", _BERT | _NO_DROPOUT, _text, _QUERIES,
                 "FEATURE_EXTRACTION", ["encoder.layer"]),
    "bert sequences": Kind("transformers", "BertForSequenceClassification", _BERT | _NO_DROPOUT,
                           _sequence_labels, _QUERIES, "SEQ_CLS", ["bert.encoder.layer"]),
    "bert tokens": Kind("transformers", "BertForTokenClassification", _BERT | _NO_DROPOUT,
                        _token_labels, _QUERIES, "TOKEN_CLS", ["bert.encoder.layer"]),
    "bert answers": Kind("transformers", "BertForQuestionAnswering",
                         _BERT | _NO_DROPOUT | {"num_labels": 2},
                         _spans, _QUERIES, "QUESTION_ANS", ["bert.encoder.layer"]),
    "roberta": Kind("transformers", "RobertaForSequenceClassification", _BERT | _NO_DROPOUT,
                    _sequence_labels, "all-linear", "SEQ_CLS", ["roberta.encoder.layer"]),
    "deberta": Kind("transformers", "DebertaV2ForSequenceClassification",
                    _BERT | _NO_DROPOUT
                    | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"],
                       "position_buckets": 4, "pooler_dropout": 0.0, "share_att_key": True,
                       "norm_rel_ebd": "layer_norm", "conv_kernel_size": 3},
                    _sequence_labels, ["query_proj", "value_proj", "word_embeddings", "conv.conv"],
                    "SEQ_CLS", ["deberta.encoder.layer"]),
    "modernbert": Kind("transformers", "ModernBertForTokenClassification",
                       _BERT | {"global_attn_every_n_layers": 2, "local_attention": 4,
                                "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1,
                                "sep_token_id": 2},
                       _token_labels, ["Wqkv", "Wo"], "TOKEN_CLS", ["model.layers"]),
    "llama sequences": Kind("transformers", "LlamaForSequenceClassification",
                            _TEXT | {"num_labels": 3}, _sequence_labels, "all-linear",
                            "SEQ_CLS", ["model.layers"]),
    "t5": Kind("transformers", "T5ForConditionalGeneration", _T5, _seq2seq, ["q", "v", "wi"],
               "SEQ_2_SEQ_LM", ["encoder.block", "decoder.block"]),
    "t5 encoder": Kind("transformers", "T5EncoderModel", _T5, _text, ["q", "v"], None,
                       ["encoder.block"]),
    "bart": Kind("transformers", "BartForConditionalGeneration", _BART, _seq2seq, "all-linear",
                 "SEQ_2_SEQ_LM", ["model.encoder.layers", "model.decoder.layers"]),
    "whisper": Kind("transformers", "WhisperForConditionalGeneration", _WHISPER, _sound,
                    _ATTENTION, None, ["model.encoder.layers", "model.decoder.layers"]),
    "vit": Kind("transformers", "ViTForImageClassification", _VIT | _NO_DROPOUT, _labelled_image,
                ["q_proj", "v_proj", "projection"], None, ["vit.layers"]),
    "dino": Kind("transformers", "Dinov2Model", _VIT, _image, "all-linear", None,
                 ["encoder.layer"]),
    "clip": Kind("transformers", "CLIPModel",
                 {"text_config": _TEXT | {"projection_dim": 8},
                  "vision_config": _VIT | {"projection_dim": 8}, "projection_dim": 8},
                 _image_and_text, _ATTENTION, None,
                 ["text_model.encoder.layers", "vision_model.encoder.layers"]),
    "llava": Kind("transformers", "LlavaForConditionalGeneration",
                  {"text_config": _TEXT | {"model_type": "llama"},
                   "vision_config": _VIT | {"model_type": "clip_vision_model"},
                   "image_token_index": IMAGE_TOKEN, "vision_feature_layer": -1},
                  _image_in_text, _ATTENTION, None,
                  ["model.vision_tower.encoder.layers",
                   "model.language_model.layers"]),
    "qwen2-vl": Kind("transformers", "Qwen2VLForConditionalGeneration",
                     {"text_config": _TEXT | {"rope_parameters": {"rope_type": "default",
                                              "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
                      "vision_config": {"depth": 2, "embed_dim": 16, "hidden_size": 16,
                                        "num_heads": 2, "mlp_ratio": 2, "patch_size": 4},
                      "image_token_id": IMAGE_TOKEN, "vision_start_token_id": VOCABULARY - 3,
                      "vision_end_token_id": VOCABULARY - 2, "video_token_id": VOCABULARY - 4},
                     _qwen_image_in_text, [*_ATTENTION, "qkv", "proj"], None,
                     ["model.visual.blocks", "model.language_model.layers"]),
    "unet": Kind("diffusers", "UNet2DConditionModel",
                 {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1,
                  "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
                  "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
                  "cross_attention_dim": 16, "attention_head_dim": 2, "norm_num_groups": 2},
                 _latents, [*_DIFFUSION, "conv1", "conv2", "conv_in", "proj_in"], None),
    "dit": Kind("diffusers", "DiTTransformer2DModel",
                {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4,
                 "num_layers": 2, "sample_size": 8, "norm_num_groups": 2,
                 "num_embeds_ada_norm": 10},
                _dit_latents, _DIFFUSION, None, ["transformer_blocks"]),
    "sd3": Kind("diffusers", "SD3Transformer2DModel",
                {"sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 2,
                 "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 16,
                 "caption_projection_dim": 16, "pooled_projection_dim": 16, "out_channels": 4,
                 "pos_embed_max_size": 8},
                _sd3_latents, [*_DIFFUSION, "pos_embed.proj"], None, ["transformer_blocks"]),
    "flux": Kind("diffusers", "FluxTransformer2DModel",
                 {"patch_size": 1, "in_channels": 4, "num_layers": 2, "num_single_layers": 2,
                  "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 16,
                  "pooled_projection_dim": 16, "axes_dims_rope": (2, 2, 4)},
                 _flux_latents, [*_DIFFUSION, "proj_mlp"], None,
                 ["transformer_blocks", "single_transformer_blocks"]),
}  # fmt: skip


def table() -> str:
    """The table of docs/other_models.md."""
    lines = [
        "| class | adapted in the tests | `task_type` | head | units |",
        "|---|---|---|---|---|",
    ]
    heads = {"SEQ_CLS": "`classifier` or `score`", "QUESTION_ANS": "`qa_outputs`"}
    heads["TOKEN_CLS"] = heads["SEQ_CLS"]
    for kind in KINDS.values():
        targets = kind.targets if isinstance(kind.targets, list) else [kind.targets]
        named = ", ".join(f"`{name}`" for name in targets)
        units = ", ".join(f"`{path}`" for path in kind.units) or "lists of alike blocks inside"
        head = heads.get(kind.task or "", "–")
        lines.append(f"| `{kind.name}` | {named} | {kind.task or '–'} | {head} | {units} |")
    return "\n".join(lines)
