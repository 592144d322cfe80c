"""A whole cluster on one Linux machine: a Ray head, nodes, an S3 endpoint, an MLflow server, and Prometheus where it is
installed. For trying, docs and tests.

    python cluster/local.py --nodes 2                # stays in the foreground; Ctrl-C stops everything
    source runs/cluster/env.sh                       # in another terminal
    threestage run CONFIG --out s3://bucket/run

Every node is a `ray start` of its own with an address of its own: on the loopback network or, with --namespaces, in a
network namespace, whose link can be cut. CPUs are logical: they bound what Ray places there, not what the machine has.
Every client of Ray needs the token in FOLDER/token. Logs are in FOLDER/logs, Ray's own too when the cluster has stopped.

Nothing outlives the cluster, however this process ends (kill -9 too): whatever is made is told to a process of its own,
the guard, which undoes it when its pipe closes. `ray stop` is never called: it acts on the whole machine.
"""

import argparse
import contextlib
import fcntl
import json
import os
import random
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple
from urllib.request import ProxyHandler, Request, build_opener

BUCKET = "bucket"
START_LIMIT_S = 120
CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
HEAD_SETTINGS = {  # a lost node is noticed after 3 s
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}
NO_NAMES = {"RES_OPTIONS": "timeout:1 attempts:1"}  # no name server knows the namespaces' addresses; gloo asks for each

Environment = Mapping[str, str]


# Processes. Each command is a session: all that it starts is found by it.


def members(sessions: set[int]) -> set[int]:
    """The living processes of these sessions and all their children (a Ray job has a session of its own)."""
    living = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent, _, session = file.read_text(errors="replace").rpartition(")")[2].split()[:4]
            if state not in "ZX":
                living[int(file.parent.name)] = int(parent), int(session)
    found = {pid for pid, (_, session) in living.items() if session in sessions}
    while children := {pid for pid, (parent, _) in living.items() if parent in found} - found:
        found |= children
    return found


def send(sessions: set[int], number: signal.Signals) -> None:
    """A signal to every process of these sessions."""
    for pid in members(sessions):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def kill(sessions: set[int], limit_s: float = 20) -> None:
    """SIGKILL to every process of these sessions; returns when none is left. Raises TimeoutError."""
    deadline = time.monotonic() + limit_s
    while remaining := members(sessions):
        if time.monotonic() > deadline:
            raise TimeoutError(f"processes {sorted(remaining)} still live {limit_s} s after SIGKILL")
        send(sessions, signal.SIGKILL)
        time.sleep(0.02)


class Guard:
    """Starts commands, and a process that hears of everything made and undoes it when this process closes or dies."""

    def __init__(self, folder: Path) -> None:
        """Raises RuntimeError when another cluster holds the folder."""
        self.folder = folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        (folder / "logs").mkdir(mode=0o700, exist_ok=True)
        (folder / "logs").chmod(0o700)  # Ray's own logs, which move there, may be written by all
        command = [sys.executable, __file__, "--undo", "--folder", str(folder)]
        read, self._pipe = os.pipe()
        with open(read) as pipe, open(folder / "lock", "w") as lock:
            try:  # the guard inherits the lock and holds it until everything is undone
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(self._pipe)
                raise RuntimeError(f"{folder} belongs to a running cluster: choose another folder") from None
            self._undo = subprocess.Popen(command, stdin=pipe, pass_fds=[lock.fileno()], start_new_session=True)
        self._started: list[subprocess.Popen[bytes]] = []
        # A short path: that of a socket in it has 107 bytes at most.
        self.ray_folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
        self.note("folder", self.ray_folder)

    def note(self, kind: str, name: object) -> None:
        """Have a "session", "namespace", "link" or "folder" undone in the end."""
        os.write(self._pipe, f"{kind} {name}\n".encode())

    def start(self, command: list[str], environment: Environment, log: Path) -> int:
        """Start a session, which notes itself and then becomes the command. Returns its process id.

        The process is reaped in `close` and not before, so that until then no other process gets its id.
        """
        become = ["sh", "-c", 'echo session $$ >&0; exec "$@" </dev/null', "sh", *command]
        with open(log, "ab") as out:
            process = subprocess.Popen(become, 0, None, self._pipe, out, out, env=environment, start_new_session=True)
        self._started.append(process)
        return process.pid

    def close(self) -> None:
        """Undo everything. Raises RuntimeError when the guard could not."""
        os.close(self._pipe)
        if self._undo.wait():
            raise RuntimeError(f"{self.folder}: the cluster was not stopped completely; see the error above")
        for process in self._started:
            process.wait()


