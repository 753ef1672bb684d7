"""The whole model: a `LlavaNextForConditionalGeneration` around the small tower and a small Llama."""

from __future__ import annotations

from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from training.testbed.symbols import GRID, PINPOINTS
from training.testbed.vocabulary import BOS, EOS, IMAGE_ID, PAD


def reader_config(tokenizer: PreTrainedTokenizerFast, width: int, layers: int, heads: int, inner: int) -> LlamaConfig:
    """The configuration of a small Llama for the testbed's vocabulary.

    Args:
        tokenizer: the testbed's; it gives the size of the vocabulary.
        width: features per token.
        layers: number of layers.
        heads: attention heads per layer.
        inner: features within the MLP.
    """
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        # What a page needs, and the ids of the testbed's own vocabulary.
        max_position_embeddings=2048,  # the largest page has 744 visual tokens
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )


def build_model(
    tokenizer: PreTrainedTokenizerFast, vision: CLIPVisionConfig, text: LlamaConfig
) -> LlavaNextForConditionalGeneration:
    """A freshly initialised model; greedy, at most 16 new tokens, unless `generate` is told otherwise.

    Args:
        tokenizer: the testbed's.
        vision: the tower's configuration.
        text: the language model's configuration.
    """
    config = LlavaNextConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_ID,
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,  # what `tower.feature_layer` computes
        image_grid_pinpoints=PINPOINTS,
        # Without CLS, which the "default" strategy drops.
        image_seq_length=GRID * GRID,
        tie_word_embeddings=True,
    )

    model = LlavaNextForConditionalGeneration(config)

    # Saved with the weights, so that `generate` is greedy by default.
    model.generation_config = GenerationConfig(
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        max_new_tokens=16,
        do_sample=False,
    )

    return model
