"""Models in Hugging Face layout: from scratch by shape, or from a checkpoint; and what a token costs."""

from pathlib import Path
from typing import Any

from curation import storage
from curation.errors import UserError
from curation.manifest import fingerprint
from training.config import Shape

VOCAB_MULTIPLE = 64  # rows of the embedding beyond the tokenizer's ids make matrix products faster on GPUs


def padded_vocab(vocab_size: int) -> int:
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def build(shape: Shape, vocab_size: int, max_positions: int, eos_id: int, seed: int) -> Any:
    """A float32 model with weights drawn from `seed` alone, the same for any number of processes.

    `initialisation: normal` is Hugging Face's, N(0, 0.02²) for all matrices. `scaled` is for narrow models, in which
    0.02 leaves the signal of an embedding far below what the blocks add: 1/√fan-in, what writes to the residual stream
    divided by √(2 · layers) (GPT-2's rule), the embedding 0.5 where it is not tied."""
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

    common: dict[str, Any] = {
        "vocab_size": padded_vocab(vocab_size),
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": max_positions,
        "tie_word_embeddings": shape.tied_embeddings,
        "bos_token_id": eos_id,  # documents end with it, and so begin after it
        "eos_token_id": eos_id,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": shape.rope_theta}
        model: Any
        if shape.architecture == "llama":
            kv_heads = shape.num_kv_heads or shape.num_heads
            model = LlamaForCausalLM(LlamaConfig(**common, num_key_value_heads=kv_heads, rope_parameters=rope))
        else:
            rope |= {"partial_rotary_factor": shape.rotary_fraction}
            model = GPTNeoXForCausalLM(GPTNeoXConfig(**common, use_parallel_residual=True, rope_parameters=rope))
        if shape.initialisation == "scaled":
            _scale(model, shape)
        return model


_TO_RESIDUAL = ("o_proj.weight", "down_proj.weight", "attention.dense.weight", "dense_4h_to_h.weight")


def _scale(model: Any, shape: Shape) -> None:
    import torch

    embeddings = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    for name, weight in model.named_parameters():
        if weight.dim() > 1 and id(weight) not in embeddings:
            std = weight.shape[1] ** -0.5
            torch.nn.init.normal_(
                weight, std=std / (2 * shape.num_layers) ** 0.5 if name.endswith(_TO_RESIDUAL) else std
            )
    if not shape.tied_embeddings:
        torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.5)


def load(path: str) -> Any:
    """The float32 model of a Hugging Face folder or hub id; safetensors only, no code from the checkpoint.
    Raises UserError when there is none or it is damaged."""
    import torch
    from transformers import AutoModelForCausalLM

    if not Path(path).exists() and (path.startswith((".", "/")) or path.count("/") != 1):
        raise UserError(f"model {path} is no preset ({_presets()}), no folder and no hub id: mend `model`")
    try:
        return AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        )
    except Exception as error:  # each broken file fails in its own way
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"model {path} cannot be loaded: {first}") from None


def checkpoint_hash(path: str) -> str:
    """What a checkpoint is: the hashes of its configuration and weights, or the hub id itself."""
    folder = Path(path)
    if not folder.is_dir():
        return path
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("config.json")])
    return fingerprint([[file.name, storage.file_sha256(str(file)).sha256] for file in files])


def num_parameters(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


def flops_per_token(model: Any, sequence_length: int) -> float:
    """Forward and backward of one token: 6 for each parameter in a matrix product, and 12 * layers * hidden *
    length for attention scores (PaLM, arXiv 2204.02311, appendix B; nothing is counted twice when
    activations are recomputed)."""
    config = model.config
    embedding = model.get_input_embeddings().weight.numel()
    tied = bool(getattr(config, "tie_word_embeddings", False))
    products = num_parameters(model) - (0 if tied else embedding)
    return 6.0 * products + 12.0 * config.num_hidden_layers * config.hidden_size * sequence_length


# bf16 products a second without sparsity, from the vendors' data sheets
_PEAK_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12,
               "L4": 121e12, "4090": 165e12, "A10": 125e12, "V100": 125e12}  # fmt: skip


def peak_flops(device_name: str) -> float | None:
    """Of one GPU, or None for what is not in the list (and for CPUs): then no MFU is given."""
    return next((peak for name, peak in _PEAK_FLOPS.items() if name in device_name), None)


def _presets() -> str:
    from training.config import PRESETS

    return ", ".join(PRESETS)