def undo(folder: Path) -> None:
    """The guard's work: read what is made until the pipe closes, then undo it. Ray's logs move to `folder`/logs."""
    made: dict[str, list[str]] = {"session": [], "namespace": [], "link": [], "folder": []}
    for line in sys.stdin:
        kind, name = line.rstrip("\n").split(" ", 1)
        made[kind].append(name)
    kill({int(pid) for pid in made["session"]})
    for name in made["link"]:
        ip("link", "delete", name, check=False)
    for name in made["namespace"]:
        ip("netns", "delete", name, check=False)
    for name in made["folder"]:
        for logs in Path(name).glob("*/session_[0-9]*/logs"):
            kept = folder / "logs" / logs.parts[-3]
            shutil.rmtree(kept, ignore_errors=True)
            shutil.move(logs, kept)
        shutil.rmtree(name)
    for secret in ("env.sh", "token"):
        (folder / secret).unlink(missing_ok=True)


# Networks. The head is node 0.


class Place(NamedTuple):
    """Where a node runs: its address, the start of its command, its environment, the name of its link."""

    ip: str
    enter: list[str]
    environment: Environment
    link: str = ""


class Loopback:
    """Each node has an address of its own in 127.0.0.0/8: two nodes on one address look like one to Ray Train."""

    services_ip = "127.0.0.1"

    def __init__(self) -> None:
        self._prefix = f"127.77.{random.randrange(1, 255)}"

    def place(self, number: int) -> Place:
        return Place(f"{self._prefix}.{number + 1}", [], {})


class Namespaces:
    """Each node has a namespace with an address of its own on a bridge; head, S3 and MLflow have the bridge's address."""

    def __init__(self, guard: Guard) -> None:
        """Raises RuntimeError where the system does not allow it."""
        if not namespaces_allowed():
            raise RuntimeError("network namespaces need root and the `ip` of iproute2")
        self._guard = guard
        number = next(n for n in range(1, 255) if ip("link", "add", f"ts{n}", "type", "bridge", check=False))
        self._bridge, self._prefix, self.services_ip = f"ts{number}", f"10.77.{number}", f"10.77.{number}.1"
        guard.note("link", self._bridge)
        ip("address", "add", f"{self.services_ip}/24", "dev", self._bridge)
        ip("link", "set", self._bridge, "up")

    def place(self, number: int) -> Place:
        """Makes the node's namespace and its link."""
        if number == 0:
            return Place(self.services_ip, [], {"GLOO_SOCKET_IFNAME": self._bridge, **NO_NAMES})
        address, name = f"{self._prefix}.{number + 1}", f"{self._bridge}n{number}"
        self._guard.note("namespace", name)
        self._guard.note("link", name)
        ip("netns", "add", name)
        ip("link", "add", name, "master", self._bridge, "type", "veth", "peer", "name", "eth0", "netns", name)
        ip("link", "set", name, "up")
        ip("-n", name, "link", "set", "lo", "up")
        ip("-n", name, "link", "set", "eth0", "up")
        ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
        ip("-n", name, "route", "add", "default", "via", self.services_ip)
        return Place(address, ["ip", "netns", "exec", name], {"GLOO_SOCKET_IFNAME": "eth0", **NO_NAMES}, name)


def ip(*words: str, check: bool = True) -> bool:
    """Run an `ip` command: whether it succeeded. With `check`, raises RuntimeError with its message when it did not."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if check and done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.returncode == 0


def namespaces_allowed() -> bool:
    """Whether this process may make network namespaces and links: makes one of each and removes them."""
    name = f"ts-{os.getpid()}"
    if not shutil.which("ip") or not ip("netns", "add", name, check=False):
        return False
    allowed = ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name, check=False)
    ip("netns", "delete", name, check=False)
    return allowed


def free_port(address: str) -> int:
    """A TCP port that is free on this address now."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


def accepts(address: str, port: int) -> bool:
    """Whether something listens there."""
    with socket.socket() as probe:
        return probe.connect_ex((address, port)) == 0


# The parts of a cluster.


