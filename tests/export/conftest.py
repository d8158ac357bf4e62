"""Lowering takes half a minute of CPU time however small the model is: each kind is exported once."""

import pytest
from export_cases import export, save_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def exact(model_folder, tmp_path_factory):
    """In fp32, the cache too."""
    output = tmp_path_factory.mktemp("exported") / "exact"
    return export(model_folder, output, quantize="none", kv_cache="float32", prefill=16)


@pytest.fixture(scope="session")
def small(model_folder, tmp_path_factory):
    """As the paper has it, with a fall-back, and a cache in bfloat16."""
    output = tmp_path_factory.mktemp("exported") / "small"
    return export(model_folder, output, group_size=64, group_fall_back=True, prefill=16)
