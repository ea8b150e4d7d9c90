"""The teacher, and students made of some of its layers."""

import copy

import torch
from data import InputError
from transformers import AutoModelForCausalLM, AutoTokenizer, logging


def load(gguf, device):
    """(model in float32, tokenizer) of a GGUF file."""
    logging.set_verbosity_error()
    file = {"gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **file)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **file)
    return model.to(device).eval().requires_grad_(False), tokenizer


def student_of(teacher, layers):
    """A copy with so many of the teacher's layers: the first, the last, others evenly between."""
    depth = teacher.config.num_hidden_layers
    if not 1 <= layers <= depth:
        raise InputError(f"--layers must be from 1 to the teacher's {depth}, got {layers}")
    kept = torch.linspace(0, depth - 1, layers).round().long().tolist()
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in kept]
    student = type(teacher)(config)
    student.load_state_dict(
        {
            name.replace(f".layers.{old}.", f".layers.{new}."): value
            for new, old in enumerate(kept)
            for name, value in teacher.state_dict().items()
            if ".layers." not in name or f".layers.{old}." in name
        }
    )
    return student.to(teacher.device)


def hidden(model, tokens):
    """[B, T, H]: what goes into the output matrix."""
    return model.model(input_ids=tokens, use_cache=False).last_hidden_state


def matrix(model):
    return model.get_output_embeddings().weight
