"""Tokenizers with the vocabularies of real ones, made on the spot."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = ["the cat sat on the mat, and the dog didn't!\n\tif x == 12: y = 345\n", "café naïve 日本 😀🎉 Ω"] * 3


def byte_level(ends="<|im_end|>", hostile=()):
    """Byte-level BPE, as GPT-2, Llama 3 and Qwen have it."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    )
    inner.add_special_tokens([ends, "<|im_start|>"])
    inner.add_tokens([AddedToken(text, normalized=False) for text in ("<tool_call>", *hostile)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=ends)
