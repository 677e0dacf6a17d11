"""Several processes give what one does: calibration, evaluation, sweeps, training, after kills."""

from __future__ import annotations

import csv
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import PACKAGE, optional
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

from snnkernels import IFNode, cli, models
from snnkernels.conversion import QCFS, ConversionError, convert
from snnkernels.distributed import Split, evaluate, passes, shardable
from snnkernels.distributed.dealing import Dealt
from snnkernels.distributed.passes import Checkpoint, run
from snnkernels.distributed.team import Team, launched

JOBS = Path(__file__).with_name("distributed_jobs.py")
SECONDS = 300  # nothing hangs longer

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not hasattr(signal, "SIGKILL"),
    reason="torch.distributed and POSIX signals",
)


def environment(**more: Any) -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(PACKAGE.parent), os.environ.get("PYTHONPATH"))))
    own = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    more = {"PYTHONPATH": path, "OMP_NUM_THREADS": 1, "TQDM_DISABLE": 1, **more}
    return {**own, **{k: str(v) for k, v in more.items()}}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def launch(ranks: int, folder: Path, *jobs: str) -> list[int]:
    """Run the jobs in so many processes; their exit codes."""
    port, started = free_port(), []
    for rank in range(ranks):
        team = {"RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, str(JOBS), str(folder), *jobs]
        env = environment(**team if ranks > 1 else {})
        with (folder / f"log.{rank}").open("w") as log:
            started.append(subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd=folder))
    try:
        return [p.wait(SECONDS) for p in started]
    finally:
        for p in started:
            p.kill()
            p.wait()


