"""Checkpoints: what is saved comes back bit by bit, and nothing half written is ever chosen."""

from __future__ import annotations

import json
import logging
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fastbert
from fastbert.data import TokenBatches
from fastbert.train import AdamW, Lamb, Schedule, param_groups
from fastbert.train.checkpoint import latest, load, save

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = fastbert.BertConfig(
    vocab_size=30, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
    intermediate_size=64, max_position_embeddings=16,
)  # fmt: skip


class Run:
    """A little training run with all that a checkpoint holds."""

    def __init__(self, kind: Any = AdamW, seed: int = 0) -> None:
        for start in (random.seed, np.random.seed, torch.manual_seed):
            start(seed)
        self.model = fastbert.BertForMaskedLM(CONFIG).train()
        self.optimizer = kind(param_groups(self.model, 0.01), lr=0.01, max_grad_norm=1.0)
        self.schedule = Schedule(self.optimizer, "linear", warmup_steps=2, total_steps=20)
        self.batches = TokenBatches([5, 9, 7, 6, 8, 12], 14, seed=seed)
        self.step = 0

    def train(self, steps: int) -> list[float]:
        """Losses; every random generator has a say in them."""
        losses = []
        for _ in range(steps):
            ids = torch.randint(1, 30, (len(next(iter(self.batches))), 8))
            ids[0, 0] = random.randrange(1, 30)
            ids[0, 1] = int(np.random.randint(1, 30))
            random.gauss(0, 1)  # leaves half a pair behind
            np.random.normal()
            loss = self.model(ids, labels=ids).loss
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            self.batches.advance()
            self.step += 1
            losses.append(float(loss.detach()))
        return losses

    @property
    def parts(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.schedule,
            "sampler": self.batches,
        }

    def save(self, directory: Path, **options: Any) -> Path:
        return save(directory, self.step, **self.parts, extra={"loss": [1.5, None]}, **options)

    def load(self, folder: Path) -> Any:
        loaded = load(folder, **self.parts)
        self.step = loaded.step
        return loaded


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("kind", [AdamW, Lamb, torch.optim.AdamW])
def test_a_resumed_run_is_the_uninterrupted_one(kind: Any, tmp_path: Path) -> None:
    if kind is torch.optim.AdamW:
        kind = lambda groups, lr, max_grad_norm: torch.optim.AdamW(groups, lr)  # noqa: E731
    expected = Run(kind)
    losses = expected.train(8)

    first = Run(kind)
    assert first.train(4) == losses[:4]
    folder = first.save(tmp_path)
    assert folder == tmp_path / "step-00000004" == latest(tmp_path)

    second = Run(kind, seed=99)
    second.train(1)
    loaded = second.load(folder)
    assert (loaded.step, loaded.extra) == (4, {"loss": [1.5, None]})
    assert second.train(4) == losses[4:]
    assert same(second.model, expected.model)


def test_the_files_are_safetensors_and_json(tmp_path: Path) -> None:
    run = Run()
    run.train(1)
    folder = run.save(tmp_path)
    names = ["model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    state = json.loads((folder / "state.json").read_text())
    assert state["step"] == 1 and state["sampler"]["seed"] == 0
    # The tied decoder is saved once.
    assert state["aliases"]["cls.predictions.decoder.weight"].endswith("word_embeddings.weight")
    (embeddings,) = [g for g in state["param_groups"] if g["weight_decay"] == 0.01]
    assert "bert.embeddings.word_embeddings.weight" in embeddings["params"]


def test_the_optimizer_goes_by_names(tmp_path: Path) -> None:
    """Groups of another cut take their own parameters' state."""
    run = Run()
    run.train(2)
    folder = run.save(tmp_path)
    model = fastbert.BertForMaskedLM(CONFIG)
    decayed, others = ([p for p in model.parameters() if (p.dim() > 1) is m] for m in (True, False))
    optimizer = AdamW([{"params": others[::-1]}, {"params": decayed[:2]}, {"params": decayed[2:]}],
                      lr=1.0)  # fmt: skip
    load(folder, model=model, optimizer=optimizer, rng=False)
    saved = dict(run.model.named_parameters())
    for name, p in model.named_parameters():
        for slot, value in run.optimizer.state[saved[name]].items():
            assert torch.equal(optimizer.state[p][slot], value), (name, slot)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.01, 0.01]
    with pytest.raises(ValueError, match="^optimizer: .*unlike settings"):
        load(folder, model=model, optimizer=AdamW(model.parameters(), 0.1), rng=False)


