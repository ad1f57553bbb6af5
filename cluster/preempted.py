"""Watch for the notice that a spot machine of AWS or GCP is about to go, and then drain its Ray node.

    python cluster/preempted.py aws

Runs beside Ray on every worker that the cluster launcher starts; on Kubernetes the preStop hook does its work.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

sys.path.insert(0, str(Path(__file__).resolve().parent))

import drain

METADATA = "http://169.254.169.254"
LOOK_SECONDS = 5.0
NOTICE_SECONDS = {"aws": 110, "gcp": 25}
"""What is left once the notice is seen: clouds give two minutes, and half a one."""


def main(arguments: list[str] | None = None) -> int:
    """Wait for the notice, and drain; the exit code."""
    parser = argparse.ArgumentParser(description="Drain this machine's Ray node when its cloud takes it away.")
    parser.add_argument("cloud", choices=sorted(NOTICE_SECONDS))
    request = parser.parse_args(arguments)
    metadata = os.environ.get("LDBFR_METADATA_SERVER", METADATA)
    notice = {"aws": aws_notice, "gcp": gcp_notice}[request.cloud]
    while not notice(metadata):
        time.sleep(LOOK_SECONDS)
    print(f"preempted: {request.cloud} takes this machine away", file=sys.stderr, flush=True)
    return drain.main(["--seconds", str(NOTICE_SECONDS[request.cloud])])


def aws_notice(metadata: str) -> bool:
    """Whether EC2 has announced an interruption (IMDSv2: a token first; 404 means that there is none)."""
    ask_token = Request(f"{metadata}/latest/api/token", method="PUT")
    ask_token.add_header("X-aws-ec2-metadata-token-ttl-seconds", "60")
    token = read(ask_token)
    if token is None:
        return False
    ask = Request(f"{metadata}/latest/meta-data/spot/instance-action")
    ask.add_header("X-aws-ec2-metadata-token", token)
    return read(ask) is not None


def gcp_notice(metadata: str) -> bool:
    """Whether Compute Engine has preempted this machine."""
    ask = Request(f"{metadata}/computeMetadata/v1/instance/preempted")
    ask.add_header("Metadata-Flavor", "Google")
    return read(ask) == "TRUE"


def read(request: Request) -> str | None:
    """The answer; None where there is none, or no server: the next look is in a few seconds."""
    try:
        with urlopen(request, timeout=2) as answer:
            text: str = answer.read().decode().strip()
            return text
    except HTTPError as error:
        error.close()
        return None
    except (URLError, TimeoutError, ConnectionError):
        return None


if __name__ == "__main__":
    sys.exit(main())
