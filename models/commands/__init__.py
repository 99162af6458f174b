"""The commands of `jax-flashllm`, one a module: `add_arguments(parser)` and `run(args)`.

What a command needs of JAX and Flax is imported in its `run`, after the arguments are checked.
"""