def ran(ranks: int, folder: Path, *jobs: str) -> list[dict[str, Any]]:
    """What the jobs gave, by rank."""
    codes = launch(ranks, folder, *jobs)
    logs = "\n".join((folder / f"log.{r}").read_text()[-3000:] for r in range(ranks))
    assert codes == [0] * ranks, logs
    return [
        {job: torch.load(folder / f"{job}.{r}", weights_only=False) for job in jobs}
        for r in range(ranks)
    ]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    jobs = ("methods", "loaders", "other_calls", "resumed_calibration", "swept", "training")
    return ran(1, tmp_path_factory.mktemp("one"), *jobs)[0]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    jobs = ("methods", "loaders", "other_calls", "errors", "training", "streamed")
    return ran(2, tmp_path_factory.mktemp("two"), *jobs)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a sweep and a calibration of two ranks leave whose second rank was killed."""
    folder = tmp_path_factory.mktemp("killed")
    for job in ("killed_sweep", "killed_calibration"):
        first, second = launch(2, folder, job)
        assert second == -signal.SIGKILL
        assert first > 0  # it noticed, and did not wait
        assert not list(folder.glob(f"{job}.*"))
    return folder


@pytest.fixture(scope="module")
def four(killed: Path) -> list[dict[str, Any]]:
    with (killed / "sweep.csv").open(newline="") as file:
        assert {row["trial"] for row in csv.DictReader(file)} == {"opi"}
    assert torch.load(killed / "calibration", weights_only=True)["done"] == 8
    return ran(4, killed, "some_methods", "few", "swept", "resumed_calibration")


def differences(got: Any, want: Any, path: str = "") -> list[str]:
    """Where two nested values differ, tensors in any bit."""
    if isinstance(want, Tensor):
        same = got.dtype == want.dtype and torch.equal(got, want)
        return [] if same else [f"{path}: {got} instead of {want}"]
    if isinstance(want, dict):
        assert got.keys() == want.keys(), path
        return [d for k in want for d in differences(got[k], want[k], f"{path}/{k}")]
    if isinstance(want, (list, tuple)):
        assert len(got) == len(want), path
        pairs = enumerate(zip(got, want, strict=True))
        return [d for i, (a, b) in pairs for d in differences(a, b, f"{path}/{i}")]
    return [] if got == want else [f"{path}: {got!r} instead of {want!r}"]


# ---- the same as one process ---------------------------------------------------------------------


@pytest.mark.parametrize("job", ["methods", "loaders", "other_calls"])
@pytest.mark.slow
def test_two_ranks_give_the_bits_of_one(
    one: dict[str, Any], two: list[dict[str, Any]], job: str
) -> None:
    for rank in range(2):
        assert differences(two[rank][job], one[job]) == []


@pytest.mark.slow
def test_four_ranks_give_the_bits_of_one(one: dict[str, Any], four: list[dict[str, Any]]) -> None:
    for rank in range(4):
        found = four[rank]["some_methods"]
        assert len(found) == 4
        assert differences(found, {name: one["methods"][name] for name in found}) == []
        # One batch for four ranks: three have nothing of their own.
        assert differences(four[rank]["few"], one["loaders"]["few"]) == []


@pytest.mark.slow
def test_what_is_compared_differs_between_methods(one: dict[str, Any]) -> None:
    """Or equality would mean little."""
    found = one["methods"]
    assert all(differences(found["mmse"], found[name]) for name in ("max", "kl", "percentile"))
    assert differences(found["light"], {**found["light"], **found["mmse"]})


@pytest.mark.slow
def test_the_command_under_torchrun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    optional("sklearn")
    optional("safetensors")
    torch.manual_seed(0)
    path = tmp_path / "net.safetensors"
    models.save_checkpoint(models.small_cnn().eval(), path, "small_cnn")
    words = ["-m", "snnkernels", "sweep", str(path), "--methods", "opi", "--T", "2", "4"]
    words += ["--images", "70", "--calibration", "130", "--batch-size", "16", "--no-plot"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as torchrun has it
    try:
        assert cli.main([*words[2:], "--out", str(tmp_path / "one")]) == 0
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*start, *words, "--out", str(tmp_path / "two")], env=environment(), cwd=tmp_path,
        capture_output=True, text=True, timeout=SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = []
    for name in ("one", "two"):
        with (tmp_path / name / "sweep.csv").open(newline="") as file:
            rows.append([{**row, "commit": ""} for row in csv.DictReader(file)])
    assert rows[0] == rows[1]
    # Rank 0 alone speaks.
    assert done.stdout.replace(str(tmp_path / "two"), str(tmp_path / "one")) == printed
    assert len(rows[0]) == 2


# ---- after a kill --------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_sweep_goes_on_after_a_killed_worker(
    one: dict[str, Any], four: list[dict[str, Any]]
) -> None:
    def words(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
        return [{k: str(v) for k, v in row.items() if k != "commit"} for row in rows]

    assert len(one["swept"]) == 6
    for rank in range(4):
        assert differences(words(four[rank]["swept"]), words(one["swept"])) == []


@pytest.mark.slow
def test_a_calibration_goes_on_after_a_killed_worker(
    one: dict[str, Any], four: list[dict[str, Any]]
) -> None:
    want = one["resumed_calibration"]
    for rank in range(4):
        got = four[rank]["resumed_calibration"]
        assert differences(got["first"], want["first"]) == []
        # The file has all batches now: another rule and another T read the first one alone.
        assert got["done"] == -1
        assert got["read"] <= 4 < want["read"]
        assert differences(got["other"], want["other"]) == []


class Numbers(TensorDataset):
    """Counts what it is asked for."""

    def __init__(self, n: int) -> None:
        super().__init__(torch.arange(float(n))[:, None].expand(n, 3) / n, torch.arange(n) % 2)
        self.asked: list[int] = []

    def __getitem__(self, i: int) -> Any:
        self.asked.append(i)
        return super().__getitem__(i)


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()


def test_an_evaluation_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "EVERY", 2)
    monkeypatch.setattr(passes, "SECONDS", -1.0)
    data = Numbers(23)
    whole = evaluate(small(), DataLoader(data, 3))

    def cut() -> Iterator[Any]:
        for i, item in enumerate(DataLoader(data, 3)):
            if i == 5:
                raise OSError("gone")
            yield item

    path = tmp_path / "counts"
    with pytest.raises(OSError, match="gone"):
        evaluate(small(), cut(), checkpoint=path)
    assert torch.load(path, weights_only=True)["done"] == 4
    data.asked.clear()
    assert evaluate(small(), DataLoader(data, 3), checkpoint=path) == whole
    assert data.asked == [0, 1, 2, *range(12, 23)]  # the first batch says that it is the same data
    data.asked.clear()
    assert evaluate(small(), DataLoader(data, 3), checkpoint=path) == whole
    assert len(data.asked) <= 3
    assert list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    x = torch.rand(20, 3)
    convert(small(), x.split(5), T=4, checkpoint=path, progress=False)
    other = small()
    with torch.no_grad():
        other[0].weight[0, 0] += 1
    with pytest.raises(ValueError, match=r"kept' was left by another run: network differ"):
        convert(other, x.split(5), T=4, checkpoint=path)
    with pytest.raises(ValueError, match="first batch differ"):
        convert(small(), (x + 1).split(5), T=4, checkpoint=path)
    for other_options in ({"maxpool": "avg"}, {"fold": False}):  # no pools and no batch norms here
        convert(small(), x.split(5), T=8, checkpoint=path, **other_options)
    with pytest.raises(ValueError, match="layers differ"):
        convert(small(), x.split(5), T=4, checkpoint=path, per_channel=False)
    with pytest.raises(ValueError, match="was left by another run"):
        evaluate(small(), [(x, torch.zeros(20).long())], checkpoint=path)
    pooled = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    convert(pooled, torch.ones(2, 1, 6, 6), checkpoint=tmp_path / "max")
    with pytest.raises(ValueError, match="max' was left by another run: network differ"):
        convert(pooled, torch.ones(2, 1, 6, 6), checkpoint=tmp_path / "max", maxpool="avg")
    evaluate(small(), [(x, torch.zeros(20).long())], checkpoint=tmp_path / "counts")
    with pytest.raises(ValueError, match="counts' was left by another run: network differ"):
        evaluate(other, [(x, torch.zeros(20).long())], checkpoint=tmp_path / "counts")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="is no checkpoint of a calibration or evaluation"):
        convert(small(), x.split(5), T=4, checkpoint=path)
    with pytest.raises(ValueError, match="is in a folder that does not exist"):
        convert(small(), x.split(5), T=4, checkpoint=tmp_path / "no" / "kept")


def test_a_full_disk_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "kept"
    kept = Checkpoint(path, Team(), {"a": 1})
    kept.write(3, None)

    def full(*args: Any) -> None:
        args[1].write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"cannot be written: .*No space left"):
        kept.write(4, None)
    monkeypatch.undo()
    assert Checkpoint(path, Team(), {"a": 1}).done == 3
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]


# ---- refusals, and errors on one rank ------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("another network", "ValueError: ranks 0 and 1 have different networks"),
        ("another network's test", "ValueError: ranks 0 and 1 have different networks"),
        ("another T", "ValueError: ranks 0 and 1 do not make the same call"),
        ("nan", "ConversionError: 2: the ANN's activations contain NaN"),
        ("raising", "OSError: the disk is gone"),
        ("at once", "OSError: no such file"),
        ("other data", "ValueError: the ranks have read different batches"),
        ("own parts", "snnkernels.distributed.Split(loader)"),
        ("own labels", "ValueError: the ranks have read different batches"),
        ("unseeded", "the same torch.manual_seed everywhere"),
        ("padded", "ValueError: loader has a DistributedSampler, which repeats examples"),
        ("empty", "ValueError: loader is empty"),
        ("ltb of parts", "ConversionError: threshold='ltb' follows the batches in one order"),
        ("no group", "TypeError: process_group must be a torch.distributed.ProcessGroup"),
        ("wrong checkpoint", "is no checkpoint of a calibration or evaluation"),
        ("checkpoint nowhere", "is in a folder that does not exist"),
    ],
)
@pytest.mark.slow
def test_errors_are_the_same_on_every_rank(two: list[dict[str, Any]], call: str, said: str) -> None:
    assert said in two[0]["errors"][call]
    assert two[1]["errors"][call] == two[0]["errors"][call]


# ---- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", ["scalar", "per channel"])
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
@pytest.mark.slow
def test_gradients_are_those_of_one_process(
    one: dict[str, Any], two: list[dict[str, Any]], how: str, threshold: str
) -> None:
    want = one["training"][f"{how} {threshold}"]
    assert "layers.1.v_threshold.grad" in want
    assert "layers.3.lam.grad" in want
    for rank in range(2):
        got = two[rank]["training"][f"{how} {threshold}"]
        assert got.keys() == want.keys()
        for name, value in want.items():
            assert value.abs().max() > 0, name
            torch.testing.assert_close(
                got[name].reshape(value.shape), value, rtol=2e-5, atol=1e-6, msg=name
            )


@pytest.mark.slow
def test_sharded_networks_are_refused_with_the_way_out(two: list[dict[str, Any]]) -> None:
    found = two[0]["training"]
    assert "scalar parameters" in found["scalars"]  # what shardable() is for
    assert "TypeError: v_threshold is a DTensor" in found["inside"]
    assert "TypeError: v is a DTensor, of which this rank may hold only a part" in found["operand"]
    assert "get_model_state_dict" in found["convert"]
    assert "get_model_state_dict" in found["evaluate"]
    assert found["ddp scalar right"] == 86


def test_shardable_keeps_the_network_and_ties() -> None:
    x = torch.rand(4, 5, 3)
    net = nn.Sequential(nn.Linear(3, 4), IFNode(0.5, learn_threshold=True), QCFS(4, 1.0))
    net.append(QCFS(4, 1.0))
    net[3].lam = net[2].lam
    want, state = net(x), net.state_dict()
    assert shardable(net) is net
    net[1].reset()
    assert net[1].v_threshold.shape == net[2].lam.shape == (1,)
    assert net[3].lam is net[2].lam
    assert torch.equal(net(x), want)
    net.load_state_dict(net.state_dict())
    scalars = nn.Sequential(
        nn.Linear(3, 4), IFNode(0.5, learn_threshold=True), QCFS(4, 1.0), QCFS(4, 1.0)
    )
    scalars.load_state_dict(net.state_dict())
    assert scalars[1].v_threshold.shape == ()
    assert all(torch.equal(scalars.state_dict()[k], v) for k, v in state.items())
    with pytest.raises(TypeError, match=r"network must be a torch\.nn\.Module, got int"):
        shardable(3)  # type: ignore[arg-type]


# ---- memory --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_streams_larger_than_memory(two: list[dict[str, Any]]) -> None:
    """240 MB go through; what is held grows by a fraction of that."""
    for rank in range(2):
        found = two[rank]["streamed"]
        assert found["total"] == 120 * 128
        assert found["growth"] < 60e6
    assert two[0]["streamed"]["right"] == two[1]["streamed"]["right"]


# ---- dealing, without processes ------------------------------------------------------------------


class Fake(Team):
    """A rank whose others say the same."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.rank, self.size = rank, size

    def gather(self, value: Any) -> list[Any]:
        return [value] * self.size


