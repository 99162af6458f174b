"""Records what transformers answers for the tiny models: python tests/make_fixtures.py

Needs the `oracle` extra. Writes tests/fixtures/opt.npz: for each variant the float32 logits of the
padded prompts and 64 greedy tokens of every row.
"""

from unittest import mock

import numpy as np
import tiny_opt
import torch
import transformers


def hf_model(config: dict, tensors: dict[str, np.ndarray]) -> transformers.OPTForCausalLM:
    """transformers' model with these weights, in float32."""
    shape = {k: v for k, v in config.items() if k not in ("model_type", "architectures")}
    # Every weight is loaded below, and transformers 4 fails to initialise norms without affine.
    with mock.patch.object(transformers.OPTPreTrainedModel, "_init_weights", return_value=None):
        model = transformers.OPTForCausalLM(transformers.OPTConfig(**shape))
    state = {k: torch.from_numpy(v.astype(np.float32)) for k, v in tensors.items()}
    if config.get("tie_word_embeddings", True):
        state["lm_head.weight"] = state["model.decoder.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    return model.eval()


def hf_logits(model, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        out = model(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask))
    return out.logits.numpy()


def hf_greedy(model, ids: np.ndarray, mask: np.ndarray, new: int) -> np.ndarray:
    """`new` greedy tokens a row, end tokens like any other."""
    model.generation_config.eos_token_id = None
    out = model.generate(
        torch.from_numpy(ids),
        attention_mask=torch.from_numpy(mask),
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=1,
    )
    return out.numpy()[:, ids.shape[1] :]


def main():
    ids, mask = tiny_opt.prompts()
    arrays = {}
    for variant in tiny_opt.VARIANTS:
        config = tiny_opt.config(variant)
        model = hf_model(config, tiny_opt.weights(config))
        # Logits at pads mean nothing: zeros compress.
        arrays[f"{variant}.logits"] = hf_logits(model, ids, mask) * mask[:, :, None]
        arrays[f"{variant}.greedy"] = hf_greedy(model, ids, mask, 64).astype(np.uint8)
    tiny_opt.FIXTURES.parent.mkdir(exist_ok=True)
    np.savez_compressed(tiny_opt.FIXTURES, **arrays)
    print(f"{tiny_opt.FIXTURES}: {tiny_opt.FIXTURES.stat().st_size} bytes")


if __name__ == "__main__":
    main()
