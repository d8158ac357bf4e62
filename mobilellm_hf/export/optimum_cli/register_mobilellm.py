"""Tells `optimum-cli export executorch` of MobileLLM, as it begins to run.

optimum-cli imports every file of the namespace `optimum.commands.register`, where setup.py installs this one. Other
commands are not made to wait for torch.
"""

from importlib.util import find_spec

REGISTER_COMMANDS = []

if find_spec("optimum.commands.export.executorch"):
    from optimum.commands.export.executorch import ExecuTorchExportCommand

    _run = ExecuTorchExportCommand.run

    def run(self):
        import mobilellm_hf.export.optimum  # noqa: F401  registers the task

        _run(self)

    ExecuTorchExportCommand.run = run
