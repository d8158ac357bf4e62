# /// script
# dependencies = ["mobilellm_hf"]
# ///
"""Releases a stage to the Hub: model, card, results and the settings that made it, as one commit on its branch.

    python recipes/release.py --model runs/140M/midtrain-stage1/MobileLLM-R1-140M-midtrain-stage1 \\
        --repo org/MobileLLM-R1-140M-base --stage midtrain-stage1 --license apache-2.0 --dry-run
    python recipes/release.py --model runs/140M/midtrain/MobileLLM-R1-140M-base --stage on-device --pte runs/device \\
        --repo org/MobileLLM-R1-140M-base-ExecuTorch
    python recipes/release.py --data-set runs/curate --repo org/representative
    python recipes/release.py --verify org/MobileLLM-R1-140M-base@midtrain-stage1 --model runs/140M/...

A dry run needs no network: it writes MODEL-release/card.html, to be looked at, and lists what would be sent. A release
asks first whether the token may write, looks for secrets in every file, and runs the card's code. A second one with
nothing new makes no commit; a branch that somebody else has written to is reported and left. The token is the one of
`hf auth login` or HF_TOKEN.
"""

import json
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HTTPError
from rich.console import Console

from mobilellm_hf.hub.access import check_access
from mobilellm_hf.hub.arguments import ReleaseArguments
from mobilellm_hf.hub.collection import add_to_collection
from mobilellm_hf.hub.data_sets import package_data_set
from mobilellm_hf.hub.files import files_table
from mobilellm_hf.hub.package import Release, package_model
from mobilellm_hf.hub.releases import publish
from mobilellm_hf.hub.stages import Target, parse_target
from mobilellm_hf.hub.verification import verify
from mobilellm_hf.launch import launch


def run(args: ReleaseArguments, console: Console) -> None:
    args.check()
    try:
        if args.verify is not None:
            verify_release(args, console)
        else:
            release_stage(args, console)
    except (HTTPError, json.JSONDecodeError) as error:
        raise ValueError(f"{error}\nNothing is lost: the same command goes on") from error


def package(args: ReleaseArguments, target: Target) -> Release:
    if args.data_set is not None:
        return package_data_set(Path(args.data_set), target, license=args.license)
    return package_model(
        Path(args.model), target, evaluation=Path(args.evaluation) if args.evaluation else None,
        pte=Path(args.pte) if args.pte else None, llama4=args.llama4, license=args.license,
        base_model=args.base_model,
    )  # fmt: skip


def release_stage(args: ReleaseArguments, console: Console) -> None:
    api = HfApi()
    target = args.target(args.repo)
    release = package(args, target)
    if not args.dry_run:
        access = check_access(api, target.repo, target.repo_type, args.private)
        console.print(f"{api.endpoint}, {access}", markup=False, soft_wrap=True)
    if args.rehearses():
        release.refuse_leaks(get_token(), args.accept)  # before minutes are spent
        release.rehearse(lambda name: console.print(f"runs the card's block {name}", style="dim"))
        release = package(args, target)  # whose card says what was run
    page = release.write_preview()
    show(release, console)
    release.refuse_leaks(get_token(), args.accept)
    if args.dry_run:
        console.print(f"{page}: the card. Nothing was sent.", soft_wrap=True)
        return
    published = publish(release, private=args.private, replace=args.replace, api=api)
    done = "released" if published.is_new else "nothing new, no commit was made"
    console.print(f"{published.url}: {done}; commit {published.commit}, tag {published.tag}", soft_wrap=True)
    if args.collection is not None:
        url = add_to_collection(
            api, args.collection, target.repo, repo_type=target.repo_type, note=release.summary, private=args.private
        )
        console.print(f"{url}: the collection", soft_wrap=True)


def show(release: Release, console: Console) -> None:
    target = release.target
    console.print(files_table(release.files, release.left_out.items()))
    console.print(f"to {target.repo}, branch {target.branch}", markup=False, soft_wrap=True)
    if release.license is not None:
        console.print(f"licence: {release.license}", markup=False, soft_wrap=True)
    for source, license in release.licenses.items():
        console.print(f"licence of {source}: {license}", style="dim", markup=False, soft_wrap=True)
    for note in release.notes:
        console.print(f"note: {note}", style="yellow", markup=False, soft_wrap=True)


def verify_release(args: ReleaseArguments, console: Console) -> None:
    repo, revision, stage = parse_target(args.verify)
    known = Target(repo, stage) if stage else None
    release = None
    if args.model or args.data_set:
        known = args.target(repo, stage)
        release = package(args, known)
    report = verify(
        repo, revision, release, Path(args.model) if args.model else None, branch=known.branch if known else None,
        repo_type="dataset" if args.data_set else "model", say=lambda what: console.print(what, style="dim"),
    )  # fmt: skip
    console.print(report.table())
    if report.problems:
        raise ValueError(f"{args.verify} is not as it should be: {report.problems[0]}")


if __name__ == "__main__":
    launch(__doc__, (ReleaseArguments,), run)
