"""OPT's shape, read from a Hugging Face config.json and checked once.

Names follow config.json, so that `OPTConfig.from_dict(json.load(f))` and `to_dict` are inverse on
the keys that matter for inference; keys about dropout or about the saving library are ignored.
"""

from __future__ import annotations

import dataclasses
from typing import Any

ACTIVATIONS = ("relu", "gelu")  # "gelu" is the exact one, x * Phi(x)

# config.json spells one key with a leading underscore, which a dataclass field had better not.
_JSON_NAMES = {"remove_final_layer_norm": "_remove_final_layer_norm"}


@dataclasses.dataclass(frozen=True)
class OPTConfig:
    """Shape and switches of an OPT decoder. The defaults are those of Hugging Face's OPTConfig.

    word_embed_proj_dim: width of the token embedding; None means hidden_size. Where the two differ
      (opt-350m) there are `project_in` and `project_out` matrices without bias.
    do_layer_norm_before: pre-layer-norm (all but 350m); False also drops the decoder's final norm.
    eos_token_id: one id, or a tuple of ids where config.json lists several.

    Raises ValueError for a value out of range, a head count that does not divide hidden_size, or an
    unknown activation.
    """

    vocab_size: int = 50272
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    ffn_dim: int = 3072
    max_position_embeddings: int = 2048
    word_embed_proj_dim: int | None = None
    do_layer_norm_before: bool = True
    enable_bias: bool = True
    layer_norm_elementwise_affine: bool = True
    remove_final_layer_norm: bool = False
    activation_function: str = "relu"
    tie_word_embeddings: bool = True
    init_std: float = 0.02
    pad_token_id: int | None = 1
    bos_token_id: int | None = 2
    eos_token_id: int | tuple[int, ...] | None = 2

    def __post_init__(self):
        if self.word_embed_proj_dim is None:
            object.__setattr__(self, "word_embed_proj_dim", self.hidden_size)
        if isinstance(self.eos_token_id, list):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        for name in ("vocab_size", "hidden_size", "num_attention_heads", "ffn_dim",
                     "max_position_embeddings", "word_embed_proj_dim"):  # fmt: skip
            self._check_int(name, least=1)
        self._check_int("num_hidden_layers", least=0, most=4096)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "bool" and not isinstance(value, bool):
                raise ValueError(
                    f"OPTConfig: {field.name} is {value!r}; it is true or false. Correct it in "
                    "config.json."
                )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"OPTConfig: num_attention_heads is {self.num_attention_heads}, which does not "
                f"divide hidden_size {self.hidden_size}; every head needs the same width. Correct "
                "one of the two in config.json."
            )
        if self.activation_function not in ACTIVATIONS:
            raise ValueError(
                f"OPTConfig: activation_function is {self.activation_function!r}; OPT here knows "
                f"{' and '.join(map(repr, ACTIVATIONS))}."
            )
        std = self.init_std
        if isinstance(std, bool) or not isinstance(std, (int, float)) or not 0 < std < 10:
            raise ValueError(f"OPTConfig: init_std is {std!r}; it is a small positive number.")
        for name in ("pad_token_id", "bos_token_id"):
            self._check_token(name, getattr(self, name))
        for token in self.eos_token_ids:
            self._check_token("eos_token_id", token)

    def _check_int(self, name: str, least: int, most: int = 2**24) -> None:
        value = getattr(self, name)
        # The bounds keep a hostile config.json from asking for more than any real model has.
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ValueError(
                f"OPTConfig: {name} is {value!r}; it is an integer from {least} to {most}. "
                "Correct it in config.json."
            )

    def _check_token(self, name: str, token: Any) -> None:
        if token is None:
            return
        if isinstance(token, bool) or not isinstance(token, int) or not -1 <= token < 2**31:
            raise ValueError(f"OPTConfig: {name} is {token!r}; it is a token id or null.")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def embed_dim(self) -> int:
        """E, the width of the token embedding."""
        return self.hidden_size if self.word_embed_proj_dim is None else self.word_embed_proj_dim

    @property
    def has_projections(self) -> bool:
        return self.embed_dim != self.hidden_size

    @property
    def has_final_layer_norm(self) -> bool:
        return self.do_layer_norm_before and not self.remove_final_layer_norm

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        if self.eos_token_id is None:
            return ()
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> OPTConfig:
        """From the dict of a Hugging Face config.json.

        Raises ValueError when it is not an OPT's, or on a value that `OPTConfig` refuses.
        """
        if not isinstance(config, dict):
            raise ValueError(
                f"OPTConfig: config.json holds a {type(config).__name__}; an object is expected."
            )
        model_type = config.get("model_type")
        if model_type != "opt":
            raise ValueError(
                f"OPTConfig: model_type is {model_type!r}; only 'opt' is supported. Pass the "
                "directory of an OPT checkpoint, such as facebook/opt-125m."
            )
        kwargs = {}
        for field in dataclasses.fields(cls):
            key = _JSON_NAMES.get(field.name, field.name)
            if key in config:
                kwargs[field.name] = config[key]
        return cls(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The dict to write as config.json; transformers reads it too."""
        config: dict[str, Any] = {"architectures": ["OPTForCausalLM"], "model_type": "opt"}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            config[_JSON_NAMES.get(field.name, field.name)] = (
                list(value) if isinstance(value, tuple) else value
            )
        # transformers draws nothing at random at inference; zero keeps its training mode quiet too.
        return config | {"dropout": 0.0, "attention_dropout": 0.0, "layerdrop": 0.0}

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> OPTConfig:
        """The published shape `name`, "opt-125m" to "opt-175b", with `overrides` applied.

        Raises ValueError for another name.
        """
        if name not in PRESETS:
            raise ValueError(f"OPTConfig: no preset {name!r}; choose from {', '.join(PRESETS)}.")
        return cls(**(PRESETS[name] | overrides))


def _shape(hidden: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "ffn_dim": 4 * hidden,
        **more,
    }


# Zhang et al., OPT: Open Pre-trained Transformer Language Models, table 1; 350m's differences are
# those of its published checkpoint.
PRESETS: dict[str, dict[str, Any]] = {
    "opt-125m": _shape(768, 12, 12),
    "opt-350m": _shape(1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False),
    "opt-1.3b": _shape(2048, 24, 32),
    "opt-2.7b": _shape(2560, 32, 32),
    "opt-6.7b": _shape(4096, 32, 32),
    "opt-13b": _shape(5120, 40, 40),
    "opt-30b": _shape(7168, 48, 56),
    "opt-66b": _shape(9216, 64, 72),
    "opt-175b": _shape(12288, 96, 96),
}


def is_linear(name: str) -> bool:
    """Whether a tensor is the matrix of a decoder layer, which pruning is about."""
    return ".layers." in f".{name}" and name.endswith(".weight") and "norm" not in name
