"""Kills runs of two ranks at random moments, resumes each time, and checks after each kill what is left."""

import random
import time
from pathlib import Path

from helpers.forks import Ranks, environment
from helpers.runs import outputs, wait_for

from trainer import checkpoint


class Killer:
    """A run in a folder, which is killed and resumed."""

    def __init__(self, folder: Path, seed: int, flags: list[str]):
        self.draw = random.Random(seed)
        self.save_dir = folder / "ckpt"
        self.log = folder / "log.txt"
        self.argv = ["train.py", *flags, *outputs(folder), "--resume_from=last"]

    def start(self, *flags: str) -> Ranks:
        self.log.write_text("")
        return Ranks(2, [*self.argv, *flags], environment(), self.log, self.log)

    def newest_step(self) -> int:
        """Return the step from which --resume_from=last would continue, after a full check; 0: none."""
        for path in checkpoint.candidates(self.save_dir, "last"):
            source = checkpoint.Checkpoint.open(path)  # the first is good: no kill damages one
            source.verify()
            return source.state["step"]
        return 0

    def kill_one_run(self, in_save: bool) -> bool:
        """Return whether the kill hit a save. in_save: it comes during a save, or a little later."""
        before = self.newest_step()
        saves = ["--save_every_n_train_steps=1", "--keep_last_n_checkpoints=2"]
        background = f"--async_save={self.draw.choice(['on', 'off'])}"
        ranks = self.start(*saves, background, "--max_train_steps=1000000").ranks
        begun = f"resumed from {self.save_dir.resolve()}" if before else "train_loss="

        def going_on() -> bool:
            return all(rank.poll() is None for rank in ranks)

        wait_for(lambda: begun in self.log.read_text(), going_on, self.log)
        if in_save:
            wait_for(lambda: any(self.save_dir.glob(".saving-*")), going_on, self.log)
        time.sleep(self.draw.uniform(0, 0.015 if in_save else 0.4))
        link = self.save_dir / "last"
        reached = checkpoint.step_of(link.readlink()) if link.is_symlink() else 0
        for rank in self.draw.sample(ranks, 2):
            rank.kill()
            time.sleep(self.draw.choice([0, 0, 0.02]))
        for rank in ranks:
            rank.wait()
        self.check(before, reached)
        return any(self.save_dir.glob(".saving-*"))

    def check(self, before: int, reached: int) -> None:
        """Fail unless the run continued from the step before it, and left the step that it had reached."""
        output = self.log.read_text()
        after = self.newest_step()
        lines = [line for line in output.splitlines() if line.startswith("WARNING: ")]
        # A kill between a save and the move of `last` leaves a checkpoint that the next run sets aside.
        warnings = [line for line in lines if "set aside in" not in line]
        assert before or len(warnings) == 1, output  # the first run finds no 'last'
        assert not before or not warnings, output
        assert not before or f"step {before}," in output, f"step {before} was whole, but:\n{output}"
        assert after >= reached, f"step {reached} was whole before the kill, {after} after it"

    def run(self, kills: int) -> dict[str, int]:
        """Return how many kills hit a save, and the steps of the run that at last went on to its end."""
        hits = sum(self.kill_one_run(in_save=number % 4 > 0) for number in range(kills))
        steps = self.newest_step() + 3
        assert self.start(f"--max_train_steps={steps}").wait(300) == 0, self.log.read_text()[-3000:]
        return {"during_save": hits, "steps": steps}