class Stream(IterableDataset):
    def __init__(self, n: int) -> None:
        self.n = n

    def __iter__(self) -> Iterator[Tensor]:
        yield from torch.arange(float(self.n))[:, None]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("start", [0, 4, 11])
@pytest.mark.parametrize("kind", ["list", "indices", "stream"])
def test_every_batch_goes_to_one_rank(kind: str, start: int, size: int) -> None:
    n, width = 21, 2
    x = torch.arange(float(n))[:, None]
    given: dict[int, list[float]] = {}
    stamps = []
    for rank in range(size):
        data = TensorDataset(x)
        loader: Any = {
            "list": x.split(width),
            "indices": DataLoader(data, width),
            "stream": DataLoader(Stream(n), width),
        }[kind]
        view = (lambda item: item[0]) if kind == "indices" else (lambda item: item)
        dealt = Dealt(loader, Fake(rank, size), view, seek=True)
        dealt.start = start
        assert dealt.first()[0, 0] == 0
        for i, batch in dealt:
            assert i % size == rank
            assert i not in given
            given[i] = batch[:, 0].tolist()
        stamps.append((dealt.read, dealt._stamp))
    assert sorted(given) == list(range(start, 11))
    assert [v for i in sorted(given) for v in given[i]] == x[start * width :, 0].tolist()
    assert len(set(stamps)) == 1
    assert stamps[0][0] == 11