class Part:
    """A command and all that it starts; `pid` is the command's. Its output is in FOLDER/logs/NAME.log."""

    def __init__(self, guard: Guard, name: str, command: list[str], environment: Environment) -> None:
        self.name = name
        self.log = guard.folder / "logs" / f"{name}.log"
        self.log.unlink(missing_ok=True)
        self._launch = lambda: guard.start(command, environment, self.log)
        self.pid = self._launch()

    def alive(self) -> bool:
        """Whether any process of it lives."""
        return bool(members({self.pid}))

    def kill(self) -> None:
        """SIGKILL to all of it at once, like a machine that loses its power."""
        kill({self.pid})

    def wait_for(self, ready: Callable[[], bool]) -> None:
        """Raises RuntimeError with the end of the log when it ends before it is ready or takes more than two minutes."""
        deadline = time.monotonic() + START_LIMIT_S
        while not ready():
            if not self.alive() or time.monotonic() > deadline:
                end = self.log.read_text(errors="replace")[-2000:]
                raise RuntimeError(f"{self.name} did not start; the end of {self.log}:\n{end}")
            time.sleep(0.1)


class Server(Part):
    """The S3 endpoint or the MLflow server. The request `probe` succeeds as soon as it can be used."""

    def __init__(self, guard: Guard, name: str, probe: Request, command: list[str], environment: Environment) -> None:
        super().__init__(guard, name, command, environment)
        self._probe = probe
        self.url = f"http://{probe.host}"

    def wait(self) -> None:
        """Returns when it can be used."""
        self.wait_for(self._answers)

    def start(self) -> None:
        """Again after `kill`, on the same port. MLflow keeps its runs; the S3 endpoint forgot all and has an empty bucket."""
        self.pid = self._launch()
        self.wait()

    def pause(self) -> None:
        """SIGSTOP: it accepts connections and does not answer."""
        send({self.pid}, signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        send({self.pid}, signal.SIGCONT)

    def _answers(self) -> bool:
        try:
            build_opener(ProxyHandler({})).open(self._probe, timeout=5).close()
        except OSError:
            return False
        return True


class Node(Part):
    """A Ray node: `pid` is that of its `ray start`, `node_id` Ray's hexadecimal id."""

    def __init__(self, guard: Guard, name: str, place: Place, options: list[str], environment: Environment) -> None:
        self.ip, self._link, self.node_id = place.ip, place.link, ""
        start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--node-ip-address={place.ip}"]
        # A folder each: nodes that start at once would choose the same sockets. Port 0: one that is free.
        start += [f"--temp-dir={guard.ray_folder / name}", "--dashboard-agent-listen-port=0"]
        super().__init__(guard, name, [*place.enter, *start, *options], {**environment, **place.environment})

    def wait(self) -> None:
        """Returns when the head knows it."""
        self.wait_for(lambda: "Ray runtime started." in self.log.read_text(errors="replace"))
        for pid in members({self.pid}):
            with contextlib.suppress(OSError):
                for word in Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0"):
                    if word.startswith("--node_id="):
                        self.node_id = word.removeprefix("--node_id=")

    def preempt(self) -> None:
        """SIGTERM, without waiting: Ray drains it until idle, at most RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S (30) seconds."""
        os.kill(self.pid, signal.SIGTERM)

    def cut(self) -> None:
        """Take its link down; with namespaces only."""
        ip("link", "set", self._link, "down")

    def mend(self) -> None:
        """Take its link up. A node that was taken for dead meanwhile ends itself when it hears so."""
        ip("link", "set", self._link, "up")


class Cluster:
    """What `local_cluster` yields. `environment` is what a driver needs; servers that were not started are None."""

    head: Node
    s3: Server | None = None
    mlflow: Server | None = None
    prometheus: Server | None = None

    def __init__(self, guard: Guard, network: Loopback | Namespaces, options: list[str]) -> None:
        token = guard.folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        self.nodes: list[Node] = []
        self.environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        self.environment["AWS_REQUEST_CHECKSUM_CALCULATION"] = "when_required"  # stores other than AWS want it
        self._guard, self._network, self._ray_options = guard, network, options

    def launch_s3(self) -> None:
        """An S3 endpoint that keeps everything in memory, takes any credentials and has one bucket (s3.py)."""
        host = self._network.services_ip
        port = free_port(host)
        self.environment |= s3_environment(f"http://{host}:{port}", dict.fromkeys(CREDENTIALS, "local"))
        command = [sys.executable, str(Path(__file__).with_name("s3.py")), host, str(port)]
        probe = Request(f"http://{host}:{port}/{BUCKET}", method="PUT")
        self.s3 = Server(self._guard, "s3", probe, command, self._inherited())

    def launch_mlflow(self) -> None:
        """MLflow, with its database in the folder and its artifacts on the S3 endpoint."""
        host = self._network.services_ip
        port = free_port(host)
        self.environment["MLFLOW_TRACKING_URI"] = f"http://{host}:{port}"
        command = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{self._guard.folder}/mlflow.db"]
        command += ["--artifacts-destination", f"s3://{BUCKET}/mlflow"]
        environment = {**self._inherited(), "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        self.mlflow = Server(self._guard, "mlflow", Request(f"http://{host}:{port}/health"), command, environment)

    def start_prometheus(self) -> None:
        """Prometheus, where it is installed: reads all nodes' metrics, with the alert rules of kuberay/components/monitoring.
        Returns when it can be used."""
        program = shutil.which("prometheus")
        if program is None:
            return
        import yaml

        folder, host = self._guard.folder / "prometheus", self._network.services_ip
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700)
        alerts = Path(__file__).parent / "kuberay" / "components" / "monitoring" / "alerts.yaml"
        (folder / "alerts.yml").write_text(yaml.safe_dump(yaml.safe_load(alerts.read_text())["spec"]))
        nodes = self._guard.ray_folder / self.head.name / "prom_metrics_service_discovery.json"
        jobs = [{"job_name": "ray", "file_sd_configs": [{"files": [str(nodes)]}]}]
        settings = {"global": {"scrape_interval": "5s"}, "rule_files": ["alerts.yml"], "scrape_configs": jobs}
        (folder / "prometheus.yml").write_text(yaml.safe_dump(settings))
        address = f"{host}:{free_port(host)}"
        command = [program, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
        command += [f"--web.listen-address={address}"]
        probe = Request(f"http://{address}/-/ready")
        self.prometheus = Server(self._guard, "prometheus", probe, command, self._inherited())
        self.prometheus.wait()

    def launch_head(self, cpus: int, environment: Environment) -> None:
        """The head. Its dashboard stays on: without it a killed controller of Ray Train leaks its workers."""
        place, host = self._network.place(0), self._network.services_ip
        port, dashboard_port = free_port(place.ip), free_port(host)
        options = ["--head", f"--port={port}", f"--ray-client-server-port={free_port(place.ip)}", f"--num-cpus={cpus}"]
        options += [f"--dashboard-host={host}", f"--dashboard-port={dashboard_port}", *self._ray_options]
        self.head = Node(self._guard, "head", place, options, {**self._inherited(), **HEAD_SETTINGS, **environment})
        self.environment["RAY_ADDRESS"] = f"{place.ip}:{port}"
        self.environment["RAY_API_SERVER_ADDRESS"] = f"http://{host}:{dashboard_port}"
        self.head.wait_for(lambda: accepts(place.ip, port))

    def launch_nodes(self, count: int, cpus: int, environment: Environment) -> None:
        """The first nodes; `add_node` starts more of the same."""
        self._node_options = [f"--address={self.environment['RAY_ADDRESS']}", f"--num-cpus={cpus}", *self._ray_options]
        self._node_environment = {**self._inherited(), **environment}
        for _ in range(count):
            self._launch_node()

    def add_node(self) -> Node:
        """One more node, or a replacement of a lost one. Returns when it can be used."""
        self._launch_node()
        self.nodes[-1].wait()
        return self.nodes[-1]

    def _launch_node(self) -> None:
        number = len(self.nodes) + 1
        place = self._network.place(number)
        self.nodes.append(Node(self._guard, f"node{number}", place, self._node_options, self._node_environment))

    def _inherited(self) -> Environment:
        """The environment of the cluster's processes: what this process has, less what belongs to another cluster."""
        inherited = dict(os.environ)
        for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN"):
            inherited.pop(name, None)
        path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}"  # `python` in a job is this one
        settings = {"PATH": path, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
        return inherited | settings | self.environment


def split_cpus(cpus: int, nodes: int) -> tuple[int, int]:
    """CPUs of the head and of each node: the nodes' shares are even, the head has 1 and what is left over."""
    if nodes < 1 or cpus <= nodes:
        raise ValueError(f"{cpus} CPUs and {nodes} nodes: at least 1 node, and 1 CPU for each node and for the head")
    each = (cpus - 1) // nodes
    return cpus - each * nodes, each


def s3_environment(url: str, credentials: Environment) -> dict[str, str]:
    """What a process needs to use an endpoint: Ray, s3fs and MLflow read different names."""
    addresses = dict.fromkeys(("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "MLFLOW_S3_ENDPOINT_URL"), url)
    return addresses | {"AWS_REGION": os.environ.get("AWS_REGION", "us-east-1"), **credentials}


@contextlib.contextmanager
def local_cluster(
    folder: Path | str,
    nodes: int = 2,
    cpus: int = 8,
    namespaces: bool = False,
    s3: Environment | None = None,
    mlflow: bool = True,
    head_environment: Environment | None = None,
    node_environment: Environment | None = None,
    object_store_mb: int = 200,
    resources: Mapping[str, float] | None = None,
) -> Iterator[Cluster]:
    """A cluster for as long as the context is open.

    `cpus` are the logical CPUs of head and nodes together; `s3` is the environment of an endpoint to use in place of one
    of its own; `head_environment` and `node_environment` are added to what those processes have; the object store and
    `resources`, in names of one's own, are those of each node. Raises ValueError for impossible numbers, RuntimeError
    with the end of its log for what did not start.
    """
    head_cpus, node_cpus = split_cpus(cpus, nodes)
    with contextlib.closing(Guard(Path(folder).resolve())) as guard:
        network = Namespaces(guard) if namespaces else Loopback()
        options = [f"--object-store-memory={object_store_mb * 1_000_000}", f"--resources={json.dumps(resources or {})}"]
        cluster = Cluster(guard, network, options)
        if s3 is None:
            cluster.launch_s3()
        else:
            cluster.environment |= s3
        if mlflow:
            cluster.launch_mlflow()
        cluster.launch_head(head_cpus, head_environment or {})
        cluster.launch_nodes(nodes, node_cpus, node_environment or {})
        for part in (cluster.s3, cluster.mlflow, cluster.head, *cluster.nodes):
            if part:
                part.wait()
        yield cluster


# The command line.


def announce(cluster: Cluster, file: Path) -> None:
    """Write the variables of a driver to `file`, and print what runs and which variables these are, without secrets."""
    file.touch(mode=0o600)
    file.write_text("".join(f"export {name}={shlex.quote(value)}\n" for name, value in cluster.environment.items()))
    for node in (cluster.head, *cluster.nodes):
        print(f"{node.name:8}{node.ip:16}process {node.pid}, Ray's id {node.node_id}")
    if cluster.prometheus:
        print(f"Prometheus: {cluster.prometheus.url}")
    print(f"Ready; Ctrl-C stops everything. In another terminal: source {file}, which sets")
    for name, value in cluster.environment.items():
        print(f"    {name}={'…' if name in CREDENTIALS else value}")
    sys.stdout.flush()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=2, help="nodes beside the head (default: 2)")
    parser.add_argument("--cpus", type=int, default=8, help="logical CPUs of all together (default: 8)")
    parser.add_argument(
        "--folder", default="runs/cluster", help="token, logs, MLflow's database (default: runs/cluster)"
    )
    parser.add_argument("--namespaces", action="store_true", help="a network namespace for each node; needs root")
    own = f"use this endpoint, with the {' and '.join(CREDENTIALS)} of the environment; MLflow's artifacts go to its bucket "
    own += f"`{BUCKET}` (default: start one, which has that bucket and forgets everything when it stops)"
    parser.add_argument("--s3", metavar="URL", help=own)
    parser.add_argument("--no-mlflow", action="store_true", help="start no MLflow server")
    parser.add_argument("--undo", action="store_true", help=argparse.SUPPRESS)  # be the guard
    return parser.parse_args()


def stop(*_: object) -> None:
    """Leave on the first signal; the next ones do not disturb the stopping, which takes 20 s at most."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    sys.exit()


def main() -> None:
    given = arguments()
    if given.undo:
        return undo(Path(given.folder))
    if given.s3 and not all(name in os.environ for name in CREDENTIALS):
        sys.exit(f"error: --s3 needs {' and '.join(CREDENTIALS)} in the environment")
    s3 = s3_environment(given.s3, {name: os.environ[name] for name in CREDENTIALS}) if given.s3 else None
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        with local_cluster(given.folder, given.nodes, given.cpus, given.namespaces, s3, not given.no_mlflow) as cluster:
            cluster.start_prometheus()
            announce(cluster, Path(given.folder, "env.sh"))
            signal.pause()
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
