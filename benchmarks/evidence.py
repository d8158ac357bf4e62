"""The paper's claims on data and training, at a small scale on real text, each with intervals and as it falls.

    python benchmarks/evidence.py --data data --folder runs/evidence            # some two hours on two cores
    python benchmarks/evidence.py --data data --folder runs/evidence --only figure3 figure4 agreement
    python benchmarks/evidence.py --data data --folder runs/evidence --page docs/evidence/README.md

`data` holds gsm8k_train.jsonl, gsm8k_test.jsonl (question, answer), math_test.jsonl (problem, solution, type),
humaneval.jsonl (prompt, canonical_solution), wikitext2_valid.txt and wikitext2_test.txt; Python sources are those of
the interpreter and of what is installed. Everything is done by the recipes, with a YAML file each that stays in the
folder. Any number of interruptions costs no finished model.
"""

import argparse
import dataclasses
import hashlib
from datetime import date
from pathlib import Path

import torch
import yaml
from common import machine
from evidence_data import FILES, build_data, check_folder
from evidence_lab import STUDENT, TEACHER, Lab, Scale
from evidence_mixtures import agreement, influence_mix, leave_one_out, rejection
from evidence_report import Finding, page, show
from evidence_training import narrowing, rank_me, staged_fine_tuning
from rich.console import Console
from transformers import AutoTokenizer

from mobilellm_hf import MobileLLMConfig, MobileLLMForCausalLM

CLAIMS = {
    "figure3": leave_one_out, "figure4": influence_mix, "agreement": agreement, "figure5": narrowing,
    "figure6": rejection, "table11": rank_me, "table2": staged_fine_tuning,
}  # fmt: skip
NOT_DONE = "could not be done"
HEAD = """# The paper's claims, at a small scale

MobileLLM-R1 shows what its data and its recipe gain without seeds or intervals, on models of 140M parameters and more.
Here the same comparisons are made on models of {parameters}, which read {tokens:,} tokens of real text each and
{audited:,} in an audit, with several seeds and 95% intervals over them. What does not replicate at this scale may well
hold at the paper's; what does is at least no accident of one run; *undecided* is what the intervals leave open.
Everything is reported as it fell.

{date}, {processes} processes, each on one thread of {machine}.
To repeat it: `python benchmarks/evidence.py --data DATA --folder runs/evidence`, with GSM8K, MATH, HumanEval and
WikiText-2 in DATA, as `--help` says."""


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def two_or_more(text: str) -> int:
    if positive(text) < 2:
        raise argparse.ArgumentTypeError("an interval takes two seeds or more")
    return int(text)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of GSM8K, MATH, HumanEval and WikiText-2")
    parser.add_argument("--folder", type=Path, default=Path("runs/evidence"), help="of everything that is trained")
    parser.add_argument("--only", nargs="+", choices=CLAIMS, default=list(CLAIMS), help="some of the claims")
    parser.add_argument("--processes", type=positive, default=2, help="models that are trained at a time")
    parser.add_argument("--steps", type=positive, default=Scale.steps, help="of a model, 1,024 tokens each")
    parser.add_argument("--audit-steps", type=positive, default=Scale.audit_steps, help="of a model of an audit")
    parser.add_argument("--seeds", type=two_or_more, default=Scale.seeds, help="of leave-one-out and fine-tuning")
    parser.add_argument("--page", type=Path, help="Markdown file to write; pictures are put beside it")
    return parser.parse_args()


def parameters(lab: Lab) -> int:
    tokenizer = AutoTokenizer.from_pretrained(lab.folder / "data" / "tokenizer")
    return MobileLLMForCausalLM(MobileLLMConfig(vocab_size=len(tokenizer), **STUDENT)).num_parameters()


def build_once(lab: Lab, data: Path) -> None:
    """Raises a ValueError if the folder was made of other data, or for other steps, seeds or shapes."""
    marker, digest = lab.folder / "made_of.yaml", hashlib.sha256()
    for name in FILES:
        digest.update((data / name).read_bytes())
    made_of = {"data": digest.hexdigest(), **dataclasses.asdict(lab.scale), "student": STUDENT, "teacher": TEACHER}
    if not marker.exists():
        with lab.console.status("data"):
            build_data(data, lab.folder / "data")
        marker.write_text(yaml.safe_dump(made_of))
    before = yaml.safe_load(marker.read_text())
    if other := [
        f"{name} {before.get(name)}, not {value}" for name, value in made_of.items() if before.get(name) != value
    ]:
        raise ValueError(f"{lab.folder} was made with other settings ({', '.join(other)}): take another --folder")


def find_out(lab: Lab, name: str) -> Finding:
    """What cannot be done, such as weights where no source helps, is an outcome, too."""
    try:
        return CLAIMS[name](lab)
    except (ValueError, RuntimeError, OSError) as error:
        return Finding(name, "", "", NOT_DONE, str(error))


def main() -> None:
    args, console = parse_args(), Console()
    scale = Scale(steps=args.steps, audit_steps=args.audit_steps, seeds=args.seeds)
    lab = Lab(args.folder.resolve(), scale, args.processes, console)
    try:
        check_folder(args.data)
        lab.folder.mkdir(parents=True, exist_ok=True)
        build_once(lab, args.data)
        findings = []
        for name in args.only:
            findings.append(find_out(lab, name))
            show(findings[-1], console)
    except KeyboardInterrupt:
        raise SystemExit("interrupted: the same command goes on where it stopped") from None
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    console.print(machine())
    if args.page:
        head = HEAD.format(
            parameters=f"{parameters(lab):,} parameters", tokens=args.steps * 1024,
            audited=args.audit_steps * 1024, date=date.today().isoformat(), processes=args.processes,
            machine=machine().replace(f", {torch.get_num_threads()} threads", ""),
        )  # fmt: skip
        args.page.parent.mkdir(parents=True, exist_ok=True)
        args.page.write_text(page(findings, head, args.page.parent))
        console.print(f"{args.page}: written")
    if any(finding.outcome == NOT_DONE for finding in findings):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
