"""What running on a device needs beside the package itself, and what to do where it is missing.

executorch and optimum-executorch are installed with `--no-deps`: the first declares hydra-core for a command of its
own that is not used here, and hydra-core wants another antlr4 than math-verify; the second declares
transformers==5.0.0rc1, which would hold everything else back. What both really import is in the extra `export`.
"""

from importlib.util import find_spec

# The versions that are tested, and their mends: ExecuTorch changes its format and its Python modules between others.
WITHOUT_DEPENDENCIES = ("executorch>=1.5.1,<1.6", "optimum-executorch>=1.1,<1.2")
INSTALL = 'pip install "mobilellm_hf[export]" && pip install --no-deps ' + " ".join(
    f'"{requirement}"' for requirement in WITHOUT_DEPENDENCIES
)


def need_executorch() -> None:
    """Raises an ImportError that says what to install, if anything is missing."""
    missing = [name for name in ("executorch", "torchao", "flatbuffers", "ruamel.yaml") if not _is_there(name)]
    if missing:
        raise ImportError(f"running on a device needs {', '.join(missing)}: {INSTALL}")


def _is_there(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # of a package whose parent is missing
        return False
