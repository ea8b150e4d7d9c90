"""Tiny Hugging Face models and data, made on the spot: nothing is downloaded."""

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SENTENCES = [
    "the cat sat on the mat and looked at the rain",
    "a dog ran through the park after a red ball",
    "birds fly over the sea when the winter comes",
    "the old bridge carries trains across the river",
]
SPECIAL = ["<pad>", "<s>", "</s>"]
CHAT = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def tokenizer():
    """Byte-level BPE, trained on the sentences."""
    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(SENTENCES * 4, trainer)
    pad, bos, eos = SPECIAL
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=pad, bos_token=bos, eos_token=eos
    )
    fast.chat_template = CHAT
    return fast


def model(kind, vocab, seed, spread=0.2):
    """A Llama or a Qwen with random weights; ``spread`` is wide enough for peaked distributions."""
    config, cls = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen": (Qwen3Config, Qwen3ForCausalLM),
    }[kind]
    torch.manual_seed(seed)
    sizes = dict(
        vocab_size=vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=128,
        initializer_range=spread, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return cls(config(**sizes))


def experts(vocab, **options):
    """A Mixtral with random weights and four experts."""
    sizes = dict(
        vocab_size=vocab, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=4, pad_token_id=0,
    )  # fmt: skip
    return MixtralForCausalLM(MixtralConfig(**sizes, **options))


def conversations():
    """TRL's conversational form: a prompt and the sentence as its answer."""
    return Dataset.from_list(
        [
            {
                "messages": [
                    {"role": "user", "content": " ".join(sentence.split()[:3])},
                    {"role": "assistant", "content": sentence},
                ]
            }
            for sentence in SENTENCES * 4
        ]
    )


def packed(rows, vocab, seed=3):
    """(one batch of ``rows`` sequences of 5 to 9 tokens behind each other, each of them alone)."""
    generator = torch.Generator().manual_seed(seed)
    alone = []
    for i in range(rows):
        ids = torch.randint(3, vocab, (1, 5 + 2 * i), generator=generator)
        labels = ids.clone()
        labels[:, 0] = -100  # nothing before it predicts it
        places = torch.arange(ids.shape[1])[None]
        alone.append({"input_ids": ids, "labels": labels, "position_ids": places})
    return {key: torch.cat([x[key] for x in alone], 1) for key in alone[0]}, alone
