"""Archive jobs by Ray Jobs: what `POST /v1/jobs` starts is `jobs/restore.py`, as a person would submit it."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

from ldbfr.archive.run import read_standing
from ldbfr.errors import InputError, StorageError
from serve.jobs_protocol import JobNotFound, JobRequest, JobStatus
from serve.protocol import Overloaded

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

log = logging.getLogger(__name__)
Result = TypeVar("Result")

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPT = "jobs/restore.py"
STATES: dict[str, Literal["pending", "running", "succeeded", "failed", "cancelled"]] = {
    "PENDING": "pending",
    "RUNNING": "running",
    "SUCCEEDED": "succeeded",
    "FAILED": "failed",
    "STOPPED": "cancelled",
}
"""By Ray's names."""
ID = re.compile(r"restore-[0-9a-f]{16}")
"""Any other would be a path of Ray's own interface."""
MARK = "ldbfr-endpoint"
"""In a job's metadata: the endpoint that started it."""
THREADS = 4
CONNECT_SECONDS, ANSWER_SECONDS = 5.0, 30.0
"""In which the job server takes a connection, and says something."""
RETRY_SECONDS = 5.0
STOP_SECONDS, LOOK_SECONDS = 10.0, 0.25
EXIT_BAD_REQUEST = 2
"""Of jobs/restore.py: nothing was started, so what lies in the output is another run's."""


class RayJobs:
    """`serve.jobs_protocol.Jobs` on the cluster's job server.

    Args:
        address: of the job server, http://HOST:8265; found by Ray when left out.
        options: of jobs/restore.py for every job, such as ("--weights", "faces_64", "--workers", "1:4").
        script: jobs/restore.py, below the working directory or absolute.
        runtime_env: of every job.
        name: of the endpoint, whose jobs alone are shown; those of another on the same cluster are not.
        most_active: jobs that are not over; one that comes then is refused.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        options: Sequence[str] = (),
        script: str = SCRIPT,
        runtime_env: Mapping[str, Any] | None = None,
        name: str = "ldbfr",
        most_active: int = 16,
    ) -> None:
        self.address, self.options, self.script = address, tuple(options), script
        self.runtime_env, self.name, self.most_active = dict(runtime_env or {}), name, most_active
        self._client: JobSubmissionClient | None = None
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="jobs")  # Ray's client blocks
        self._looking = ThreadPoolExecutor(THREADS, thread_name_prefix="progress")  # a slow bucket holds up no job

    @classmethod
    def of_replica(cls, options: Sequence[str] = (), *, name: str = "ldbfr") -> Self:
        """Jobs that run the code which this replica of a deployment runs.

        Args:
            options: see above.
            name: see above.
        """
        import ray

        own = ray.get_runtime_context().runtime_env
        runtime_env = {key: own[key] for key in ("working_dir", "py_modules", "env_vars") if own.get(key)}
        if "working_dir" in runtime_env:
            return cls(options=options, runtime_env=runtime_env, name=name)
        # The code lies on each node, in its image.
        runtime_env["env_vars"] = {"PYTHONPATH": str(REPOSITORY), **runtime_env.get("env_vars", {})}
        return cls(options=options, script=str(REPOSITORY / SCRIPT), runtime_env=runtime_env, name=name)

    # ---- Jobs ----

    async def submit(self, request: JobRequest) -> JobStatus:
        """Start a job.

        Raises:
            Overloaded: there are too many, or the job server does not answer.
        """
        active = sum(STATES[one.status] in ("pending", "running") for one in await self._own_jobs())
        if active >= self.most_active:
            raise Overloaded(f"{active} jobs are pending or running, at most {self.most_active} may be", 60.0)
        id = f"restore-{secrets.token_hex(8)}"
        metadata = {MARK: self.name, **request.model_dump(mode="json")}
        try:
            await self._run(
                lambda client: client.submit_job(
                    entrypoint=self.entrypoint(request),
                    submission_id=id,
                    metadata=metadata,
                    runtime_env=dict(self.runtime_env),
                )
            )
        except Overloaded:
            if not await self._is_there(id):  # whoever is told that it is not begun may begin it once more
                raise
        log.info("job %s: %s to %s", id, request.input, request.output)
        return JobStatus(id=id, status="pending", input=request.input, output=request.output)

    async def get(self, id: str) -> JobStatus:
        """How a job stands, with its run's own account.

        Raises:
            JobNotFound: none of this endpoint's has this id.
            Overloaded: the job server does not answer.
        """
        details = await self._details(id)
        status = status_of(details)
        if details.driver_exit_code == EXIT_BAD_REQUEST or status.status == "pending":
            return status
        progress = await asyncio.get_running_loop().run_in_executor(self._looking, progress_of, status.output)
        return status.model_copy(update={"progress": progress})

    async def list(self) -> Sequence[JobStatus]:
        """This endpoint's jobs, the newest first, without their progress, which each has to be asked for.

        Raises:
            Overloaded: the job server does not answer.
        """
        jobs = await self._own_jobs()
        return [status_of(one) for one in sorted(jobs, key=lambda one: -(one.start_time or 0))]

    async def cancel(self, id: str) -> JobStatus:
        """Stop a job, and wait a little for its end; one that is over stays as it is.

        Raises:
            JobNotFound: none of this endpoint's has this id.
            Overloaded: the job server does not answer.
        """
        await self._details(id)
        await self._run(lambda client: client.stop_job(id))
        until = time.monotonic() + STOP_SECONDS
        while status_of(await self._details(id)).status in ("pending", "running") and time.monotonic() < until:
            await asyncio.sleep(LOOK_SECONDS)
        return await self.get(id)

    def close(self) -> None:
        """Begin nothing further; jobs go on."""
        for pool in (self._pool, self._looking):
            pool.shutdown(wait=False, cancel_futures=True)

    # ---- Ray ----

    def entrypoint(self, request: JobRequest) -> str:
        """The command of a job; Ray gives it to a shell, so every argument is quoted."""
        asked = ("--input", request.input, "--output", request.output)
        how = ("--faces", request.faces, "--format", request.format)
        return shlex.join(["python", self.script, *asked, *how, *self.options])

    async def _details(self, id: str) -> JobDetails:
        """What Ray knows of a job."""
        unknown = JobNotFound(f"there is no job {id[:64]!r}; GET /v1/jobs lists them")
        if not ID.fullmatch(id):
            raise unknown
        try:
            details = await self._run(lambda client: client.get_job_info(id))
        except NoSuchJobError:
            raise unknown from None
        if not self._is_own(details):
            raise unknown
        return details

    async def _is_there(self, id: str) -> bool:
        """Whether the job server has taken a job, although it did not say so."""
        try:
            await self._details(id)
        except (JobNotFound, Overloaded):
            return False
        return True

    async def _own_jobs(self) -> Sequence[JobDetails]:
        """Those that this endpoint started."""
        return [one for one in await self._run(lambda client: client.list_jobs()) if self._is_own(one)]

    def _is_own(self, details: JobDetails) -> bool:
        """Whether this endpoint started a job."""
        return (details.metadata or {}).get(MARK) == self.name and ID.fullmatch(details.submission_id or "") is not None

    async def _run(self, ask: Callable[[JobSubmissionClient], Result]) -> Result:
        """Ask the job server, in a thread.

        Raises:
            NoSuchJobError: it says so.
            Overloaded: it does not answer, or refuses.
        """
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._ask, ask)

    def _ask(self, ask: Callable[[JobSubmissionClient], Result]) -> Result:
        """The same, in this thread."""
        from ray.exceptions import AuthenticationError

        try:
            client = self._client = self._client or impatient_client()(self.address)
            return ask(client)
        except (RuntimeError, OSError, AuthenticationError) as error:  # from Ray's client; errors of HTTP are OSErrors
            if "status code 404" in str(error):
                raise NoSuchJobError from error
            self._client = None
            log.error("the job server of the Ray cluster: %s", error)
            raise Overloaded("the cluster's job server does not answer; ask again later", RETRY_SECONDS) from error


@cache
def impatient_client() -> type[JobSubmissionClient]:
    """Ray's client with time limits; it has none itself, and a job server that hangs would hold threads for ever."""
    from ray.job_submission import JobSubmissionClient

    class ImpatientClient(JobSubmissionClient):
        def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
            options.setdefault("timeout", (CONNECT_SECONDS, ANSWER_SECONDS))
            return super()._do_request(method, endpoint, **options)

    return ImpatientClient


