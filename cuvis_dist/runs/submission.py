"""How does a command become a job of a cluster, followed to its end and its exit code?

``ray job submit`` ends with 1 whatever the job's own exit code, and with 0 when the job was
stopped: hence Ray's client for jobs, which knows.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cuvis_dist.errors import INTERRUPTED, ClusterError, InputError, one_line
from cuvis_dist.waiting import announce

#: Where a head node on this machine, or a port forwarded to one, answers.
DEFAULT_ADDRESS = "http://127.0.0.1:8265"
#: Seconds that a stopped job gets to write what is done; Ray's own default is 3.
STOP_WAIT_S = 60


@dataclass(frozen=True)
class Submission:
    """A ``cuvis-dist`` command to run on a cluster.

    Attributes
    ----------
    command : sequence of str
        Arguments of ``cuvis-dist``, e.g. ``("run", "trainrun.yaml")``.
    address : str
        The head node's dashboard, ``http://host:port``.
    working_dir : Path or None
        Folder to upload and to run in; None: the job's paths are the cluster's.
    """

    command: Sequence[str]
    address: str = field(
        default_factory=lambda: os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS
    )
    working_dir: Path | None = None
    submission_id: str = field(default_factory=lambda: f"cuvis-dist-{secrets.token_hex(4)}")

    def __post_init__(self) -> None:
        if not self.address.startswith(("http://", "https://")):
            raise InputError(
                f"jobs are submitted to a dashboard, http://host:8265, not to {self.address!r}"
            )
        if self.working_dir is not None and not self.working_dir.is_dir():
            raise InputError(f"the folder to upload is not there: {self.working_dir}")

    @property
    def entrypoint(self) -> str:
        """The shell command that the cluster runs."""
        return shlex.join(["python", "-m", "cuvis_dist.cli", *self.command])

    @property
    def runtime_env(self) -> dict[str, Any]:
        """Ray's description of the job's environment."""
        environment: dict[str, Any] = {
            "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)},
        }
        if self.working_dir is not None:
            environment["working_dir"] = str(self.working_dir)
        return environment

    def as_ray_command(self) -> str:
        """Return the ``ray job submit`` that does the same."""
        environment = self.runtime_env
        words = ["ray", "job", "submit", "--address", self.address]
        words += ["--submission-id", self.submission_id]
        if "working_dir" in environment:
            words += ["--working-dir", environment.pop("working_dir")]
        words += ["--runtime-env-json", json.dumps(environment)]
        return f"{shlex.join([*words, '--'])} {self.entrypoint}"


def submit(
    submission: Submission,
    follow: bool = True,
    show: Callable[[str], object] = lambda text: print(text, end="", flush=True),
) -> int:
    """Submit a job, print its log as it comes, and return its exit code.

    Ctrl-C stops following, not the job.

    Parameters
    ----------
    submission : Submission
        What to submit, and where.
    follow : bool
        Wait for the job to end.
    show : callable
        Where the job's log goes, and what there is to say about it; printed by default.

    Returns
    -------
    int
        The job's exit code, which is 130 when it was stopped. Without ``follow`` it is 0 once the
        job is submitted.

    Raises
    ------
    ClusterError
        If the cluster is not reached, refuses the token or lost the job.
    """
    announce(f"submitting to {submission.address}")
    from ray.job_submission import JobStatus, JobSubmissionClient

    try:
        client = JobSubmissionClient(submission.address)
        client.submit_job(
            entrypoint=submission.entrypoint,
            submission_id=submission.submission_id,
            runtime_env=submission.runtime_env,
        )
    except Exception as error:
        raise ClusterError(
            f"the cluster at {submission.address} did not take the job: {one_line(error)}. Check "
            "the address and, for token authentication, RAY_AUTH_MODE=token and the token in "
            "~/.ray/auth_token, RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN"
        ) from error
    job, to = submission.submission_id, f"--address {submission.address}"
    if not follow:
        show(f"submitted {job}; follow it with: ray job logs {to} --follow {job}\n")
        return 0
    try:
        announce("waiting for the job's log")
        asyncio.run(_show_log(client, job, show))
        info = client.get_job_info(job)
        while not info.status.is_terminal():  # the log ends a moment before the job
            time.sleep(0.5)
            info = client.get_job_info(job)
    except KeyboardInterrupt:
        show(f"\n{job} goes on; to stop it: ray job stop {to} {job}\n")
        raise
    except Exception as error:
        raise ClusterError(
            f"the cluster at {submission.address} no longer answers: {one_line(error)}. What "
            f"became of {job}: ray job status {to} {job}"
        ) from error
    if info.status == JobStatus.STOPPED:
        return INTERRUPTED
    code = info.driver_exit_code
    if info.status == JobStatus.FAILED and (code is None or code < 0 or code == 137):
        raise ClusterError(f"{job} was lost or killed: {(info.message or 'no reason given')[:500]}")
    return code or 0


async def _show_log(client: Any, job: str, show: Callable[[str], object]) -> None:
    async for lines in client.tail_job_logs(job):
        show(lines)
