"""The tokenizer and the processor of the testbed, made offline from a word list.

One token is a known lower-case word or any single other character (capital, digit, sign, space); unknown words become
`<unk>`. Decoding joins tokens without anything between, so that known text survives a round trip unchanged. The chat
template is LLaVA's: `USER: <image>\\nwhat is TOTAL? ASSISTANT:`, the answer right behind it, closed by `</s>`.
"""

from __future__ import annotations

import string
from collections.abc import Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlavaNextImageProcessorPil, LlavaNextProcessor, PreTrainedTokenizerFast

from training.testbed.symbols import PATCH, PINPOINTS, TILE

# The order of these lists is the order of ids, so changing them breaks every checkpoint.
SPECIALS = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
ROLES = ("USER:", "ASSISTANT:")
_WORDS = (
    "a all an and answer are at below color colors count crosses circles cross circle describe document each does "
    "down find for from give green has how image in is it left list look many me no not nothing number object objects "
    "of on one page picture please purple question read red right say scene see shape shapes show shown single square "
    "squares tell text that the there thing things this to top triangle triangles using value what where which white "
    "with word yellow yes you blue write bar beside category chart largest larger line lines or smallest smaller "
    "starts"
)
WORDS = _WORDS.split()
IMAGE = "<image>"

# LLaVA's, for contents that are a string as well as for those that are a list of parts.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}ASSISTANT:{% elif message['role'] == 'user' %}USER: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}</s>{% else %}{{ ' ' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


PAD, BOS, EOS, IMAGE_ID = 0, 1, 2, 4
"""Ids of `<pad>`, `<s>`, `</s>` and `<image>`: the places of these names in `SPECIALS`."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer: words, single characters and special tokens.

    >>> tokenizer = build_tokenizer()
    >>> tokenizer.convert_ids_to_tokens(tokenizer.encode("what is TAX?"))
    ['what', ' ', 'is', ' ', 'T', 'A', 'X', '?']
    """
    characters = [c for c in string.printable if c not in "\t\r\x0b\x0c"]
    names = list(dict.fromkeys([*SPECIALS, *ROLES, *characters, *WORDS]))
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    # Whole pieces are looked up: runs of small letters are words, everything else is single characters.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[a-z]+|[^a-z]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIALS])
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in ROLES])

    # Padded on the left, as `generate` needs it for batches.
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": IMAGE},
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def build_processor() -> LlavaNextProcessor:
    """The processor: LLaVA-NeXT's tiles of 96 pixels, with the tokenizer of `build_tokenizer`."""
    image_processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": TILE},
        crop_size={"height": TILE, "width": TILE},
        image_grid_pinpoints=PINPOINTS,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )

    return LlavaNextProcessor(
        image_processor=image_processor,
        tokenizer=build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE,
    )


def conversation(
    tokenizer: PreTrainedTokenizerFast, exchanges: Sequence[tuple[str, str]], slots: int, hint: bool = False
) -> tuple[list[int], list[int]]:
    """Token ids and labels of questions and answers about one image.

    With `hint` the answer's first token is asked for twice more, right behind the question mark and behind the space
    after it: without, the reader learns to go on with a value long before it learns to look up where one begins.

    Args:
        tokenizer: that of `build_tokenizer`.
        exchanges: (question, answer) pairs; the image comes before the first question.
        slots: number of visual tokens of the image.
        hint: ask for the first token of each answer early, too.

    Returns:
        (ids, labels), equally long; labels are -100 except for the answers.
    """
    ids: list[int] = []
    labels: list[int] = []

    for index, (question, answer) in enumerate(exchanges):
        # chr(10) is a newline: no backslash may stand in an f-string's braces before Python 3.12.
        prompt = tokenizer.encode(f"USER: {IMAGE + chr(10) if index == 0 else ''}{question} ASSISTANT:")
        if index == 0:
            # One image token per visual slot, as the processor expands the placeholder.
            place = prompt.index(IMAGE_ID)
            prompt[place : place + 1] = [prompt[place]] * slots

        reply = tokenizer.encode(f"{answer}</s>")
        ids += prompt + reply
        # The last two tokens of the prompt are the space and "ASSISTANT:"; a label is predicted by the token before it.
        early = 2 if hint else 0
        labels += [-100] * (len(prompt) - early) + [reply[0]] * early + reply

    return ids, labels


def recital(
    tokenizer: PreTrainedTokenizerFast, exchanges: Sequence[tuple[str, str]], slots: int
) -> tuple[list[int], list[int]]:
    """Like `conversation`, for short questions without any frame: "USER: <image>\\nTOTAL?415,DATE?22,".

    Args:
        tokenizer: that of `build_tokenizer`.
        exchanges: (question, answer) pairs.
        slots: number of visual tokens of the image.

    Returns:
        (ids, labels), equally long; labels are -100 except for the answers and the comma behind each.
    """
    head = tokenizer.encode(f"USER: {IMAGE}\n")
    place = head.index(IMAGE_ID)
    ids = head[:place] + [IMAGE_ID] * slots + head[place + 1 :]
    labels = [-100] * len(ids)

    for question, answer in exchanges:
        # A comma closes an answer instead of </s>: the sequence goes on.
        asked, reply = tokenizer.encode(question), tokenizer.encode(f"{answer},")
        ids += asked + reply
        labels += [-100] * len(asked) + reply
    return ids, labels
