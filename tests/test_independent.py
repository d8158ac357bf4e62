"""Which process of a launcher this one is, and what it becomes."""

import os
import sys

import pytest

from mobilellm_hf.independent import GROUP_VARIABLES, PLACE, OwnProcess, own_process


@pytest.mark.parametrize(
    "given, gpus, expected",
    [
        ({"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "CUDA_VISIBLE_DEVICES": "4,6"}, 2, ("3/4", "6")),
        ({"RANK": "2", "LOCAL_RANK": "2", "WORLD_SIZE": "3"}, 2, ("2/3", "0")),  # two share a GPU
        ({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}, 0, ("1/2", None)),
        ({}, 4, ("0/1", "0")),  # a plain start on a machine with GPUs
        ({}, 1, None),
    ],
)
def test_a_process_of_a_group_begins_anew_with_a_gpu_of_its_own(monkeypatch, given, gpus, expected):
    """Stands in for GPUs, of which the machines that test this have none."""
    begun = []
    for name in (*GROUP_VARIABLES, "CUDA_VISIBLE_DEVICES", PLACE):
        monkeypatch.delenv(name, raising=False)
    for name, value in (given | {"TORCHELASTIC_RUN_ID": "x"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr(os, "execve", lambda *command: begun.append(command) or sys.exit())
    if expected is None:
        assert own_process() == OwnProcess(0, 1)
        return
    with pytest.raises(SystemExit):
        own_process()
    program, arguments, environment = begun[0]
    assert (program, arguments) == (sys.executable, sys.orig_argv)
    assert (environment[PLACE], environment.get("CUDA_VISIBLE_DEVICES")) == expected
    assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID"} & set(environment)
    monkeypatch.setenv(PLACE, environment[PLACE])
    assert own_process() == OwnProcess(*map(int, expected[0].split("/")))