def test_a_rank_reads_only_its_own_batches() -> None:
    data = Numbers(24)
    dealt = Dealt(DataLoader(data, 4), Fake(1, 3), lambda item: item[0])
    dealt.first()
    assert [i for i, _ in dealt] == [1, 4]
    assert data.asked == [*range(4), *range(4, 8), *range(16, 20)]


def test_ranks_that_read_other_data_are_told() -> None:
    class Other(Fake):
        def gather(self, value: Any) -> list[Any]:
            if not isinstance(value, tuple):
                return [value] * 2
            ended, _, *others = value
            return [value, (ended, (12, 1) if ended else 1, *others)]

    dealt = Dealt(torch.rand(12, 3).split(1), Other(0, 2), lambda x: x)
    dealt.first()
    with pytest.raises(ValueError, match="the ranks have read different batches"):
        run(Other(0, 2), dealt, lambda i, x: None)


def test_what_evaluate_refuses() -> None:
    x, y = torch.rand(4, 3), torch.zeros(4, dtype=torch.int64)
    for loader, steps, message in (
        ([x], None, r"loader must yield \(inputs, labels\)"),
        ([(x, y.float())], None, r"labels must be integers \[B\], one for each input; got \(4,\)"),
        ([(x, y[:3])], None, r"got \(3,\), torch.int64 for inputs \(4, 3\)"),
        ([(x, y)], [4], r"steps=\[4\] is for converted networks; Sequential has no predict_curve"),
        ([], None, "loader is empty"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            evaluate(small(), loader, steps)
    with pytest.raises(
        ValueError, match=r"the network's answer to item 0 of loader is \(4, 3, 2\)"
    ):
        evaluate(small(), [(torch.rand(4, 3, 3), y)])
    with pytest.raises(TypeError, match=r"network must be a torch\.nn\.Module, got str"):
        evaluate("net", [(x, y)])  # type: ignore[arg-type]
    sampler = DistributedSampler(TensorDataset(x, y), num_replicas=2, rank=0)
    padded = DataLoader(TensorDataset(x, y), 2, sampler=sampler)
    for loader in (padded, Split(padded)):
        with pytest.raises(ValueError, match="loader has a DistributedSampler"):
            evaluate(small(), loader)
    with pytest.raises(TypeError, match="Split takes a loader"):
        Split(x)
    with pytest.raises(TypeError, match="process_group must be"):
        evaluate(small(), [(x, y)], process_group=2.0)


def test_evaluate_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.rand(30, 3), torch.arange(30) % 2
    net = small()
    right = int((net(x).argmax(1) == y).sum())
    found = evaluate(net, DataLoader(TensorDataset(x, y), 7), device="cpu", progress=True)
    assert found.correct == {None: right}
    assert found.total == 30
    assert found.accuracy == {None: right / 30}
    snn = convert(net, x, T=4, progress=False)
    curve = {T: int((out.argmax(1) == y).sum()) for T, out in snn.predict_curve(x, [2, 64]).items()}
    assert evaluate(snn, [(x, y)], [64, 2, 2]).correct == curve
    assert list(evaluate(snn, [(x, y)]).correct) == [4]


def test_one_process_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with launched() as group:
        assert group is None
    team = Team(None)
    assert (team.rank, team.size, team.leads) == (0, 1, True)
    assert team.gather(3) == [3]
    assert team.broadcast("x") == "x"
    with pytest.raises(ConversionError, match=r"^here$"):
        team.agree(ConversionError("here"))