class NoSuchJobError(Exception):
    """The job server does not know a job."""


def status_of(details: JobDetails) -> JobStatus:
    """How a job stands, as Ray has it."""
    metadata = details.metadata or {}
    return JobStatus(
        id=details.submission_id or "",
        status=STATES[details.status],
        input=metadata.get("input", ""),
        output=metadata.get("output", ""),
        message=message_of(details),
    )


def message_of(details: JobDetails) -> str:
    """Why a job failed: its own last word. The rest of its log is for the cluster's operator alone."""
    if STATES[details.status] != "failed":
        return ""
    own = re.findall(r"^restore: (.+)$", details.message or "", re.MULTILINE)
    if own:
        return str(own[-1])
    code = "" if details.driver_exit_code is None else f" with exit code {details.driver_exit_code}"
    return f"it ended{code}; the cluster's log of the job tells more"


def progress_of(output: str) -> dict[str, Any] | None:
    """The account that the run in an output gives of itself; None before it does."""
    try:
        standing = read_standing(output)
    except InputError:
        return None
    except (StorageError, ValueError) as error:
        log.warning("how far %s is cannot be read: %s", output, error)
        return None
    if standing.parts is None:
        return None
    done = standing.counts.plus(standing.recorded)
    return {
        "planned": standing.planned,
        "restored": done.restored,
        "failed": done.failed,
        "skipped": done.skipped,
        "line": standing.line,
    }
