# /// script
# dependencies = ["mobilellm_hf[export]"]
# ///
"""Exports a MobileLLM to a .pte for ExecuTorch's XNNPACK, as in Appendix C of the paper.

    python recipes/export.py --model runs/quickstart/model --output runs/device
    python recipes/export.py --model facebook/MobileLLM-R1-140M --output runs/140M --max_seq_len 32768 --quantize 8da4w

The weights are quantized and read back, from the model and from the file; a layer that did not become what was asked
for is an error. `mobilellm_hf/export/exporter.py` says what the output folder gets,
`mobilellm_hf.export.OnDeviceModel` runs it in Python, ExecuTorch's llama runner in C++.
"""

from mobilellm_hf.export.arguments import ExportArguments
from mobilellm_hf.export.exporter import run_export
from mobilellm_hf.launch import launch

if __name__ == "__main__":
    launch(__doc__, (ExportArguments,), run_export)
