"""What a trial asks of the machine that it runs on."""

from __future__ import annotations

from typing import Any

from aqn_tune.study.schema import ComputeSpec
from aqn_tune.study.training import Lora, Method

SMALL = 500_000_000
"""Parameters up to which a pass of a pack takes about as long to launch as to compute: several workers
share a GPU to good effect."""
MEDIUM = 2_000_000_000
"""Parameters up to which two workers have room on one GPU of 80 GB, with float32 weights."""


def gpu_share(method: Method, parameters: int) -> float:
    """Return the GPUs that `compute.gpus_per_worker: auto` stands for.

    LoRA on up to `SMALL` parameters takes a quarter of a GPU, up to `MEDIUM` half of one, and more a whole;
    full fine-tuning takes a whole one, because every replicate has weights, gradients and two moments of its
    own. The limits are estimates, not measured. They decide about speed alone: a worker measures the memory
    that its share comes to, and takes a pack in parts where it has to.
    """
    if not isinstance(method, Lora) or parameters > MEDIUM:
        return 1.0
    return 0.25 if parameters <= SMALL else 0.5


def trial_request(compute: ComputeSpec) -> dict[str, float]:
    """Return the resources that Ray reserves for a trial, by Ray's names; GPUs only where it takes any."""
    request = {"CPU": compute.cpus_per_worker}
    if compute.gpus_per_worker:
        request["GPU"] = compute.gpus_per_worker
    return request


def count_parameters(config: dict[str, Any]) -> int | None:
    """Return about how many parameters a causal language model has, from its config.json.

    Embeddings, attention and gated feed-forward blocks with all their experts are counted, norms and biases
    are not: within a few per cent for Llama and its relatives, too many by up to a half for models without
    gates. None where the config does not say how large the model is.
    """
    text = config.get("text_config")
    config = {**config, **text} if isinstance(text, dict) else config

    def first(*names: str) -> int:
        return next((n for name in names if isinstance(n := config.get(name), int)), 0)

    width, vocabulary = first("hidden_size", "n_embd", "d_model"), first("vocab_size")
    layers = first("num_hidden_layers", "n_layer", "num_layers")
    heads = first("num_attention_heads", "n_head") or 1
    if not (width and vocabulary and layers):
        return None
    of_head = first("head_dim") or width // heads
    shared = first("num_key_value_heads") or heads
    inner = first("intermediate_size", "n_inner", "ffn_dim") or 4 * width
    experts = first("num_local_experts", "num_experts", "n_routed_experts")
    if experts:
        inner = experts * (first("moe_intermediate_size") or inner)
    attention = 2 * width * of_head * (heads + shared)
    embeddings = vocabulary * width * (1 if config.get("tie_word_embeddings") else 2)
    return embeddings + layers * (attention + 3 * width * inner)
