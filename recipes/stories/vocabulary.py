"""Train the byte-level BPE tokenizer that the target and the draft share."""

from pathlib import Path

from corpus import Story
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 2048
CONTEXT = 512
BOS = "<|bos|>"
EOS = "<|eos|>"


def train_tokenizer(stories: list[Story]) -> PreTrainedTokenizerFast:
    """A byte-level BPE over the training stories; encoding a text puts BOS in front of it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((story.text for story in stories), trainer)
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bos)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, stories: list[Story]) -> list[list[int]]:
    """Each story as BOS, its tokens, EOS."""
    batch = tokenizer([story.text for story in stories])["input_ids"]
    return [[*ids, tokenizer.eos_token_id] for ids in batch]


def load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer saved below `path`."""
    return PreTrainedTokenizerFast.from_pretrained(path)