def test_only_the_last_are_kept(tmp_path: Path) -> None:
    run = Run()
    for _ in range(4):
        run.train(1)
        run.save(tmp_path, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]
    # A run that went back does not lose what lies before it, and leaves later ones alone.
    run.step = 1
    run.save(tmp_path, keep=1)
    assert len(list(tmp_path.iterdir())) == 3


def test_there_is_none(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    assert latest(tmp_path / "missing") is None
    (tmp_path / "notes.txt").write_text("step-00000001")
    assert latest(tmp_path) is None


# --- damage ------------------------------------------------------------------------------------


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "gone":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "short":
        path.write_bytes(content[: len(content) // 2])
    else:
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


FILES = ["model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json"]


@pytest.mark.parametrize("how", ["gone", "empty", "short", "one bit"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_passed_over(
    name: str, how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run()
    run.train(1)
    good = run.save(tmp_path)
    run.train(1)
    bad = run.save(tmp_path)
    assert latest(tmp_path) == bad
    damage(bad / name, how)
    with caplog.at_level(logging.WARNING):
        assert latest(tmp_path) == good
    assert str(bad) in caplog.text and "trying the checkpoint before it" in caplog.text
    before = [p.detach().clone() for p in run.model.parameters()]
    with pytest.raises(ValueError, match=str(bad)):
        run.load(bad)
    assert all(torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))
    damage(good / name, how)
    assert latest(tmp_path) is None


@pytest.mark.parametrize("text", ["[]", '{"format": 2}', '{"format": 1, "files": {}}', "null"])
def test_a_state_of_another_kind(text: str, tmp_path: Path) -> None:
    folder = Run().save(tmp_path)
    (folder / "state.json").write_text(text)
    assert latest(tmp_path) is None
    with pytest.raises(ValueError, match="state.json: this checkpoint is damaged"):
        Run().load(folder)


def test_what_does_not_fit(tmp_path: Path) -> None:
    run = Run()
    folder = save(tmp_path, 0, model=run.model, rng=False)
    with pytest.raises(ValueError, match="^rng: .*saved without generators"):
        load(folder, model=run.model)
    with pytest.raises(ValueError, match="^scheduler: .*saved without one"):
        load(folder, model=run.model, scheduler=run.schedule, rng=False)
    with pytest.raises(ValueError, match="^optimizer: .* has no state for bert"):
        load(folder, model=run.model, optimizer=run.optimizer, rng=False)
    wide = fastbert.BertForMaskedLM(CONFIG.replace(hidden_size=64))
    with pytest.raises(ValueError, match="^model: .*does not fit it:\n.*wrong shape: .*\\(30, 32"):
        load(folder, model=wide, rng=False)
    with pytest.raises(ValueError, match="^model: .*does not fit it:\n.*missing: weight"):
        load(folder, model=nn.Linear(2, 2), rng=False)
    with pytest.raises(ValueError, match="^optimizer: got 1 parameters that are none"):
        save(tmp_path, 1, model=run.model, optimizer=AdamW([nn.Parameter(torch.ones(1))], 0.1))
    with pytest.raises(ValueError, match="expected JSON values"):
        save(tmp_path, 1, model=run.model, extra={"x": object()})
    with pytest.raises(ValueError, match="expected JSON values"):
        save(tmp_path, 1, model=run.model, extra={"x": float("nan")})
    with pytest.raises(ValueError, match="expected step >= 0 and keep >= 1"):
        save(tmp_path, -1, model=run.model)
    assert latest(tmp_path) == folder


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file.step-00000000: this checkpoint could not be written"):
        Run().save(tmp_path / "file")


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import torch
from fastbert.train.checkpoint import latest, save
torch.set_num_threads(1)
directory = Path(sys.argv[1])
small = torch.nn.Linear(10, 10)
good = save(directory, 1, model=small)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write past the limit fails, as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save(directory, 2, model=torch.nn.Linear(1000, 1000))
except OSError as error:
    print(error)
assert latest(directory) == good and [p.name for p in directory.iterdir()] == [good.name]
save(directory, 3, model=small)
"""


def test_a_full_disk(tmp_path: Path) -> None:
    """The system refuses to write: an error that says so, and the old checkpoint as it was."""
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True,
                          text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "this checkpoint could not be written" in done.stdout
    assert latest(tmp_path) == tmp_path / "step-00000003"


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from fastbert.train import checkpoint
from fastbert.train.checkpoint import latest, load, save
torch.set_num_threads(1)
directory = Path(sys.argv[1])

def model(step):
    made = torch.nn.Linear(300, 300)
    torch.nn.init.constant_(made.weight, float(step))
    return made

def dying(function, counter, fatal):
    def call(*args, **kwargs):
        counter[0] += 1
        if counter[0] == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call

save(directory, 1, model=model(1))
step, fatal, chosen = 2, 1, []
while True:
    child = os.fork()
    if not child:
        counter = [0]
        for name in ("fsync", "replace", "unlink", "rmdir"):
            setattr(os, name, dying(getattr(os, name), counter, fatal))
        checkpoint.save_file = dying(checkpoint.save_file, counter, fatal)
        save(directory, step, model=model(step), keep=2)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    found = latest(directory)
    number = int(found.name.removeprefix("step-"))
    assert number in (step - 1, step), (number, step, fatal)
    loaded = model(0)
    assert load(found, model=loaded).step == number
    assert (loaded.weight == number).all()
    if not os.WIFSIGNALED(status):
        break
    chosen.append(number == step)
    if number == step - 1:
        save(directory, step, model=model(step), keep=2)
    step, fatal = step + 1, fatal + 1
assert number == step
assert chosen[0] is False and chosen[-1] is True, chosen
names = sorted(p.name for p in directory.iterdir())
assert len(names) == 2, names
assert not [p for p in directory.rglob("*.tmp")]
print(len(chosen), "deaths")
"""


def test_killed_at_every_step_of_a_save(tmp_path: Path) -> None:
    """SIGKILL before each write to disk, rename and removal in turn: there is always a whole
    checkpoint, the new one or the one before."""
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True,
                          text=True)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[0]) >= 12  # 3 files, 5 syncs, 4 renames at least


SAVING = """
import sys
from pathlib import Path
import torch
from fastbert.train.checkpoint import save
torch.set_num_threads(1)
model = torch.nn.Linear(2000, 1000)
step = int(sys.argv[2])
while True:
    torch.nn.init.constant_(model.weight, float(step))
    save(Path(sys.argv[1]), step, model=model)
    print(step, flush=True)
    step += 1
"""


def test_killed_at_any_moment(tmp_path: Path) -> None:
    """A process that does nothing but save is killed a few times: no more than one save is lost."""
    step = 0
    for extra in range(3):
        with subprocess.Popen([sys.executable, "-c", SAVING, str(tmp_path), str(step)],
                              stdout=subprocess.PIPE, text=True) as process:  # fmt: skip
            assert process.stdout is not None
            for _ in range(2 + extra):
                step = int(process.stdout.readline())
            process.kill()
            finished = [int(line) for line in process.stdout.read().split()]
        step = (finished or [step])[-1]
        folder = latest(tmp_path)
        assert folder is not None
        number = int(folder.name.removeprefix("step-"))
        assert number in (step, step + 1)
        model = nn.Linear(2000, 1000)
        assert load(folder, model=model).step == number
        assert (model.weight == number).all()
        step = number + 1


# --- generators --------------------------------------------------------------------------------


def draws() -> list[Any]:
    return [
        random.random(), random.gauss(0, 1), np.random.rand(), np.random.normal(),
        torch.rand(1).item(), torch.randn(1).item(),
    ]  # fmt: skip


def test_generators_come_back() -> None:
    from fastbert.train.rng import rng_state, seed_all, set_rng_state

    seed_all(3, 0)
    random.gauss(0, 1)
    np.random.normal()
    state = rng_state()
    expected = draws()
    draws()
    set_rng_state(state)
    assert draws() == expected
    seed_all(3, 1)
    assert not set(draws()) & set(expected)
    with pytest.raises(ValueError, match="^state: its 'numpy' is missing or cut short"):
        set_rng_state({**state, "numpy": state["numpy"][:-1]})
