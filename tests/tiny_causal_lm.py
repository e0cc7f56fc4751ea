"""A causal language model with random weights and a tokenizer of bytes, as folders that transformers loads."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXT = "The quick brown fox jumps over the lazy dog. " * 60


def byte_tokenizer():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate([*letters, "<end>"])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def tiny_llama(**settings):
    torch.manual_seed(0)
    config = {
        "vocab_size": 257,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": None,
        "eos_token_id": 256,
    }
    return LlamaForCausalLM(LlamaConfig(**{**config, **settings}))


def save_tiny_llama(folder, **settings):
    tiny_llama(**settings).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
