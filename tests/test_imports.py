"""What an import loads."""

import pytest

HEAVY = ["flax", "orbax", "optax", "tokenizers", "safetensors", "transformers", "torch"]


def test_the_core_imports_no_flax(fresh_process):
    loaded = fresh_process(
        "import sys, jax_flashllm; print(*(m for m in sys.argv[1:] if m in sys.modules))", *HEAVY
    )
    assert loaded.split() == []


def test_public_names_exist():
    import jax_flashllm

    for name in jax_flashllm.__all__:
        assert hasattr(jax_flashllm, name)


@pytest.mark.parametrize("module", ["nn", "linen", "models.generate", "models.cli"])
def test_each_part_imports_alone(fresh_process, module):
    fresh_process(f"import jax_flashllm.{module}")


def test_without_the_compiled_module_the_error_says_what_to_do(fresh_process):
    with pytest.raises(AssertionError, match="pip install -e"):
        fresh_process(
            "import sys; sys.modules['jax_flashllm._flashllm'] = None; import jax_flashllm"
        )
