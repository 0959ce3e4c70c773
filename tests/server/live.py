"""A server process for tests, on real ports: the front-end with a fake engine, or `graft serve` as it is."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from runtime.env import child_environment
from runtime.pb.fmaas import generation_pb2 as pb
from runtime.pb.fmaas.generation_pb2_grpc import GenerationServiceStub
from runtime.pb.graft.admin.v1.adapters_pb2_grpc import AdapterServiceStub
from runtime.pb.graft.admin.v1.server_pb2_grpc import ServerServiceStub

REPOSITORY = Path(__file__).resolve().parents[2]
DEMO_MODEL = REPOSITORY / "runtime" / "demo" / "model"
READY = re.compile(r"ready: grpc (\S+), admin (\S+), http (\S+)")


class LiveServer:
    """Start with `with`; leaving it ends the process."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=REPOSITORY
        )
        self.errors: list[str] = []
        self._error_reader = threading.Thread(target=self._read_errors, daemon=True)
        self._error_reader.start()

    @classmethod
    def fake(
        cls, adapters_root: Path, *settings: str, step_seconds: float = 0.0, wait_seconds: float = 0.0
    ) -> LiveServer:
        """The real front-end with an engine that echoes.

        Each of its steps takes `step_seconds`; it says that a new request waits `wait_seconds` for each that runs.
        """
        script = str(REPOSITORY / "tests" / "server" / "serve_fake.py")
        environment = {**child_environment(), "FAKE_STEP_SECONDS": str(step_seconds)}
        environment["FAKE_WAIT_SECONDS"] = str(wait_seconds)
        environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), environment["PYTHONPATH"]])
        return cls([sys.executable, script, str(DEMO_MODEL), str(adapters_root), *settings], environment)

    @classmethod
    def demo(cls, adapters_root: Path, *flags: str) -> LiveServer:
        """`graft serve` with the bundled model."""
        ports = ("--grpc-port", "0", "--admin-port", "0", "--http-port", "0")
        command = ["-m", "runtime.cli", "serve", str(DEMO_MODEL), "--adapters-root", str(adapters_root), *ports]
        return cls([sys.executable, *command, "--drain-delay", "0", *flags], child_environment())

    def __enter__(self) -> LiveServer:
        match = READY.match(self.process.stdout.readline())
        if match is None:
            self.process.wait(20)
            self._error_reader.join(5)
            raise RuntimeError("the server did not start:\n" + "".join(self.errors))
        self.address, self.admin_address, self.http_address = match.groups()
        self.channel = grpc.insecure_channel(self.address)
        self.admin_channel = grpc.insecure_channel(self.admin_address)
        self.generation = GenerationServiceStub(self.channel)
        self.adapters = AdapterServiceStub(self.admin_channel)
        self.admin = ServerServiceStub(self.admin_channel)
        return self

    def __exit__(self, *exc: object) -> None:
        self.channel.close()
        self.admin_channel.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        self._error_reader.join(5)
        self.process.stderr.close()

    def _read_errors(self) -> None:
        self.errors.extend(self.process.stderr)

    def generate(self, text: str, adapter: str | None = None, **params: object) -> pb.GenerationResponse:
        """One request through Generate; `params` are fields of Parameters, or dicts for its sub-messages."""
        request = pb.BatchedGenerationRequest(
            adapter_id=adapter, requests=[pb.GenerationRequest(text=text)], params=pb.Parameters(**params)
        )
        return self.generation.Generate(request, timeout=20).responses[0]

    def stream(self, text: str, adapter: str | None = None, **params: object) -> grpc.Call:
        """One request through GenerateStream."""
        request = pb.SingleGenerationRequest(
            adapter_id=adapter, request=pb.GenerationRequest(text=text), params=pb.Parameters(**params)
        )
        return self.generation.GenerateStream(request, timeout=20)

    def get(self, path: str) -> tuple[int, str]:
        """Status and body of an HTTP GET."""
        try:
            with urllib.request.urlopen(f"http://{self.http_address}{path}", timeout=5) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def metric(self, series: str) -> float:
        """The sum of all series whose line begins so, for instance `graft_requests_running`."""
        _, body = self.get("/metrics")
        return sum(float(line.rsplit(" ", 1)[1]) for line in body.splitlines() if line.startswith(series))


def refused(call: Callable[[], object]) -> tuple[grpc.StatusCode, str, str]:
    """Code, reason and field of a call that fails."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    reason = field = ""
    for detail in rpc_status.from_call(caught.value).details:
        info, request = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
        if detail.Unpack(info):
            reason = info.reason
        elif detail.Unpack(request):
            field = request.field_violations[0].field
    return caught.value.code(), reason, field


def eventually(condition: Callable[[], bool], seconds: float = 3.0) -> bool:
    """Whether the condition comes true in time."""
    end = time.monotonic() + seconds
    while not (held := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return held


def health(channel: grpc.Channel, service: str) -> int:
    """SERVING or NOT_SERVING."""
    return health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service), timeout=5).status
