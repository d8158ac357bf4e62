"""A release on the Hub: one commit on the stage's branch, on top of the commit that was looked at, and a tag.

    published = publish(release, private=True)
    published.commit, published.tag, published.is_new

A branch holds what was released and nothing else. It is wholly there or as it was: files are uploaded first, and
become visible by one commit, which the Hub refuses if the branch has moved meanwhile. The same call after any
interruption finishes what is left; if the branch has the files already, it makes no commit.

A branch is written to if it is new, if its last commit was made from here (`ledger.py`), or if the caller has named
that commit. Else it is reported, and left.
"""

from __future__ import annotations

import itertools
import json
import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.hf_api import RepoFile

from mobilellm_hf.hub.ledger import LEDGER, Ledger, same_tree
from mobilellm_hf.hub.package import Release
from mobilellm_hf.hub.stages import MAIN, Target

logger = logging.getLogger(__name__)

ATTRIBUTES = ".gitattributes"  # the Hub's own file, in every repository
PASSING = (408, 429, 500, 502, 503, 504)
STALE_PARENT = 412
# Of huggingface_hub: HTTPError is no answer, or the Hub's refusal; RuntimeError wraps one of an upload;
# JSONDecodeError is an answer that is no JSON, as gateways give.
FAILURES = (HTTPError, RuntimeError, json.JSONDecodeError)
LONGEST_WAIT = 300.0


class MovedBranchError(ValueError):
    """Somebody else has written to the branch."""


@dataclass(frozen=True)
class Published:
    """Where a release is.

    Attributes:
        is_new: whether a commit was made; False if the branch had these files already.
    """

    target: Target
    commit: str
    tag: str
    is_new: bool
    url: str


def publish(
    release: Release,
    *,
    private: bool = False,
    replace: str | None = None,
    tag: str | None = None,
    api: HfApi | None = None,
    attempts: int = 6,
    wait: Callable[[float], None] = time.sleep,
) -> Published:
    """Sends a release, or finishes sending it.

    Args:
        private: what the repository is if it is new.
        replace: the commit that a branch may be at although it was not made from here; 7 characters or more of it.
        tag: by default `STAGE-vN`, N counting the stage's releases.
        attempts: how often it is tried against failures that pass: no answer, a cut connection, 429 and 5xx. Between
            them it waits as long as the Hub says, or 1, 2, 4, ... seconds.
        wait: takes seconds.

    Raises:
        MovedBranchError: the branch is at a commit that was not made from here.
        ValueError: `private`, and the repository is public.
        HTTPError, JSONDecodeError: what stayed wrong after the last attempt, or will not pass.
    """
    api = api or HfApi()
    ledger = Ledger(release.folder / LEDGER, api.endpoint)
    for attempt in range(attempts):
        try:
            return _publish_once(api, release, ledger, private, replace, tag)
        except FAILURES as error:
            cause = _cause(error)
            seconds = _seconds_to_wait(cause, attempt)
            if seconds is None or attempt == attempts - 1:
                raise cause  # noqa: B904
            logger.warning("%s; trying again in %.0f s", _in_a_line(cause), seconds)
            wait(seconds)
    raise ValueError(f"attempts={attempts} must be 1 or more")


def _publish_once(
    api: HfApi, release: Release, ledger: Ledger, private: bool, replace: str | None, tag: str | None
) -> Published:
    target = release.target
    repo, branch, kind = target.repo, target.branch, target.repo_type
    url = api.create_repo(repo, repo_type=kind, private=private, exist_ok=True)
    if private and not api.repo_info(repo, repo_type=kind).private:
        raise ValueError(f"{repo} is public, and private is asked for: make it so on its page, or leave that out")
    head = _head(api, target, ledger)
    tree = remote_tree(api, target, head)
    wanted = {file.path: file.digests for file in release.files}
    if is_new := not same_tree(tree, wanted):
        if tree and not ledger.is_ours(repo, branch, head, tree) and not _is_named(head, replace):
            raise MovedBranchError(
                f"the branch {branch} of {repo} is at {head}, which was not released from {release.folder}: look at "
                f"it, and name it (replace: {head[:12]}) to release on top of it"
            )
        ledger.intend(repo, branch, wanted)
        operations = [CommitOperationAdd(file.path, file.source) for file in release.files]
        operations += [CommitOperationDelete(path, is_folder=False) for path in tree if path not in wanted]
        head = api.create_commit(
            repo, operations, commit_message=f"Release {target.stage}", repo_type=kind, revision=branch,
            parent_commit=head,
        ).oid  # fmt: skip
    ledger.record(repo, branch, head, wanted)
    return Published(target, head, _tag(api, target, head, tag), is_new, f"{url}/tree/{branch}")


def _is_named(head: str, replace: str | None) -> bool:
    return replace is not None and len(replace) >= 7 and head.startswith(replace)


def _head(api: HfApi, target: Target, ledger: Ledger) -> str:
    """The branch's commit. A branch that is not there is made first, from the repository's first commit."""
    branches = {ref.name: ref.target_commit for ref in _refs(api, target).branches}
    if target.branch not in branches:
        first = api.list_repo_commits(target.repo, repo_type=target.repo_type, revision=MAIN)[-1].commit_id
        api.create_branch(target.repo, branch=target.branch, revision=first, repo_type=target.repo_type, exist_ok=True)
        branches = {ref.name: ref.target_commit for ref in _refs(api, target).branches}
        if branches[target.branch] == first:  # which is not always empty: a history may have been squashed
            ledger.record(target.repo, target.branch, first, {})
    return branches[target.branch]


def _refs(api: HfApi, target: Target):
    return api.list_repo_refs(target.repo, repo_type=target.repo_type)


def remote_tree(api: HfApi, target: Target, revision: str) -> dict[str, str]:
    """path -> SHA-256 of a large file, git's SHA-1 of any other; without `.gitattributes`."""
    entries = api.list_repo_tree(target.repo, recursive=True, revision=revision, repo_type=target.repo_type)
    files = [entry for entry in entries if isinstance(entry, RepoFile) and entry.path != ATTRIBUTES]
    return {file.path: file.lfs.sha256 if file.lfs else file.blob_id for file in files}


def _tag(api: HfApi, target: Target, commit: str, given: str | None) -> str:
    """The tag of a commit, made if there is none. A given name that another commit has gets a number."""
    tags = {ref.name: ref.target_commit for ref in _refs(api, target).tags}
    pattern = target.tag_pattern() if given is None else re.compile(rf"{re.escape(given)}(-\d+)?")
    if mine := [name for name, at in tags.items() if at == commit and pattern.fullmatch(name)]:
        return mine[0]
    name = target.next_tag(tags) if given is None else given
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    name = next(name for name in names if name not in tags)
    api.create_tag(target.repo, tag=name, revision=commit, repo_type=target.repo_type)
    return name


def _cause(error: Exception) -> Exception:
    """What went wrong in an upload, which is done in a thread and raises a RuntimeError from it."""
    while isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def _seconds_to_wait(error: Exception, attempt: int) -> float | None:
    """How long to wait before another attempt; None if it would fail again."""
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status == STALE_PARENT:
            return 0.0  # the next attempt looks at the branch again
        if status not in PASSING:
            return None
        asked = error.response.headers.get("Retry-After", "")
        return min(LONGEST_WAIT, float(asked)) if asked.isdecimal() else 2.0**attempt
    return 2.0**attempt if isinstance(error, HTTPError | json.JSONDecodeError) else None


def _in_a_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__
