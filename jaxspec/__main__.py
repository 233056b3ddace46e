"""The program `jaxspec`, or `python -m jaxspec`."""

import os

# JAX settings that `jaxspec.settings` overrides anyway.
for _name in (
    "JAX_ENABLE_X64",
    "JAX_NUMPY_RANK_PROMOTION",
    "JAX_NUMPY_DTYPE_PROMOTION",
    "JAX_DEFAULT_DTYPE_BITS",
    "JAX_DEFAULT_PRNG_IMPL",
    "JAX_DISABLE_JIT",
    "JAX_TRANSFER_GUARD",
):
    os.environ.pop(_name, None)


def run() -> None:
    try:
        from jaxspec.cli import main
        from jaxspec.cli.exits import leave
    except KeyboardInterrupt:
        os._exit(130)
    leave(main())


if __name__ == "__main__":
    run()
